"""Videos without end: the best tokens of a stream in bounded memory, and a question at any time."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import BatchFeature

from vidsieve.adapters.adapter import Adapter
from vidsieve.adapters.drop import kept_columns
from vidsieve.adapters.encoded import Encoded, VideoFeatures, VideoSpan, on_device
from vidsieve.adapters.pruning import adapter_with
from vidsieve.answering import Answer, chat, reply
from vidsieve.compressors.base import Compressor, ScoreCompressor
from vidsieve.errors import StreamError
from vidsieve.io.tensors import checksum, load_tensors, save_tensors
from vidsieve.selection import top_indices
from vidsieve.types import ENCODER_NEEDS, READS_QUESTION, Selection, Stage, TokenGrid, Tokens, VideoTokens
from vidsieve.video.reading import Video

FORMAT = 1
_GOLDEN = 0.6180339887498949


def _random(frame: int, count: int, seed: int) -> Tensor:
    return torch.from_numpy(np.random.default_rng((seed, frame)).random(count, dtype=np.float32))


def _uniform(frame: int, count: int, seed: int) -> Tensor:
    return torch.full((count,), frame * _GOLDEN % 1.0)


def _recent(frame: int, count: int, seed: int) -> Tensor:
    return torch.full((count,), float(frame))


BASELINES: Mapping[str, Callable[[int, int, int], Tensor]] = {"random": _random, "uniform": _uniform, "recent": _recent}
"""Scores (n,) of a frame's n tokens by its number and a seed: what stays is a random sample of all tokens, whole frames
that are spread evenly over the stream (multiples of the golden ratio), or the last frames."""


# -- the memory -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StreamTokens:
    """The tokens of a stream that are kept, in the order of frame and place.

    Parameters
    ----------
    scores : Tensor, (M,), float32
        Higher = keep.
    frames, places : Tensor, (M,), int64
        Number of each token's frame in the stream, and its raster index in the frame.
    embeds : Tensor, (M, D)
    deep : tuple of Tensor, (M, D) each
        As in `VideoFeatures`.
    """

    scores: Tensor
    frames: Tensor
    places: Tensor
    embeds: Tensor
    deep: tuple[Tensor, ...] = ()

    def __len__(self) -> int:
        return len(self.scores)

    def at(self, indices: Tensor) -> StreamTokens:
        """Return the tokens at `indices` (K,) int64."""
        return StreamTokens(
            self.scores[indices],
            self.frames[indices],
            self.places[indices],
            self.embeds[indices],
            tuple(layer[indices] for layer in self.deep),
        )

    def merged(self, new: StreamTokens, capacity: int) -> StreamTokens:
        """Return the `capacity` tokens of the highest scores among these and later ones; equal scores: earlier first.

        Merging piece by piece keeps the same tokens as one choice among all of them.
        """
        both = StreamTokens(
            torch.cat([self.scores, new.scores]),
            torch.cat([self.frames, new.frames]),
            torch.cat([self.places, new.places]),
            torch.cat([self.embeds, new.embeds]),
            tuple(torch.cat(pair) for pair in zip(self.deep, new.deep, strict=True)),
        )
        return both if len(both) <= capacity else both.at(top_indices(both.scores, capacity))


@dataclass(frozen=True)
class _State:
    """What a stream holds: a new one replaces it with every frame.

    `times` (F, k) are the seconds of the k pictures of each of the frames `numbers` (F,): those that hold tokens, and,
    as long as a prompt could hold every token of the stream, all of them. `last` (H·W, D) is the last frame, `tail`
    (1, D) the newline of families that have one. `spacing` is the mean time between pictures.
    """

    memory: StreamTokens
    numbers: Tensor
    times: Tensor
    last: Tensor
    tail: Tensor
    grid: TokenGrid
    per_row: bool
    seen: int
    start: float
    spacing: float


@dataclass(frozen=True)
class MemoryTrace:
    """What a stream held when a question was asked.

    Parameters
    ----------
    seconds : tuple of float
        Times of the first and the last picture.
    frames_seen, frames_held : int
        Frames of the stream so far, and those of them that have tokens in memory. A frame is one of the token grid: in
        Qwen's families two pictures.
    tokens, capacity : int
        Tokens in memory, and the most that it holds.
    read : int
        Tokens of the memory that the LLM read: fewer where the stream has a `reader`.
    positions : str
        "original" or "in order", see `Stream`.
    """

    seconds: tuple[float, float]
    frames_seen: int
    frames_held: int
    tokens: int
    capacity: int
    read: int
    positions: str

    def __str__(self) -> str:
        first, last = self.seconds
        return (
            f"{first:g} to {last:g} s: {self.tokens} of at most {self.capacity} tokens, of {self.frames_held} of "
            f"{self.frames_seen} frames; {self.read} read by the LLM, positions {self.positions}"
        )


@dataclass(frozen=True)
class StreamAnswer(Answer):
    """An answer about a stream, and what the stream held."""

    memory: MemoryTrace = field(kw_only=True)

    def as_dict(self) -> dict[str, Any]:
        """Return the answer as plain values for JSON."""
        return super().as_dict() | {"memory": vars(self.memory) | {"seconds": list(self.memory.seconds)}}


# -- the stream -------------------------------------------------------------------------------------------------------


class Stream:
    """A video without end: frames are pushed as they come, and questions asked at any time.

    Every frame is encoded once, by itself, and its tokens are scored; of all tokens so far the `memory` highest stay,
    with their features, places and times. What is evicted is gone. A question is answered from what is in memory, in
    work that does not grow with the stream.

    Positions: as long as the prompt with every token of the stream would fit ``max_position_embeddings``, kept tokens
    have their places in it, and an answer is the one that `answer` gives with these tokens ("original"). Beyond that
    the prompt is the one of a video of only those frames that have tokens, in order, with their times in words where
    the family writes them; families that count positions token by token count the kept ones ("in order").

    Parameters
    ----------
    model : a transformers model whose family encodes frames one by one (`Stage.FRAME` in its adapter's `fronts`)
    processor : its processor
    compressor : ScoreCompressor, or "random", "uniform" or "recent"
        Scores the tokens of each frame as it comes; its score may depend on the frame before, and no other (`local`).
        Its retention is of no consequence but for `sieve`, which scores for one. The names are the three baselines:
        a random sample of all tokens, frames spread evenly, the last frames.
    memory : int
        Most tokens that are kept.
    reader : Compressor, optional
        Chooses among the tokens in memory at each question, at its own retention, and may read the question; of a
        count that memory does not hold, all. Until the first eviction it sees the video's grid, then the tokens as
        those of one frame.
    seed : int
        Of the baseline "random", and of a reader that draws.

    Raises
    ------
    StreamError
        If the family, the compressor or the memory cannot serve a stream.
    UnsupportedModelError, NeedError, PolicyMismatchError
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        compressor: ScoreCompressor | str,
        memory: int = 2048,
        *,
        reader: Compressor | None = None,
        seed: int = 0,
    ) -> None:
        self.adapter: Adapter = adapter_with(model, processor)
        self.processor, self.compressor, self.reader, self.seed = processor, compressor, reader, seed
        if Stage.FRAME not in self.adapter.fronts:
            raise StreamError(
                f"the {self.adapter.family} adapter does not say that frames are encoded one by one: use a model of "
                "another family, or ask about files"
            )
        _check_evictor(self.adapter, compressor)
        if reader is not None:
            _check_reader(self.adapter, reader)
        self._range = _trained_range(self.adapter)
        if isinstance(memory, bool) or not isinstance(memory, int) or not 0 < memory < self._range:
            raise StreamError(
                f"memory must be a whole number of tokens from 1 to {self._range - 1}, as this model was trained for "
                f"{self._range} positions; got {memory!r}"
            )
        if seed < 0:
            raise StreamError(f"seed must not be negative, got {seed}")
        self.memory = memory
        reading = getattr(processor, "video_processor", None)
        if reading is None:
            raise StreamError(f"{type(processor).__name__} has no video processor: pass the processor of the model")
        vision = self.adapter.model.config.vision_config
        self._pictures = getattr(reading, "temporal_patch_size", 1) * getattr(vision, "temporal_merge_size", 1)
        self._state: _State | None = None
        self._waiting: list[tuple[float, np.ndarray]] = []
        self._size: tuple[int, int] | None = None
        self._last_time = -math.inf

    # -- frames -------------------------------------------------------------------------------------------------

    def push(self, frames: Any, seconds: float | Sequence[float]) -> None:
        """Take the next pictures of the stream.

        Where a family merges pictures in time, two in Qwen's, an odd one waits for the next; for a question that is
        asked meanwhile it is repeated, as the family's processor does at the end of a video.

        Parameters
        ----------
        frames : array (T, H, W, 3) uint8 RGB, or a list of PIL images
        seconds : their times, T numbers that rise, later than all before

        Raises
        ------
        StreamError
            If sizes change, times do not rise, or these are no frames.
        """
        pixels, times = _pixels(frames), np.atleast_1d(np.asarray(seconds, dtype=np.float64))
        if times.shape != (len(pixels),):
            raise StreamError(f"{len(pixels)} frames need {len(pixels)} times, got {times.size}")
        if not np.isfinite(times).all() or (np.diff(times, prepend=self._last_time) <= 0).any():
            raise StreamError(f"times must rise: got {times.tolist()} after {self._last_time:g} s")
        if self._size not in (None, pixels.shape[1:3]):
            raise StreamError(
                f"frames of one size are needed: got {pixels.shape[1:3]} after {self._size}; resize them, or begin "
                "another stream"
            )
        self._size = pixels.shape[1:3]
        for picture, time in zip(pixels, times.tolist(), strict=True):
            state, waiting = self._state, [*self._waiting, (time, np.array(picture))]
            if len(waiting) == self._pictures:
                state, waiting = self._advanced(waiting), []
            self._state, self._waiting, self._last_time = state, waiting, time

    @torch.no_grad()
    def _advanced(self, pictures: Sequence[tuple[float, np.ndarray]]) -> _State:
        """Return the state after one more frame, of these pictures and their times; the last fills up what is missing.

        Raises
        ------
        StreamError
            If the frame has other tokens than those before.
        """
        filled = [*pictures, *[pictures[-1]] * (self._pictures - len(pictures))]
        times = [time for time, _ in filled]
        frame = self._encoded(np.stack([picture for _, picture in filled]), times)
        device, before = frame.embeds.device, self._state
        number = 0 if before is None else before.seen
        count = frame.grid.num_tokens
        if before is not None and before.grid != frame.grid:
            raise StreamError(
                f"a frame became {frame.grid} tokens after {before.grid}: go on with the processor that the stream "
                "began with"
            )
        new = StreamTokens(
            self._scores(frame, number, None if before is None else before.last),
            torch.full((count,), number, device=device),
            torch.arange(count, device=device),
            frame.embeds,
            frame.deep,
        )
        numbers, moments = torch.tensor([number]), torch.tensor([times], dtype=torch.float64)
        start = times[0]
        if before is None:
            memory = new.merged(new.at(new.places[:0]), self.memory)
        else:
            memory, start = before.memory.merged(new, self.memory), before.start
            numbers, moments = torch.cat([before.numbers, numbers]), torch.cat([before.times, moments])
        if not self._could_hold((number + 1) * count):
            held = torch.isin(numbers, memory.frames.cpu())
            numbers, moments = numbers[held], moments[held]
        taken = number * self._pictures + len(pictures)
        spacing = (times[-1] - start) / (taken - 1) if taken > 1 else 1.0
        tail = frame.tail[:1]
        return _State(
            memory, numbers, moments, frame.embeds, tail, frame.grid, frame.per_row, number + 1, start, spacing
        )

    def _encoded(self, pixels: np.ndarray, times: Sequence[float]) -> VideoFeatures:
        """Return the pictures of one frame of the grid, encoded by themselves."""
        needs = frozenset() if isinstance(self.compressor, str) else self.compressor.needs
        inputs = on_device(chat(self.processor, _video(pixels, times), "?"), self.adapter.device)
        videos = self.adapter.features(inputs, needs)
        frame = videos[0]
        if len(videos) > 1 or frame.grid.frames != 1 or frame.grid.places is not None:
            raise StreamError(
                f"{len(pixels)} pictures of {self.adapter.family} became {frame.grid} tokens, not one frame of a grid: "
                "switch off what the processor does to whole videos"
            )
        if not torch.equal(frame.tail, frame.tail[:1].expand_as(frame.tail)):
            raise StreamError(
                f"the newlines of {self.adapter.family} differ from row to row, which a stream cannot keep"
            )
        return frame

    def _scores(self, frame: VideoFeatures, number: int, last: Tensor | None) -> Tensor:
        """Return the scores (n,) float32 of a frame's n tokens, given the frame before."""
        count, device = frame.grid.num_tokens, frame.embeds.device
        if isinstance(self.compressor, str):
            return BASELINES[self.compressor](number, count, self.seed).to(device)
        embeds = frame.embeds if last is None else torch.cat([last, frame.embeds])
        grid = replace(frame.grid, frames=1 if last is None else 2)
        video = VideoTokens(embeds, grid, torch.zeros(1, len(embeds), dtype=torch.int64, device=device))
        with torch.autocast(device.type, enabled=False):
            scores = self.compressor.score(video).float()[-count:]
        if scores.shape != (count,) or not bool(torch.isfinite(scores).all()):
            raise StreamError(f"{self.compressor.name} gave no finite score for each token of a frame")
        return scores

    # -- questions ------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def ask(self, question: str, *, max_new_tokens: int = 64) -> StreamAnswer:
        """Return the greedy answer to a question about what has been pushed so far; the stream stays as it is.

        Raises
        ------
        StreamError
            If nothing was pushed, or the prompt is longer than the model was trained for.
        PromptError, BudgetError, NeedError
        """
        state = self._advanced(self._waiting) if self._waiting else self._state
        if state is None:
            raise StreamError("nothing has been pushed: push frames, then ask")
        encoded, positions = self._prompt(state, question)
        reader, tokens = self.reader, len(state.memory)
        if reader is not None and isinstance(reader.retention, Tokens) and reader.retention.count >= tokens:
            reader = None
        answer = reply(self.adapter, self.processor, encoded, reader, max_new_tokens=max_new_tokens, seed=self.seed)
        trace = MemoryTrace(
            (state.start, self._last_time),
            state.seen,
            len(torch.unique(state.memory.frames)),
            tokens,
            self.memory,
            sum(video.kept for video in answer.traces) or tokens,
            positions,
        )
        return StreamAnswer(**(vars(answer) | {"method": self.describe()}), memory=trace)

    def describe(self) -> str:
        """Return the names of what evicts and what reads, for traces and tables."""
        evicts = self.compressor if isinstance(self.compressor, str) else self.compressor.describe()
        return f"{evicts} in {self.memory} tokens" + ("" if self.reader is None else f", {self.reader.describe()}")

    def _prompt(self, state: _State, question: str) -> tuple[Encoded, str]:
        """Return the prompt that asks a question about the memory, and by which rule its positions are."""
        rows = self.adapter.position_rows
        if self._could_hold(state.seen * state.grid.per_frame):
            encoded = self._video_prompt(state, state.numbers, question)
            if encoded.input_ids.shape[1] <= self._range and int(encoded.positions[rows].max()) < self._range:
                return self._kept(encoded, state, state.numbers), "original"
        held = torch.unique(state.memory.frames).cpu()
        encoded = self._kept(self._video_prompt(state, held, question), state, held)
        if rows == slice(None):
            encoded = replace(
                encoded, positions=torch.arange(encoded.input_ids.shape[1]).to(encoded.positions)[None, None]
            )
        highest = int(encoded.positions[rows].max())
        if highest >= self._range:
            raise StreamError(
                f"the prompt of {len(held)} frames with tokens reaches position {highest:,}, and this model was "
                f"trained for {self._range:,}: keep fewer tokens in memory (now {self.memory})"
            )
        return encoded, "in order"

    def _video_prompt(self, state: _State, numbers: Tensor, question: str) -> Encoded:
        """Return the prompt about a video of frames `numbers` (F,), located; its features have shapes and no values."""
        times = state.times[torch.isin(state.numbers, numbers)]
        # The processor writes the prompt of a video whose pixels are already known, by their shapes alone.
        told = copy.copy(self.processor)
        told.video_processor = _Replay(self.processor.video_processor, self.adapter, self._one_frame, len(times))
        blank = np.broadcast_to(np.uint8(0), (times.numel(), 1, 1, 3))
        inputs = chat(told, _video(blank, times.flatten().tolist()), question, state.spacing)
        grid = replace(state.grid, frames=len(times))
        width, tails = state.memory.embeds.shape[1], len(times) * grid.height if state.per_row else len(state.tail)
        hollow = torch.empty(grid.num_tokens, width, device="meta", dtype=state.memory.embeds.dtype)
        video = VideoFeatures(
            hollow,
            grid,
            hollow[:1].expand(tails, -1) if tails else hollow[:0],
            tuple(hollow for _ in state.memory.deep),
            per_row=state.per_row,
        )
        pixels = {name for name, value in inputs.items() if isinstance(value, Tensor) and value.is_meta}
        rest = {name: value for name, value in inputs.items() if name not in pixels}
        rest["mm_encoder_outputs"] = self.adapter.ready_features(video)
        return self.adapter.encode(on_device(rest, self.adapter.device))

    @cached_property
    def _one_frame(self) -> dict[str, Any]:
        """What the video processor returns of one frame of the stream's size, pixels as shapes without values."""
        assert self._size is not None
        record = _Record(self.processor.video_processor)
        recording = copy.copy(self.processor)
        recording.video_processor = record
        blank = np.zeros((self._pictures, *self._size, 3), np.uint8)
        chat(recording, _video(blank, [float(number) for number in range(self._pictures)]), "?")
        return record.outputs

    def _kept(self, encoded: Encoded, state: _State, numbers: Tensor) -> Encoded:
        """Return the prompt with just the columns of tokens in memory, and their features in place."""
        memory, grid, (span,) = state.memory, replace(state.grid, frames=len(numbers)), encoded.videos
        frame = torch.searchsorted(numbers, memory.frames.cpu())
        places = frame * grid.per_frame + memory.places.cpu()
        selection = Selection(places.to(span.columns.device))
        columns = kept_columns(encoded, [[selection]], [0])[0]
        newlines = span.tail_columns[span.features.kept_tail(selection.indices)]
        whole = len(memory) == grid.num_tokens
        features = VideoFeatures(
            memory.embeds,
            grid if whole else TokenGrid(1, 1, len(memory)),
            state.tail.expand(len(newlines), -1),
            memory.deep,
            per_row=state.per_row and whole,
        )
        video = VideoSpan(
            0,
            torch.searchsorted(columns, span.columns[selection.indices]),
            torch.searchsorted(columns, newlines),
            features,
            span.surplus_columns[:0],
        )
        rest = {
            name: value[:, columns] if name in self.adapter.column_keys else value
            for name, value in encoded.rest.items()
        }
        ids, mask = encoded.input_ids[:, columns], encoded.attention_mask[:, columns]
        return Encoded(ids, mask, encoded.positions[..., columns], (video,), rest)

    def _could_hold(self, tokens: int) -> bool:
        """True if a prompt with so many video tokens could lie within the model's range."""
        return tokens <= self._range

    # -- files ----------------------------------------------------------------------------------------------------

    def save(self, path: str | Path) -> None:
        """Write the stream into one safetensors file, whole or not at all; pictures that wait are in it.

        Raises
        ------
        StreamError
            If nothing was pushed.
        OutputError
            If the file cannot be written.
        """
        if self._size is None:
            raise StreamError("nothing has been pushed: there is nothing to save")
        tensors: dict[str, Tensor] = {}
        if self._waiting:
            tensors["waiting"] = torch.from_numpy(np.stack([picture for _, picture in self._waiting]))
        header: dict[str, Any] = self._identity() | {
            "format": FORMAT,
            "memory": self.memory,
            "seed": self.seed,
            "size": list(self._size),
            "waiting": [time for time, _ in self._waiting],
            "last_time": self._last_time,
        }
        if self._state is not None:
            state, memory = self._state, self._state.memory
            header |= {"seen": state.seen, "start": state.start, "spacing": state.spacing, "per_row": state.per_row}
            header["grid"] = [state.grid.height, state.grid.width]
            tensors |= {name: getattr(memory, name) for name in ("scores", "frames", "places", "embeds")}
            tensors |= {f"deep.{number}": layer for number, layer in enumerate(memory.deep)}
            tensors |= {name: getattr(state, name) for name in ("numbers", "times", "last", "tail")}
        save_tensors(Path(path), tensors, header)

    def _identity(self) -> dict[str, Any]:
        """Return what a saved stream must have in common with the one that goes on with it."""
        method = self.compressor if isinstance(self.compressor, str) else self.compressor.describe()
        policy = getattr(self.compressor, "policy", None)
        digest = "" if policy is None else checksum({n: v.cpu() for n, v in policy.state_dict().items()}, {})
        return {
            "kind": "stream",
            "family": self.adapter.family,
            "width": self.adapter.hidden_size,
            "dtype": str(self.adapter.model.dtype),
            "method": method,
            "policy": digest,
        }

    @classmethod
    def load(
        cls,
        path: str | Path,
        model: Any,
        processor: Any,
        compressor: ScoreCompressor | str,
        *,
        reader: Compressor | None = None,
    ) -> Self:
        """Return the stream in a file, to go on with the model and the compressor that it was made with.

        Raises
        ------
        StreamError
            If the file is no stream, damaged, of a newer format, or of another model or compressor.
        """
        path = Path(path)
        try:
            header, tensors, _ = load_tensors(path)
        except ValueError as error:
            raise StreamError(f"{path} is no readable stream ({error!s:.300}): save it again") from None
        if header.get("kind") != "stream":
            raise StreamError(f"{path} is no stream: give a file of Stream.save")
        if header["format"] > FORMAT:
            raise StreamError(f"{path} is in format {header['format']}, this version reads {FORMAT}: upgrade vidsieve")
        stream = cls(model, processor, compressor, header["memory"], reader=reader, seed=header["seed"])
        for name, mine in stream._identity().items():
            if header[name] != mine:
                raise StreamError(f"{path} was made with the {name} {header[name]!r}, this is {mine!r}: use the same")
        height, width = header["size"]
        stream._size, stream._last_time = (height, width), header["last_time"]
        if header["waiting"]:
            stream._waiting = list(zip(header["waiting"], tensors["waiting"].numpy().copy(), strict=True))
        if "grid" in header:
            device = stream.adapter.device
            on = {name: value.to(device) for name, value in tensors.items() if name not in ("numbers", "times")}
            deep = tuple(on[f"deep.{number}"] for number in range(sum(name.startswith("deep.") for name in on)))
            memory = StreamTokens(on["scores"], on["frames"], on["places"], on["embeds"], deep)
            stream._state = _State(
                memory,
                tensors["numbers"],
                tensors["times"],
                on["last"],
                on["tail"],
                TokenGrid(1, *header["grid"]),
                header["per_row"],
                header["seen"],
                header["start"],
                header["spacing"],
            )
        return stream


# -- parts ------------------------------------------------------------------------------------------------------------


class _Record:
    """A video processor that remembers the shapes of what it returned last."""

    def __init__(self, real: Any) -> None:
        self._real = real
        self.outputs: dict[str, Any] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        returned = self._real(*args, **kwargs)
        self.outputs = {name: _hollow(value) for name, value in returned.items() if isinstance(value, Tensor)}
        return returned


class _Replay:
    """A video processor that returns shapes of a video of `count` frames like `one`, at no cost."""

    def __init__(self, real: Any, adapter: Adapter, one: Mapping[str, Any], count: int) -> None:
        self._real, self._adapter, self._one, self._count = real, adapter, one, count
        self.vidsieve_frame_pixels = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    def __call__(self, *args: Any, video_metadata: Any, **kwargs: Any) -> BatchFeature:
        outputs = self._adapter.frames_of(self._one, 0, torch.zeros(self._count, dtype=torch.int64))
        return BatchFeature({**outputs, "video_metadata": video_metadata})


class _Shape(Tensor):
    """A tensor without values, which processors that work with NumPy read as zeros."""

    def cpu(self, *args: Any, **kwargs: Any) -> Tensor:
        """Return the tensor itself."""
        return self

    def numpy(self, *args: Any, **kwargs: Any) -> Any:
        """Return zeros in the memory of one."""
        return np.broadcast_to(np.float32(0), self.shape)


def _hollow(value: Tensor) -> Tensor:
    """Return pixels as a tensor without values; sizes, which prompts are made from, as they are."""
    pixels = value.is_floating_point() or value.ndim > 2
    return value.to("meta").as_subclass(_Shape) if pixels else value


def _video(pixels: np.ndarray, times: Sequence[float]) -> Video:
    """Return pictures and their times as a video for processors."""
    spacing = (times[-1] - times[0]) / (len(times) - 1) if times[-1] > times[0] else 1.0
    size = (pixels.shape[1], pixels.shape[2])
    return Video(pixels, np.asarray(times), (), times[-1] - times[0] + spacing, 1 / spacing, len(pixels), size)


def _pixels(frames: Any) -> np.ndarray:
    """Return frames as one array (T, H, W, 3) uint8."""
    if isinstance(frames, list | tuple) and frames and all(isinstance(frame, Image.Image) for frame in frames):
        if len({frame.size for frame in frames}) > 1:
            raise StreamError("frames of one size are needed: resize the images to one")
        frames = np.stack([np.asarray(frame.convert("RGB")) for frame in frames])
    pixels = np.asarray(frames)
    if pixels.ndim != 4 or pixels.shape[3] != 3 or pixels.dtype != np.uint8 or not pixels.size:
        raise StreamError(
            f"frames must be a uint8 array (T, H, W, 3) or a list of PIL images, got {pixels.dtype} {pixels.shape}"
        )
    return pixels


def _trained_range(adapter: Adapter) -> int:
    """Return the number of positions that the LLM was trained for."""
    limit = getattr(adapter.model.config.get_text_config(), "max_position_embeddings", None)
    if not isinstance(limit, int):
        raise StreamError(f"the configuration of {adapter.family} states no max_position_embeddings: set it")
    return limit


def _check_evictor(adapter: Adapter, compressor: ScoreCompressor | str) -> None:
    """Refuse a compressor that cannot score a frame when it comes."""
    if isinstance(compressor, str):
        if compressor not in BASELINES:
            raise StreamError(
                f"{compressor!r} is no baseline: give one of {', '.join(BASELINES)}, or a method by vidsieve.load"
            )
        return
    name = compressor.name
    if READS_QUESTION & compressor.needs:
        other = (
            "load it with variant='blind'"
            if "blind" in compressor.variants
            else "use one that does not, as score, to evict, and this one as reader="
        )
        raise StreamError(f"{name} reads the question, which is not known when tokens are evicted: {other}")
    if not isinstance(compressor, ScoreCompressor) or compressor.acts is not Stage.PRE_LLM:
        raise StreamError(
            f"{name} gives no score for each token: evict by one that does, as score or frame_difference, and use "
            f"{name} as reader="
        )
    if not compressor.local:
        raise StreamError(
            f"{name} scores a token by the whole video (local is False), which is not known when tokens are evicted: "
            "use score, sieve's variant 'blind' or frame_difference"
        )
    if compressor.front is not None:
        raise StreamError(f"{compressor.front.name} acts {compressor.front.stage.value}: leave it out of a stream")
    if isinstance(compressor.retention, Tokens):
        raise StreamError(f"{name} scores for a retention, and a stream has no number of tokens: give it a fraction")
    adapter.check(compressor)


def _check_reader(adapter: Adapter, reader: Compressor) -> None:
    """Refuse a reader that needs more than the tokens in memory and the question."""
    adapter.check(reader)
    if ENCODER_NEEDS & reader.needs or reader.front is not None:
        raise StreamError(f"{reader.title} needs the vision encoder, whose work is done when a question is asked")
