"""Groups of a batch's rows, answered by one LLM call each.

Which rows form a group depends on their lines alone, so an answer depends neither on the process that computes it nor
on earlier runs. Threads decode videos ahead of the model.
"""

from __future__ import annotations

import hashlib
import os
from array import array
from collections import deque
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict, dataclass
from itertools import groupby, islice
from pathlib import Path
from typing import Any

import msgspec
import torch

from vidsieve.adapters.encoded import Encoded, on_device, stacked
from vidsieve.adapters.fingerprint import model_files_digest, policy_digest
from vidsieve.adapters.pruning import adapter_for
from vidsieve.adapters.trace import VideoTrace
from vidsieve.answering import chat
from vidsieve.compressors.base import Compressor
from vidsieve.errors import PromptError, VidsieveError
from vidsieve.evaluation.conditions import known_fields, method_for
from vidsieve.evaluation.experiment import versions
from vidsieve.evaluation.items import Item
from vidsieve.io.bounded import check_value, lines, opened, too_long
from vidsieve.io.limits import limits
from vidsieve.loading import is_testbed, load_model
from vidsieve.options import Options
from vidsieve.retention import Calibration, budget_text
from vidsieve.types import Selection, Tokens
from vidsieve.video import is_inside
from vidsieve.video.reading import Video, read_video

Outcome = tuple[bool, dict[str, Any]]
"""True for an answered row, and the row as it is written."""
Outcomes = Generator[tuple[int, list[Outcome]], None, None]
"""Numbers of groups, each with the outcomes of its rows."""


class BatchError(VidsieveError, RuntimeError):
    """The run cannot go on; rows answered so far are in the journal."""


# -- rows -----------------------------------------------------------------------------------------------------

_BLANK = b"\xef\xbb\xbf \t\r\n\v\f"
"""Bytes around the JSON of a line: a byte order mark and white space."""


@dataclass(frozen=True)
class BatchRow:
    """One row of the input: its line number from 1 and all its fields, None if the line is not a JSON object.

    `video` and `prompt` are a path and a text; or `fault` is the reason why the row cannot be answered.
    """

    line: int
    fields: Mapping[str, Any] | None
    video: str = ""
    prompt: str = ""
    fault: str = ""

    def outcome(self, **results: Any) -> Outcome:
        """Return the row with its results; fields that have the name of a result move to ``given``."""
        fields: dict[str, Any] = {"line": self.line} if self.fields is None else dict(self.fields)
        given = {name: fields.pop(name) for name in results if name in fields}
        if given:
            if "given" in fields:
                given["given"] = fields.pop("given")
            fields["given"] = given
        return "answer" in results, fields | results


class RowQuestion(msgspec.Struct):
    """The fields of a row that are read."""

    video: str = ""
    question: str = ""
    options: list[str] | None = None


def read_row(text: bytes, line: int, root: Path, confined: bool = False) -> BatchRow:
    """Return the row in a line of JSON; its prompt lists options that have letters, as `vidsieve eval` does.

    With `confined`, its video must lie in or below `root`, after symbolic links.
    """
    fields = None
    try:
        if len(text) > limits.row:
            raise ValueError(too_long(limits.row))
        decoded = msgspec.json.decode(text.strip(_BLANK))
        check_value(decoded)
        fields = decoded
        row = msgspec.convert(fields, RowQuestion)
        for name, value in (("video", row.video), ("question", row.question)):
            if not value.strip():
                raise ValueError(f"it has no {name}")
        if confined and not is_inside(root / row.video, root):
            raise ValueError(f"{row.video} lies outside {root}, the folder that paths start from")
        prompt, options = row.question, Options.parse(row.options) if row.options else None
        if options is not None and options.lettered:
            prompt = Item("", Path(), row.question, options.texts, "").prompt()
        return BatchRow(line, fields, str(root / row.video), prompt)
    except (ValueError, RecursionError) as error:
        if isinstance(fields, dict):
            return BatchRow(line, fields, fault=f"{error!s:.300}")
        return BatchRow(line, None, fault=f"line {line} is not a JSON object: {error}")


class Rows:
    """The rows of a file of JSON lines, read in groups of `size`; memory holds two numbers for each group.

    `root` and `confined` are as in `read_row`; `count` and `groups` are the numbers of rows and groups, `digest` is a
    hash of the file's bytes.

    Raises
    ------
    BatchError
        If the file cannot be read or has no rows.
    """

    def __init__(self, path: Path, root: Path, size: int, confined: bool = False) -> None:
        self.path, self.root, self.size, self.confined = path, root, size, confined
        self.count, self._starts, self._lines, start = 0, array("Q"), array("Q"), 0
        try:
            with opened(path, BatchError) as file:
                self._status = path.stat()
                digest = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16))
                file.seek(0)
                for number, line, length in lines(file, limits.row):
                    if line.strip(_BLANK):
                        if self.count % size == 0:
                            self._starts.append(start)
                            self._lines.append(number)
                        self.count += 1
                    start += length
        except OSError as error:
            raise BatchError(f"cannot read {path}: {error.strerror}") from None
        if not self.count:
            raise BatchError(f"{path} holds no rows")
        self.groups, self.digest = len(self._starts), digest.hexdigest()

    def group(self, number: int) -> list[BatchRow]:
        """Return the rows of a group.

        Raises
        ------
        BatchError
            If the file has changed.
        """
        self.check()
        with self.path.open("rb") as file:
            file.seek(self._starts[number])
            first = self._lines[number] - 1
            rows = ((first + line, text) for line, text, _ in lines(file, limits.row) if text.strip(_BLANK))
            return [read_row(text, line, self.root, self.confined) for line, text in islice(rows, self.size)]

    def check(self) -> None:
        """Raise BatchError if the file has changed since it was first read."""
        first, now = self._status, self.path.stat() if os.path.isfile(self.path) else None
        if now is None or (now.st_size, now.st_mtime_ns) != (first.st_size, first.st_mtime_ns):
            raise BatchError(f"{self.path} has changed during the run: restore it, or name another output")


# -- settings -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class BatchSettings:
    """The settings that answers depend on.

    Parameters
    ----------
    model, layout, device, dtype : as `load_model`
    method, policy, earliest : as `vidsieve ask`; ``"full"`` keeps all tokens
    retention : float, Tokens or Calibration
    frames : int
        Taken evenly; with `fps` the largest number.
    fps : float, optional
    max_new_tokens : int
    batch : int
        Prompts in one call of the LLM.
    seed : int
    """

    model: str = "testbed"
    method: str = "divprune"
    policy: str | None = None
    retention: float | Tokens | Calibration = 0.25
    earliest: bool = False
    frames: int = 16
    fps: float | None = None
    max_new_tokens: int = 64
    batch: int = 1
    seed: int = 0
    layout: str | None = None
    device: str = "cpu"
    dtype: str | None = None

    def compressor(self) -> Compressor | None:
        """Return the method; None if all tokens are kept.

        Raises
        ------
        UnknownNameError, PolicyError
        """
        if self.method == "full":
            return None
        fields = known_fields(self.method, earliest=self.earliest)
        return method_for(self.method, self.model, self.policy, **fields).with_retention(self.retention)

    def described(self) -> dict[str, Any]:
        """Return the settings as values for JSON, with digests of the model's files and the policy, and versions."""
        method, kept = self.compressor(), self.retention
        values = {
            "method": "full" if method is None else method.describe(),
            "retention": budget_text(kept),
            "policy": "" if method is None else policy_digest(method),
            "model_digest": "" if is_testbed(self.model) else model_files_digest(self.model),
        }
        return asdict(self) | values | {"versions": versions()}

    def read(self, row: BatchRow) -> Video | str:
        """Return the frames of a row's video, or the reason why there are none."""
        if row.fault:
            return row.fault
        try:
            if self.fps is None:
                return read_video(row.video, frames=self.frames)
            return read_video(row.video, fps=self.fps, max_frames=self.frames)
        except ROW_ERRORS as error:
            return failure(error)


# -- answers --------------------------------------------------------------------------------------------------

ROW_ERRORS = (VidsieveError, ValueError, RuntimeError, OSError, MemoryError)
"""Errors that fail a row, unless `failure` raises."""


def failure(error: Exception) -> str:
    """Return the reason why a row failed.

    Raises
    ------
    BatchError
        If other rows would fail too: the device is out of memory or lost.
    """
    reason = " ".join(str(error).split())[:500] or type(error).__name__
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in reason:
        raise BatchError(
            "out of memory: what was answered is in the journal; another output with fewer --frames, a smaller "
            "--batch or a lower --retention takes less"
        ) from error
    lost = getattr(torch, "AcceleratorError", ())  # absent in the oldest torch that is supported
    if isinstance(error, lost) or "CUDA error" in reason or "device-side assert" in reason:
        raise BatchError(f"the device failed ({reason[:200]}): what was answered is in the journal") from error
    return reason


@dataclass(frozen=True)
class BatchPrompt:
    """A row's encoded prompt, the number of frames in it, and what the method selected before the LLM."""

    row: BatchRow
    frames: int
    encoded: Encoded
    selected: tuple[list[Selection], list[VideoTrace]]


class Answerer:
    """A model and a method that answer groups of rows.

    Raises
    ------
    ModelError, UnsupportedModelError, UnknownNameError, PolicyError
        If they cannot be loaded.
    StageError, NeedError, PolicyMismatchError
        If the method cannot run on the model.
    """

    def __init__(self, settings: BatchSettings) -> None:
        self.settings, self.method = settings, settings.compressor()
        model, self.processor = load_model(settings.model, settings.layout, settings.dtype, settings.device)
        self.adapter = adapter_for(model)
        if self.method is not None:
            self.adapter.check(self.method)
        self.window = int(getattr(model.config.get_text_config(), "max_position_embeddings", 0) or 0)

    @torch.no_grad()
    def __call__(self, group: Iterable[tuple[BatchRow, Video | str]]) -> list[Outcome]:
        """Return the outcome of each row of a group; a video is freed when its prompt is encoded.

        Raises
        ------
        BatchError
            If the device is out of memory or lost.
        """
        results = [self._prompt(row, video) for row, video in group]
        answers = iter(self._answers([result for result in results if isinstance(result, BatchPrompt)]))
        return [next(answers) if isinstance(result, BatchPrompt) else result for result in results]

    def _prompt(self, row: BatchRow, video: Video | str) -> BatchPrompt | Outcome:
        """Return a row's prompt, encoded by itself, or the row's failure."""
        if isinstance(video, str):
            return row.outcome(reason=video)
        method = self.method
        try:
            inputs = on_device(chat(self.processor, video, row.prompt), self.adapter.device)
            encoded = self.adapter.encode_for(inputs, method)
            rotary = encoded.positions[self.adapter.position_rows]  # the row of plain counts turns nothing
            end = int(rotary.max()) + 1 + self.settings.max_new_tokens
            if 0 < self.window < end:
                raise PromptError(
                    f"prompt and answer reach position {end}, and the model knows {self.window}: take fewer frames"
                )
            selected = self.adapter.select(encoded, method, self._generator(row))
        except ROW_ERRORS as error:
            return row.outcome(reason=failure(error))
        return BatchPrompt(row, len(video.pixels), encoded, selected)

    def _generator(self, row: BatchRow) -> torch.Generator:
        """Return a row's own random numbers, independent of other rows."""
        seed = hashlib.blake2b(f"{self.settings.seed} {row.line}".encode(), digest_size=4).digest()
        return torch.Generator().manual_seed(int.from_bytes(seed, "little"))

    def _answers(self, prompts: Sequence[BatchPrompt]) -> list[Outcome]:
        """Return the outcomes of prompts, answered together, or one by one if that fails."""
        try:
            return self._generate(prompts) if prompts else []
        except ROW_ERRORS as error:
            reason = failure(error)
        if len(prompts) == 1:
            return [prompts[0].row.outcome(reason=reason)]
        return [outcome for prompt in prompts for outcome in self._answers([prompt])]

    def _generate(self, prompts: Sequence[BatchPrompt]) -> list[Outcome]:
        encoded = stacked([prompt.encoded for prompt in prompts])
        selections = [selection for prompt in prompts for selection in prompt.selected[0]]
        traces = [trace for prompt in prompts for trace in prompt.selected[1]]
        plan = self.adapter.plan(encoded, self.method, selected=(selections, traces))
        with plan.acting():
            ids = self.adapter.model.generate(
                **plan.inputs, max_new_tokens=self.settings.max_new_tokens, do_sample=False
            )
        kept = [trace.kept for trace in plan.traces] or [selection.num_kept for selection in selections]
        texts = self.processor.batch_decode(ids[:, plan.kept_positions.shape[1] :], skip_special_tokens=True)
        return [
            prompt.row.outcome(
                answer=text.strip(),
                kept=count,
                total=sum(span.features.prompted.num_tokens for span in prompt.encoded.videos),
                prompt_tokens=length,
                frames=prompt.frames,
            )
            for prompt, text, count, length in zip(prompts, texts, kept, plan.prompt_tokens, strict=True)
        ]


def answer_groups(
    rows: Rows, groups: Iterable[int], settings: BatchSettings, readers: int, answerer: Answerer | None = None
) -> Outcomes:
    """Yield the outcomes of groups, answered in this process by `answerer`, or by a model that is loaded first."""
    answerer = answerer or Answerer(settings)
    wanted = ((group, row) for group in groups for row in rows.group(group))
    with closing(read_ahead(wanted, settings.read, readers)) as videos:
        for group, part in groupby(videos, key=lambda item: item[0]):
            yield group, answerer((row, video) for _, row, video in part)


def read_ahead(
    rows: Iterable[tuple[int, BatchRow]], read: Callable[[BatchRow], Video | str], readers: int
) -> Generator[tuple[int, BatchRow, Video | str], None, None]:
    """Yield rows with their videos, decoded in threads: at most 2 × `readers` are decoded ahead.

    Consecutive rows of one video share it.
    """
    waiting: deque[tuple[int, BatchRow, Future[Video | str]]] = deque()
    pool = ThreadPoolExecutor(readers, "vidsieve-batch")
    try:
        for group, row in rows:
            shared = bool(waiting and row.video) and row.video == waiting[-1][1].video
            waiting.append((group, row, waiting[-1][2] if shared else pool.submit(read, row)))
            if len(waiting) > 2 * readers:
                group, row, video = waiting.popleft()
                yield group, row, video.result()
        while waiting:
            group, row, video = waiting.popleft()
            yield group, row, video.result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
