"""Prompts about videos whose pixels are gone: made by the processor from shapes, with the kept tokens in place."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import BatchFeature

from vidsieve.adapters.adapter import Adapter
from vidsieve.adapters.drop import kept_columns
from vidsieve.adapters.encoded import Encoded, VideoFeatures, VideoSpan, on_device
from vidsieve.answering import chat
from vidsieve.streaming.memory import State
from vidsieve.types import Selection, TokenGrid
from vidsieve.video.reading import Video

Shapes = Mapping[str, Any]
"""What a video processor returns, pixels as tensors without values."""


def shapes_of_frame(processor: Any, pictures: int, size: tuple[int, int]) -> Shapes:
    """Return what a processor's video processor returns of a frame of so many `pictures` of a size."""
    recording = copy.copy(processor)
    recording.video_processor = record = _Record(processor.video_processor)
    blank = np.zeros((pictures, *size, 3), np.uint8)
    chat(recording, video_of(blank, [float(number) for number in range(pictures)]), "?")
    return record.outputs


def blank_prompt(
    adapter: Adapter, processor: Any, one: Shapes, state: State, numbers: Tensor, question: str
) -> Encoded:
    """Return the prompt that asks a question about a video of some frames of a stream, located.

    Its features have shapes and no values; the work is that of the prompt's text and positions.

    Parameters
    ----------
    one : what `shapes_of_frame` returned
    numbers : Tensor, (F,), int64
        Frames whose times are in `state`.
    """
    times = state.times[torch.isin(state.numbers, numbers)]
    told = copy.copy(processor)
    told.video_processor = _Replay(processor.video_processor, adapter, one, len(times))
    blank = np.broadcast_to(np.uint8(0), (times.numel(), 1, 1, 3))
    inputs = chat(told, video_of(blank, times.flatten().tolist()), question, state.spacing)
    grid, embeds = replace(state.grid, frames=len(times)), state.memory.embeds
    hollow = torch.empty(grid.num_tokens, embeds.shape[1], device="meta", dtype=embeds.dtype)
    tails = len(times) * grid.height if state.per_row else len(state.tail)
    video = VideoFeatures(
        hollow, grid, hollow[:1].expand(tails, -1), tuple(hollow for _ in state.memory.deep), per_row=state.per_row
    )
    rest = {name: value for name, value in inputs.items() if not isinstance(value, Tensor) or not value.is_meta}
    rest["mm_encoder_outputs"] = adapter.ready_features(video)
    return adapter.encode(on_device(rest, adapter.device))


def with_memory(encoded: Encoded, adapter: Adapter, state: State, numbers: Tensor) -> Encoded:
    """Return a `blank_prompt` with just the columns of the tokens in memory, and their features in place.

    Where these are all tokens of the frames, they have the video's grid, otherwise that of one frame.
    """
    memory, grid, (span,) = state.memory, replace(state.grid, frames=len(numbers)), encoded.videos
    places = torch.searchsorted(numbers, memory.frames.cpu()) * grid.per_frame + memory.places.cpu()
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
    rest = {name: value[:, columns] if name in adapter.column_keys else value for name, value in encoded.rest.items()}
    ids, mask = encoded.input_ids[:, columns], encoded.attention_mask[:, columns]
    return Encoded(ids, mask, encoded.positions[..., columns], (video,), rest)


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
    pixels = value.is_floating_point() or value.ndim > 3
    return value.to("meta").as_subclass(_Shape) if pixels else value


def video_of(pixels: np.ndarray, times: Sequence[float]) -> Video:
    """Return pictures and their times as a video for processors."""
    spacing = (times[-1] - times[0]) / (len(times) - 1) if times[-1] > times[0] else 1.0
    size = (pixels.shape[1], pixels.shape[2])
    return Video(pixels, np.asarray(times), (), times[-1] - times[0] + spacing, 1 / spacing, len(pixels), size)
