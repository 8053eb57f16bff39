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

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from vidsieve.adapters.base import Adapter
from vidsieve.data.encodings import EncodingCache, Plan, Source
from vidsieve.data.video import Video, read_frames, read_video
from vidsieve.data.video_r1 import ASKED, KINDS, Kind, read_video_r1
from vidsieve.errors import TrainingError
from vidsieve.pipeline import chat
from vidsieve.rl.samples import Caption, Choice

_LETTERED = re.compile(r"^\s*\(?([A-Z])[.):]\s*")
Sample = TypeVar("Sample", Choice, Caption)
CAPTION_PROMPT = "Describe the video."


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

    def plan(self, rows: Sequence[dict[str, Any]]) -> Plan | None:
        """Return what the cache will take for `rows`, the first of them encoded; None without a cache.

        Raises
        ------
        OutputError
            If it does not fit on the disk.
        """
        if self.cache is None:
            return None
        return self.cache.plan((self._source(row), partial(self._video, row)) for row in rows)

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
        if not str(row["caption"]).strip():
            raise TrainingError(f"the caption of {files_of(row)[0]} is empty")
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


def videos_of(path: Path, row: Mapping[str, Any]) -> frozenset[Path]:
    """Return the resolved paths of the files that a row shows; `path` is the file of the row."""
    return frozenset((path.parent / name).resolve() for name in files_of(row))


def held_out_videos(path: Path, share: float, kinds: Kind | None = "multiple choice") -> frozenset[Path]:
    """Return `share` of a file's videos, at least one, drawn by a fixed seed: whole videos, so that nothing leaks.

    Raises
    ------
    TrainingError
        If the file is unreadable or has a single video.
    """
    videos = sorted({video for row in read_rows(path, kinds) for video in videos_of(path, row)})
    if len(videos) < 2:
        raise TrainingError(f"{path} has {len(videos)} videos, too few to hold one out: leave --hold-out out")
    order = torch.randperm(len(videos), generator=torch.Generator().manual_seed(0))
    return frozenset(videos[i] for i in order[: max(1, round(share * len(videos)))].tolist())


@dataclass(frozen=True)
class Asked:
    """A question as the model reads it: text, next token of each option (options,), the right one, the answer's text.

    Without options `option_ids` is empty and `answer` −1.
    """

    text: str
    option_ids: Tensor
    answer: int
    truth: str
    kind: Kind = "multiple choice"


def ask(row: Mapping[str, Any], tokenizer: Any) -> Asked:
    """Return the question of a row.

    Raises
    ------
    TrainingError
        If its answer is none of its options, or an option without a letter is not one token.
    """
    kind: Kind = row.get("problem_type", "multiple choice")
    if kind != "multiple choice":
        return Asked(
            f"{row['question']}\n{ASKED[kind]}", torch.empty(0, dtype=torch.int64), -1, str(row["answer"]), kind
        )
    options, answer = [str(option) for option in row["options"]], str(row["answer"]).strip()
    letters = [match.group(1) for match in map(_LETTERED.match, options) if match]
    if len(letters) == len(options):
        listed = "\n".join(options)
        question = f"{row['question']}\n{listed}\n{ASKED['multiple choice']}"
        words, right = letters, answer[:1]
    else:
        question, words, right = str(row["question"]), options, answer
    if right not in words:
        raise TrainingError(f"the answer {answer!r} of {row['video']} is none of its options {options}")
    ids = [tokenizer(word, add_special_tokens=False)["input_ids"] for word in words]
    if any(len(tokens) != 1 for tokens in ids):
        long = next(word for word, tokens in zip(words, ids, strict=True) if len(tokens) != 1)
        raise TrainingError(f"option {long!r} of {row['video']} is not one token: letter the options (A. …, B. …)")
    return Asked(question, torch.tensor([t[0] for t in ids]), words.index(right), right)


def files_of(row: Mapping[str, Any]) -> list[str]:
    """Return the names of the files that a row shows: its video, or its still images."""
    return [name for name, _ in row["frames"]] if "frames" in row else [row["video"]]


def _is_frames(value: Any) -> bool:
    """Return whether a value is [[path, times], …] with at least one image, each shown at least once."""
    return isinstance(value, list) and bool(value) and all(
        isinstance(pair, list) and len(pair) == 2 and isinstance(pair[0], str) and type(pair[1]) is int and pair[1] > 0
        for pair in value
    )  # fmt: skip


def read_rows(path: Path, kinds: Kind | None = "multiple choice") -> list[dict[str, Any]]:
    """Return the rows of a file of prompts; `kinds` is the kind of question that is taken, None: every kind.

    Raises
    ------
    TrainingError
        If it is unreadable, or a row is malformed.
    """
    if path.suffix == ".json":
        return [
            {
                "video": str(r.video.resolve()),
                "question": r.question,
                "options": list(r.options),
                "answer": r.answer,
                "problem_type": r.kind,
            }
            for r in read_video_r1(path, kinds=kinds)
        ]
    try:
        lines = path.read_text(encoding="utf-8").split("\n")  # a caption may hold other ends of lines, U+2028
    except (OSError, UnicodeDecodeError) as error:
        raise TrainingError(f"cannot read {path}: {error}") from None
    rows = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise TrainingError(f"line {number} of {path} is not JSON: {error}") from None
        if isinstance(row, dict) and "frames" in row:
            if "video" in row or "caption" not in row or not _is_frames(row["frames"]):
                raise TrainingError(
                    f"line {number} of {path}: frames must be [[path, times], …], with a caption and without a video"
                )
            rows.append(row)
            continue
        whole = isinstance(row, dict) and "video" in row
        kind = row.get("problem_type", "multiple choice") if whole else ""
        if whole and kind not in KINDS:
            raise TrainingError(f"line {number} of {path}: problem_type is {kind!r}, must be one of {', '.join(KINDS)}")
        wanted = {"question", "options", "answer"} if kind == "multiple choice" else {"question", "answer"}
        if not whole or not ("caption" in row or wanted <= row.keys()):
            raise TrainingError(f"line {number} of {path} needs video, and caption or question, options and answer")
        if "question" in row and kinds is not None and kind != kinds:
            continue
        if (
            wanted <= row.keys()
            and "options" in wanted
            and not (isinstance(row["options"], list) and len(row["options"]) > 1)
        ):
            raise TrainingError(f"line {number} of {path}: options must be a list of two or more")
        rows.append(row)
    return rows
