"""Training prompts from files of videos with questions or captions, in any layout of `layouts`.

Options that begin with a letter ("A. a dog") are listed in the prompt and answered by letter; other options must each
be one token of the model's vocabulary. An answer is an option or its letter. Questions without options are rewarded by
their generated answer alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache as once
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from vidsieve.adapters.adapter import Adapter
from vidsieve.answering import chat, check_question
from vidsieve.errors import PromptError, TrainingError, VideoError
from vidsieve.training.data.encodings import EncodingCache, Source, without_video
from vidsieve.training.data.layouts import files_of
from vidsieve.training.data.rows import Kind, Remembered, ask, kind_of, unwanted
from vidsieve.training.data.samples import Caption, Choice
from vidsieve.training.data.skipped import Skipped
from vidsieve.training.data.table import View, keys_of, load_rows
from vidsieve.video.reading import Video, read_frames, read_video

Sample = TypeVar("Sample", Choice, Caption)
CAPTION_PROMPT = "Describe the video."


def load_prompts(
    processor: Any,
    path: Path,
    root: Path | None = None,
    *,
    kinds: Kind | None = "multiple choice",
    skipped: Skipped | None = None,
    captions: bool | None = None,
    answers: bool = True,
) -> View:
    """Return the rows of a file that a model can be trained on, captions, questions, or both; see `FilePrompts`.

    Raises
    ------
    TrainingError
        As `load_rows`.
    """
    words = Remembered(processor.tokenizer)

    def wanted(row: Mapping[str, Any]) -> str:
        kind, reason = kind_of(row), unwanted(row, captions)
        if reason:
            return reason
        if kind != "caption" and kinds is not None and kind != kinds:
            return f"a question of kind {kind!r}"
        # A row that cannot be asked is reported now, not when its turn comes.
        check_question(processor, str(row.get("prompt", CAPTION_PROMPT)) if kind == "caption" else ask(row, words).text)
        return ""

    return load_rows(path, root, wanted=wanted, skipped=skipped, answers=answers)


def described(rows: View, skipped: Skipped) -> View:
    """Return the questions about videos that have a caption, and these captions, and count the others in `skipped`."""
    shown = rows.table.shown
    kinds = [(number, "question" in row, "caption" in row) for number, row in zip(rows.numbers, rows, strict=True)]
    asked, told = ({frozenset(shown[kind[0]]) for kind in kinds if kind[which]} for which in (1, 2))
    both = [number for number, _, _ in kinds if frozenset(shown[number]) in asked & told]
    for where, text in (
        (asked - told, "a question about a video without a caption"),
        (told - asked, "a caption of a video without a question"),
    ):
        count = sum(frozenset(shown[number]) in where for number in rows.numbers)
        if count:
            skipped.leave(text, count)
    return View(rows.table, both)


class FilePrompts:
    """Prompts of a file in a seeded order, again and again.

    A video that proves broken when its turn comes, or a prompt that the processor or the model refuses, is listed in
    `skipped`, and the next row takes its place: so the same number gives the same prompt in every process and sitting,
    whatever was met before.

    Parameters
    ----------
    adapter, processor : of the frozen model
    path : Path
        Of any layout in `vidsieve.training.data.layouts`.
    seed : int
        Order of the rows; every pass has its own.
    frames : int
        Frames taken evenly from each video; a pseudo-video that has no more is taken whole.
    kinds : str, optional
        The kind of question that is taken; None: every kind.
    cache : EncodingCache, optional
        Where encoded videos are kept.
    only : callable, optional
        Called with `keys_of` a row, the files that it shows; rows are taken for which it is true. Default: every row.
    root : Path, optional
        The folder that paths in the file start from; default: the folder of the file.
    skipped : Skipped, optional
        Where malformed records, missing and broken videos are counted and listed.
    rows : View, optional
        The file's rows, where `load_prompts` has read them already.
    captioned : bool
        Give each question the caption in its row, or the first one of its video; `rows` are `described`.

    Raises
    ------
    TrainingError
        If the file is unreadable, or nothing in it can be used.
    """

    def __init__(
        self,
        adapter: Adapter,
        processor: Any,
        path: Path,
        *,
        seed: int = 0,
        frames: int = 16,
        kinds: Kind | None = "multiple choice",
        cache: EncodingCache | None = None,
        only: Callable[[frozenset[str]], bool] | None = None,
        root: Path | None = None,
        skipped: Skipped | None = None,
        rows: View | None = None,
        captioned: bool = False,
    ) -> None:
        self.adapter, self.processor, self.path, self.seed, self.frames = adapter, processor, Path(path), seed, frames
        self.cache, self.skipped, self.captioned = cache, Skipped() if skipped is None else skipped, captioned
        if rows is None:
            rows = load_prompts(processor, self.path, root, kinds=kinds, skipped=self.skipped)
            rows = described(rows, self.skipped) if captioned else rows
        table, questions, captions = rows.table, list[int](), list[int]()
        for number, row in zip(rows.numbers, rows, strict=True):
            if only is None or only(frozenset(table.shown[number])):
                if "question" in row:
                    questions.append(number)
                if "caption" in row:
                    captions.append(number)
        self._caption_of: dict[frozenset[str], int] = {}
        for place, number in enumerate(captions if captioned else ()):
            self._caption_of.setdefault(frozenset(table.shown[number]), place)
        self.choices, self.captions = View(table, questions), View(table, captions)
        self.videos = sorted({key for number in (*questions, *captions) for key in table.shown[number]})
        self._broken: set[frozenset[str]] = set()
        self._refused: set[int] = set()
        self.template = adapter.known_template() if adapter is not None else None

    def first_of(self, keys: Sequence[str]) -> str:
        """Return the path of the first file that has one of these resolved paths, in the order of the rows."""
        return next(shown.name for key, shown in self.choices.table.files.items() if key in set(keys))

    def _row(self, rows: View, number: int, what: str, place: int = 0) -> tuple[int, dict[str, Any]]:
        """Return a row and its place in the file's order; `place` rows further on if that many were broken."""
        if not len(rows):
            raise TrainingError(f"{self.path} has no rows with {what}")
        turn, start = divmod(number, len(rows))
        index = int(_order(self.seed + turn, len(rows))[(start + place) % len(rows)])
        return index, rows[index]

    def _readable(self, rows: View, number: int, what: str, read: Callable[[int, dict[str, Any]], Sample]) -> Sample:
        """Return the sample of row `number`, or of the next one whose video can be read."""
        for place in range(max(1, len(rows))):
            index, row = self._row(rows, number, what, place)
            keys = keys_of(row)
            if keys in self._broken or rows.numbers[index] in self._refused:
                continue
            try:
                return read(index, row)
            except PromptError as error:
                record = rows.numbers[index]
                if record not in self._refused:
                    self._refused.add(record)
                    where = f"row {record + 1}, {Path(files_of(row)[0]).name}"
                    self.skipped.add("prompt that cannot be asked", where, str(error), file=self.path, later=True)
            except VideoError as error:
                if keys not in self._broken:  # another thread may have met it meanwhile
                    self._broken.add(keys)
                    name = files_of(row)[0]
                    shown = sum(not keys.isdisjoint(shown) for shown in rows.table.shown)
                    self.skipped.add("broken video", name, str(error), file=self.path, rows=shown, later=True)
        raise TrainingError(f"no row of {self.path} can be used: {self.skipped.summary()}")

    def _source(self, row: Mapping[str, Any]) -> Source:
        pairs = row["frames"] if "frames" in row else [[row["video"], 1]]
        return tuple((Path(name), times) for name, times in pairs)

    def _video(self, row: Mapping[str, Any]) -> Video:
        source = self._source(row)
        if "frames" in row:
            return read_frames(source, frames=self.frames)
        return read_video(source[0][0], frames=self.frames)

    def _inputs(self, row: dict[str, Any], question: str, read: Callable[[], Video] | None = None) -> dict[str, Any]:
        read = read or partial(self._video, row)
        if self.cache is not None:
            return self.cache.inputs(self._source(row), read, question)
        return chat(self.processor, read(), question)

    def videos_to_encode(self, captions: bool) -> Iterator[tuple[Source, Callable[[], Video]]]:
        """Yield the source and the reader of each video for a cache, of rows with captions or with questions."""
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
        return self._readable(self.choices, number, "a question", self._choice)

    def read_caption(self, number: int) -> Caption:
        """Return caption prompt `number`, for `finished`; any thread may call this."""
        return self._readable(self.captions, number, "a caption", self._caption)

    def _choice(self, index: int, row: dict[str, Any]) -> Choice:
        asked, read = ask(row, self.processor.tokenizer), once(partial(self._video, row))
        inputs = self._inputs(row, asked.text, read)
        if self.template is not None:
            ids = inputs["input_ids"][0]
            frames = (ids == self.adapter.video_token_id).nonzero().flatten()
            self.template.question_mask(ids, [frames])  # a question without a known word has no policy
        caption = None
        if self.captioned:
            told = row if "caption" in row else self.captions[self._caption_of[keys_of(row)]]
            caption = self._caption(index, told, read)
            caption = replace(caption, inputs=without_video(caption.inputs))  # the question's inputs have it
        return Choice(inputs, asked.option_ids, asked.answer, asked.truth, asked.kind, caption=caption)

    def _caption(self, index: int, row: dict[str, Any], read: Callable[[], Video] | None = None) -> Caption:
        inputs = self._inputs(row, str(row.get("prompt", CAPTION_PROMPT)), read)
        tokenizer = self.processor.tokenizer
        last = tokenizer.decode(inputs["input_ids"][0, -1:])
        # As the model would write it: a blank of its own would be one more token, and an improbable one.
        blank = "" if last[-1:].isspace() else " "
        text = f"{blank}{row['caption'].strip()}{tokenizer.eos_token or ''}"
        answer = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
        ids = torch.cat([inputs["input_ids"], answer], 1)
        labels = torch.full_like(ids, -100)
        labels[:, -answer.shape[1] :] = answer
        extended = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
        for name, value in inputs.items():  # what has one value a token, as mm_token_type_ids
            if name not in extended and isinstance(value, Tensor) and value.shape == inputs["input_ids"].shape:
                extended[name] = torch.cat([value, torch.zeros_like(answer).to(value)], 1)
        return Caption(inputs | extended, key=f"{self.path}:{index}")


@lru_cache(8)
def _order(seed: int, count: int) -> Tensor:
    """Return the order (count,) of the rows of one turn through a file."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))
