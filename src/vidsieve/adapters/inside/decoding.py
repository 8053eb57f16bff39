"""Methods at work while decoding: some layers read fewer of the cached video tokens at every step.

Nothing of the model is changed and nothing leaves the cache: hooks on its decoder layers, there for the length of a
call, hand later layers a view of the cache that holds what this step reads. Attention is recomputed for the newest
token alone, from the layer's own query projection and its cached keys.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from vidsieve.adapters.drop import padded
from vidsieve.adapters.inside.layers import block_shape
from vidsieve.adapters.inside.passes import OwnPasses, additive, at_home, flash_mask, refuse_filled, rotated, scores
from vidsieve.adapters.placed import PlacedVideo
from vidsieve.adapters.trace import VideoTrace
from vidsieve.adapters.transformers_api import (
    argument,
    cache_argument,
    first_keys,
    is_flash,
    layer_cache,
    layer_hidden,
    unsupported,
)
from vidsieve.compressors.base import DecodeCompressor
from vidsieve.errors import SelectionError
from vidsieve.types import DecodeView


class _View:
    """A cache through which one layer reads just the columns (R, K) of a table; −1 stands for the first."""

    def __init__(self, cache: Any, table: Tensor) -> None:
        self._cache, self._table = cache, table.clamp(min=0)[:, None, :, None]

    def update(self, keys: Tensor, values: Tensor, *rest: Any, **options: Any) -> tuple[Tensor, Tensor]:
        """Add the newest token, and return what is read."""
        made = self._cache.update(keys, values, *rest, **options)
        index = self._table.to(keys.device)
        first, second = (some.gather(2, index.expand(-1, some.shape[1], -1, some.shape[3])) for some in made)
        return first, second

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cache, name)


@dataclass
class DecodeRun:
    """A method at work on one prompt batch and whatever is decoded after it on the same cache.

    Parameters
    ----------
    first : int
        The first layer that reads fewer tokens.
    compressor : DecodeCompressor
    positions : Tensor, (P, B, L), int64
        Rotary positions of the pruned prompts.
    text : Tensor, (B, L), int64
        Positions as the model's layers are told them.
    real : Tensor, (B, L), bool
        False on padding.
    videos : tuple of PlacedVideo
        Their columns are those of the kept tokens.
    made : tuple of VideoTrace
        What was kept of each video.
    """

    first: int
    compressor: DecodeCompressor
    positions: Tensor
    text: Tensor
    real: Tensor
    videos: tuple[PlacedVideo, ...]
    made: tuple[VideoTrace, ...]
    before: dict[tuple[int, int], DecodeView] = field(default_factory=dict)
    """By row of the pass and video: the step before."""
    fresh: bool = True
    """Whether this run has not run yet."""
    listed: list[VideoTrace] = field(default_factory=list)
    """What the session's trace holds of it."""

    def __post_init__(self) -> None:
        self._layers: Sequence[Any] = ()
        self._text: Any = None
        self._newest: tuple[Tensor, Tensor] | None = None
        self._table: Tensor | None = None
        self._read = [(0.0, 0)] * len(self.videos)  # per video: shares added up, and how many
        self._end: Tensor | None = None
        self._passes = self._steps = 0

    def traces(self) -> list[VideoTrace]:
        """Return what was kept of each video, and the share of it that was read while decoding."""
        means = [total / steps if steps else None for total, steps in self._read]
        return [replace(trace, decoded=mean) for trace, mean in zip(self.made, means, strict=True)]

    @contextmanager
    def hooked(self, layers: Sequence[Any], text: Any, cache: Any, words: Tensor | None = None) -> Iterator[None]:
        """Act on every step through an LLM's decoder `layers`, configuration `text`, until the block ends.

        Passes of other calls, on another cache than `cache` or in another thread, go through as they are.
        """
        handles, mine = [], OwnPasses(cache)
        self._passes = self._steps = 0
        if not _same(self._end, _end_of(cache)):
            self.before.clear()  # cropped, or its rows moved: the step before is not known any more
        # Not kept beyond the block: the run travels with the cache, and must not drag the model along.
        self._layers, self._text = layers, text
        try:
            for number in range(self.first - 1, len(layers)):
                handles.append(layers[number].register_forward_pre_hook(self._before(number, mine), with_kwargs=True))
            yield
            if not self._passes:
                unsupported(f"{self.compressor.name} saw nothing pass through the decoder layers")
        finally:
            for handle in handles:
                handle.remove()
            self._layers, self._text, self._newest, self._table = (), None, None, None
            self._end = _end_of(mine.cache)

    def check_decoded(self, tokens: int) -> None:
        """Refuse what `generate` returned if it decoded several tokens and no step of them was seen.

        Raises
        ------
        UnsupportedTransformersError
        """
        if tokens > 1 and not self._steps:
            unsupported(f"{self.compressor.name} saw none of the steps in which {tokens} tokens were generated")

    def _before(self, number: int, mine: OwnPasses) -> Any:
        def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            hidden, cache = layer_hidden(args, kwargs, module), layer_cache(kwargs, module)
            if not mine(cache):
                return None
            if self.fresh and not self._passes and cache is not None and cache.get_seq_length(number):
                refuse_filled(self.compressor)
            self._passes += 1
            if cache is None or hidden.shape[1] != 1 or cache.get_seq_length(number) == 0:
                return None  # a prompt, or words of the user: everything is read
            if number == self.first - 1:
                told = argument(kwargs, "position_ids", module)
                self._newest = hidden, self._position(told, len(hidden))
                return None
            if number == self.first:
                self._table = self._choose(cache, argument(kwargs, "attention_mask", module))
                self._steps += 1
            if self._table is None:
                raise SelectionError(f"layer {self.first} did not run before layer {number}")
            return args, kwargs | {
                cache_argument(module): _View(cache, self._table),
                "attention_mask": self._mask(self._table, hidden),
            }

        return hook

    def _position(self, told: Tensor, rows: int) -> Tensor:
        """Return the newest token's rotary positions (P, R, 1) from its text position: all rows go on as it does."""
        repeats = rows // len(self.real)
        told = told[:, -1:].expand(rows, 1).to(self.text.device)
        steps = told - self.text[:, -1:].repeat_interleave(repeats, 0)
        newest: Tensor = self.positions[:, :, -1:].repeat_interleave(repeats, 1) + steps.to(self.positions)
        return newest

    @torch.no_grad()
    def _choose(self, cache: Any, mask: Tensor | None) -> Tensor:
        """Return the columns of the cache (R, K) that are read in this step, −1 where a row reads fewer.

        `mask` is the step's attention mask: what the caller hides stays hidden.
        """
        if self._newest is None:
            raise SelectionError(f"layer {self.first - 1} did not run before layer {self.first}")
        hidden, position = self._newest
        keys = cache.layers[self.first - 1].keys
        repeats, length, device = len(hidden) // len(self.real), keys.shape[2], keys.device
        visible = self._visible(mask, repeats, length).to(device)
        lines = []
        for row in range(len(hidden)):
            prompt, seen = row // repeats, visible[row].clone()
            attention = self._attention(hidden[row], keys[row], position[:, row], seen)
            for number, video in enumerate(self.videos):
                if video.row != prompt:
                    continue
                columns = video.columns.to(device)
                view = DecodeView(self.first, video.grid, video.indices.to(device), attention[:, columns])
                read = self.compressor.read(view, self.before.get((row, number)))
                self.before[row, number] = replace(view, read=read)
                if read is not None:
                    seen[columns] = False
                    seen[columns[read]] = True
                total, steps = self._read[number]
                self._read[number] = total + (1.0 if read is None else len(read) / len(columns)), steps + 1
            lines.append(seen.nonzero().flatten())
        return padded(lines)

    def _visible(self, mask: Tensor | None, repeats: int, length: int) -> Tensor:
        """Return which columns of the cache (R, length) bool a step may see."""
        if mask is None:
            after = self.real.new_ones(len(self.real), length - self.real.shape[1])
            return torch.cat([self.real, after], 1).repeat_interleave(repeats, 0)
        if mask.ndim == 4:
            mask = mask[:, 0, -1] if mask.dtype == torch.bool else mask[:, 0, -1] == 0
        return mask[:, :length].bool().expand(len(self.real) * repeats, length)

    def _attention(self, hidden: Tensor, keys: Tensor, position: Tensor, seen: Tensor) -> Tensor:
        """Return the attention (H, n) float32 of the newest token (1, D) to cached keys (H_kv, n, d)."""
        layer = self._layers[self.first - 1]
        shape, attend = block_shape(self._text, layer), layer.self_attn
        x = layer.input_layernorm(at_home(hidden, layer))
        query = rotated(attend, "q", shape, x, position)[:, 0].to(keys.device)
        return scores(query, keys.float(), attend.scaling).masked_fill(~seen, -torch.inf).softmax(-1)

    def _mask(self, table: Tensor, hidden: Tensor) -> Tensor | None:
        """Return the mask of this step over the columns of a table that are read."""
        real = table >= 0
        if bool(real.all()):
            return None
        real = real.to(hidden.device)
        return flash_mask(real) if is_flash(self._text) else additive(real[:, None, None], hidden)


def _end_of(cache: Any) -> Tensor | None:
    """Return what tells whether a cache was cropped or its rows moved: the newest keys (R, d) and the length."""
    keys = first_keys(cache)
    if keys is None:
        return None
    return torch.cat([keys[:, 0, -1], keys.new_full((len(keys), 1), keys.shape[2])], 1)


def _same(first: Tensor | None, second: Tensor | None) -> bool:
    return first is not None and second is not None and torch.equal(first, second.to(first))
