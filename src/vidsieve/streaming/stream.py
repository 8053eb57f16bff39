"""`Stream`: frames in, answers at any time."""

from __future__ import annotations

import ctypes
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vidsieve.adapters.adapter import Adapter
from vidsieve.adapters.encoded import Encoded, VideoFeatures, on_device
from vidsieve.adapters.pruning import adapter_with
from vidsieve.answering import Answer, chat, reply
from vidsieve.compressors.base import Compressor, ScoreCompressor
from vidsieve.errors import StreamError
from vidsieve.io.tensors import checksum, load_tensors, save_tensors
from vidsieve.streaming.evictors import check_evictor, check_reader, scores_of
from vidsieve.streaming.memory import State, StreamTokens
from vidsieve.streaming.prompts import blank_prompt, shapes_of_frame, video_of, with_memory
from vidsieve.types import Stage, TokenGrid, Tokens

FORMAT = 2
BATCH = 8
"""Frames that go through the vision encoder at a time, at most."""
_TRIM = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
"""glibc's function that returns freed memory to the system; other C libraries have none."""


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
        check_evictor(self.adapter, compressor)
        if reader is not None:
            check_reader(self.adapter, reader)
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
        self._state: State | None = None
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
        come = [*self._waiting, *zip(times.tolist(), map(np.array, pixels), strict=True)]
        while come:
            part, come = come[: BATCH * self._pictures], come[BATCH * self._pictures :]
            whole = len(part) // self._pictures * self._pictures
            state = self._advanced(part[:whole]) if whole else self._state
            self._state, self._waiting, self._last_time = state, part[whole:], part[-1][0]

    @torch.no_grad()
    def _advanced(self, pictures: Sequence[tuple[float, np.ndarray]]) -> State:
        """Return the state after further pictures and their times; the last fills up what is missing of a frame.

        Raises
        ------
        StreamError
            If they have other tokens than those before.
        """
        filled = [*pictures, *[pictures[-1]] * (-len(pictures) % self._pictures)]
        moments = torch.tensor([time for time, _ in filled], dtype=torch.float64).reshape(-1, self._pictures)
        pixels = np.stack([picture for _, picture in filled])
        frames, before = self._encoded(np.split(pixels, len(moments)), moments.tolist()), self._state
        first = 0 if before is None else before.seen
        numbers, count = torch.arange(first, first + len(frames)), frames[0].grid.num_tokens
        device = frames[0].embeds.device
        if before is not None and before.grid != frames[0].grid:
            raise StreamError(
                f"a frame became {frames[0].grid} tokens after {before.grid}: go on with the processor that the stream "
                "began with"
            )
        lasts = [None if before is None else before.last, *(frame.embeds for frame in frames)]
        scores = [
            scores_of(self.compressor, frame, number, last, self.seed)
            for frame, number, last in zip(frames, numbers.tolist(), lasts, strict=False)
        ]
        new = StreamTokens(
            torch.cat(scores),
            numbers.to(device).repeat_interleave(count),
            torch.arange(count, device=device).repeat(len(frames)),
            torch.cat([frame.embeds for frame in frames]),
            tuple(torch.cat(layers) for layers in zip(*(frame.deep for frame in frames), strict=True)),
        )
        memory = (new.at(new.places[:0]) if before is None else before.memory).merged(new, self.memory)
        start, end = float(moments[0, 0]), float(moments[-1, -1])
        if before is not None:
            numbers, moments = torch.cat([before.numbers, numbers]), torch.cat([before.times, moments])
            start = before.start
        seen = first + len(frames)
        if not self._could_hold(seen * count):
            held = torch.isin(numbers, memory.frames.cpu())
            numbers, moments = numbers[held], moments[held]
        taken = first * self._pictures + len(pictures)
        return State(
            memory,
            numbers,
            moments,
            frames[-1].embeds.clone(),
            frames[-1].tail[:1].clone(),
            frames[-1].grid,
            frames[-1].per_row,
            seen,
            start,
            (end - start) / (taken - 1) if taken > 1 else 1.0,
        )

    def _encoded(self, frames: Sequence[np.ndarray], times: Sequence[Sequence[float]]) -> list[VideoFeatures]:
        """Return frames of the grid, of some pictures each, encoded as videos of their own."""
        needs = frozenset() if isinstance(self.compressor, str) else self.compressor.needs
        parts = [video_of(pixels, moments) for pixels, moments in zip(frames, times, strict=True)]
        inputs = on_device(chat(self.processor, parts, "?"), self.adapter.device)
        videos = self.adapter.features(inputs, needs)
        grids = [video.grid for video in videos]
        if sum(grid.frames for grid in grids) != len(frames) or any(grid.places is not None for grid in grids):
            raise StreamError(
                f"{len(frames)} frames of {self.adapter.family} became {', '.join(map(str, grids))} tokens, not one "
                "each: switch off what the processor does to whole videos"
            )
        if any(not torch.equal(video.tail, video.tail[:1].expand_as(video.tail)) for video in videos):
            raise StreamError(
                f"the newlines of {self.adapter.family} differ from row to row, which a stream cannot keep"
            )
        return [video.at_frames(torch.tensor([number])) for video in videos for number in range(video.grid.frames)]

    def kept(self) -> tuple[TokenGrid, Tensor]:
        """Return the token grid of the stream so far, and the raster indices in it (M,) int64 of the tokens in memory.

        Pictures that wait for others of their frame are not in it.

        Raises
        ------
        StreamError
            If no frame is complete.
        """
        if self._state is None:
            raise StreamError("nothing has been pushed: push frames, then look at what is kept")
        grid, memory = self._state.grid, self._state.memory
        return replace(grid, frames=self._state.seen), (memory.frames * grid.per_frame + memory.places).cpu()

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
        del encoded
        if _TRIM is not None:  # a prompt is written with every token of its frames: megabytes that glibc would keep
            _TRIM(0)
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

    def _prompt(self, state: State, question: str) -> tuple[Encoded, str]:
        """Return the prompt that asks a question about the memory, and by which rule its positions are."""
        rows, adapter = self.adapter.position_rows, self.adapter
        assert self._size is not None  # as there is a state
        one = shapes_of_frame(self.processor, self._pictures, self._size)
        if self._could_hold(state.seen * state.grid.per_frame):
            encoded = blank_prompt(adapter, self.processor, one, state, state.numbers, question)
            if encoded.input_ids.shape[1] <= self._range and int(encoded.positions[rows].max()) < self._range:
                return with_memory(encoded, adapter, state, state.numbers), "original"
        held = torch.unique(state.memory.frames).cpu()
        encoded = blank_prompt(adapter, self.processor, one, state, held, question)
        encoded = with_memory(encoded, adapter, state, held)
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
            "reader": "" if self.reader is None else self.reader.describe(),
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
        """Return the stream in a file, to go on with the model, compressor and reader that it was made with.

        Raises
        ------
        StreamError
            If the file is no stream, damaged, of a newer format, or of another model, compressor or reader.
        """
        path = Path(path)
        try:
            header, tensors, _ = load_tensors(path)
        except ValueError as error:
            raise StreamError(
                f"{path} is no saved stream, or damaged ({error!s:.300}): give one of Stream.save"
            ) from None
        if header.get("kind") != "stream":
            raise StreamError(f"{path} is no stream: give a file of Stream.save")
        if header["format"] > FORMAT:
            raise StreamError(f"{path} is in format {header['format']}, this version reads {FORMAT}: upgrade vidsieve")
        stream = cls(model, processor, compressor, header["memory"], reader=reader, seed=header["seed"])
        for name, mine in stream._identity().items():
            if name == "reader" and header["format"] == 1:  # not recorded then
                continue
            if header[name] != mine:
                made, now = (repr(text) if text else "none" for text in (header[name], mine))
                raise StreamError(f"{path} was made with the {name} {made}, this is {now}: use the same")
        height, width = header["size"]
        stream._size, stream._last_time = (height, width), header["last_time"]
        if header["waiting"]:
            stream._waiting = list(zip(header["waiting"], tensors["waiting"].numpy().copy(), strict=True))
        if "grid" in header:
            device = stream.adapter.device
            on = {name: value.to(device) for name, value in tensors.items() if name not in ("numbers", "times")}
            deep = tuple(on[f"deep.{number}"] for number in range(sum(name.startswith("deep.") for name in on)))
            memory = StreamTokens(on["scores"], on["frames"], on["places"], on["embeds"], deep)
            stream._state = State(
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
