"""Training prompts from JSON lines of ordinary video files, and of still images.

One object a line: ``{"video": path, "question": …, "options": […], "answer": …}`` for CaCoVID, or
``{"video": path, "caption": …}`` for SCORE; paths are relative to the file. Options that begin with a letter
("A. a dog") are listed in the prompt and answered by letter; other options must each be one token of the
model's vocabulary. `answer` is an option or its letter. ``"problem_type"`` names another kind of question (`KINDS` of
`video_r1`): it has no options, and is rewarded by its generated answer alone. Instead of a video, a caption may have
still images, ``"frames": [[path, times], …]``: a pseudo-video of one frame a second that shows each `times` times. A
file named ``….json`` is read as Video-R1's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch

from vidsieve.adapters.base import Adapter
from vidsieve.data.encodings import EncodingCache, Source
from vidsieve.data.rows import ask, files_of, read_rows, videos_of
from vidsieve.data.video import Video, read_frames, read_video
from vidsieve.data.video_r1 import Kind
from vidsieve.errors import TrainingError
from vidsieve.pipeline import chat
from vidsieve.rl.samples import Caption, Choice

Sample = TypeVar("Sample", Choice, Caption)
CAPTION_PROMPT = "Describe the video."


class _Remembered:
    """A tokenizer that splits each text once: options are the same few letters all through a file."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.known: dict[str, Any] = {}

    def __call__(self, text: str, **options: Any) -> Any:
        if text not in self.known:
            self.known[text] = self.tokenizer(text, **options)
        return self.known[text]


class FilePrompts:
    """Prompts of a JSON-lines file in a seeded order, again and again.

    Parameters
    ----------
    adapter, processor : of the frozen model
    path : Path
    seed : int
        Order of the rows; every pass has its own.
    frames : int
        Frames taken evenly from each video; a pseudo-video that has no more is taken whole.
    kinds : str, optional
        The kind of question that is taken; None: every kind.
    cache : EncodingCache, optional
        Where encoded videos are kept.
    only : callable, optional
        Says of the files that a row shows, by their resolved paths, whether it is taken; default: every row is.

    Raises
    ------
    TrainingError
        If the file is unreadable, a row is malformed, or a video is missing.
    """

    def __init__(
        self, adapter: Adapter, processor: Any, path: Path, *, seed: int = 0, frames: int = 16,
        kinds: Kind | None = "multiple choice", cache: EncodingCache | None = None,
        only: Callable[[frozenset[Path]], bool] | None = None,
    ) -> None:  # fmt: skip
        self.adapter, self.processor, self.path, self.seed, self.frames = adapter, processor, Path(path), seed, frames
        self.cache = cache
        rows = [row for row in read_rows(self.path, kinds) if only is None or only(videos_of(self.path, row))]
        self.videos = frozenset(video for row in rows for video in videos_of(self.path, row))
        self.choices = [row for row in rows if "question" in row]
        self.captions = [row for row in rows if "caption" in row]
        for what in ("video", "image"):
            named = {name for row in rows if ("frames" in row) == (what == "image") for name in files_of(row)}
            missing = sorted(name for name in named if not (self.path.parent / name).is_file())
            if missing:
                raise TrainingError(f"{len(missing)} {what}s of {self.path} are missing, first {missing[0]}")
        words = _Remembered(processor.tokenizer)
        for row in self.choices:  # a wrong row is told now, not when its turn comes
            ask(row, words)

    def _row(self, rows: list[dict[str, Any]], number: int, what: str) -> tuple[int, dict[str, Any]]:
        """Return a row and its place in the file's order."""
        if not rows:
            raise TrainingError(f"{self.path} has no rows with {what}")
        turn, place = divmod(number, len(rows))
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(self.seed + turn))
        index = int(order[place])
        return index, rows[index]

    def _source(self, row: dict[str, Any]) -> Source:
        pairs = row["frames"] if "frames" in row else [[row["video"], 1]]
        return tuple((self.path.parent / name, times) for name, times in pairs)

    def _video(self, row: dict[str, Any]) -> Video:
        source = self._source(row)
        if "frames" in row:
            return read_frames(source, frames=self.frames)
        return read_video(source[0][0], frames=self.frames)

    def _inputs(self, row: dict[str, Any], question: str) -> dict[str, Any]:
        if self.cache is not None:
            return self.cache.inputs(self._source(row), lambda: self._video(row), question)
        return chat(self.processor, self._video(row), question)

    def videos_to_encode(self, captions: bool) -> Iterator[tuple[Source, Callable[[], Video]]]:
        """Yield what a cache encodes for the rows with captions, or with questions: its name, and how it is read."""
        for row in self.captions if captions else self.choices:
            yield self._source(row), partial(self._video, row)

    def choice(self, number: int) -> Choice:
        """Return question `number`."""
        return self.finished(self.read_choice(number))

    def caption(self, number: int) -> Caption:
        """Return caption prompt `number`."""
        return self.finished(self.read_caption(number))

    def finished(self, sample: Sample) -> Sample:
        """Return a sample that was read, ready for use; with a cache, the thread that runs the model calls this."""
        return sample if self.cache is None else replace(sample, inputs=self.cache.finished(sample.inputs))

    def read_choice(self, number: int) -> Choice:
        """Return question `number`, for `finished`; any thread may call this."""
        _, row = self._row(self.choices, number, "a question")
        asked = ask(row, self.processor.tokenizer)
        return Choice(self._inputs(row, asked.text), asked.option_ids, asked.answer, asked.truth, asked.kind)

    def read_caption(self, number: int) -> Caption:
        """Return caption prompt `number`, for `finished`; any thread may call this."""
        index, row = self._row(self.captions, number, "a caption")
        inputs = self._inputs(row, str(row.get("prompt", CAPTION_PROMPT)))
        end = self.processor.tokenizer.eos_token or ""
        text = f" {row['caption']} {end}"
        answer = self.processor.tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
        ids = torch.cat([inputs["input_ids"], answer], 1)
        labels = torch.full_like(ids, -100)
        labels[:, -answer.shape[1] :] = answer
        extended = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
        kinds = inputs.get("mm_token_type_ids")
        if kinds is not None:
            extended["mm_token_type_ids"] = torch.cat([kinds, torch.zeros_like(answer).to(kinds)], 1)
        return Caption(inputs | extended, key=f"{self.path}:{index}")
