"""Reading fewer video tokens while decoding.

Nothing in the model is changed and nothing leaves the cache: later layers get a view of the cache with the tokens that
this step reads. Attention is recomputed for the newest token alone, from the layer's own query projection and its
cached keys.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from vidsieve.adapters.decoder_layer import at_home, attention_scores, block_shape, rotated
from vidsieve.adapters.drop import padded
from vidsieve.adapters.inside.hooks import InnerRun, per_row
from vidsieve.adapters.trace import VideoTrace
from vidsieve.adapters.transformers_api import (
    argument,
    attention_of,
    cache_argument,
    first_keys,
    norm_of,
    unsupported,
)
from vidsieve.compressors.inside import DecodeCompressor, DecodeView
from vidsieve.errors import SelectionError


@dataclass
class DecodeRun(InnerRun):
    """A method that reads fewer cached tokens while decoding.

    Parameters
    ----------
    first : int
        The first layer that may read fewer tokens; the attention of the one before it chooses them.
    readers : tuple of int
        The layers that read fewer: those of full attention from `first` on.
    position_ids : Tensor, (B, L), int64
        Position ids as the model's layers get them.
    pruned : tuple of VideoTrace
        Traces of the part before the LLM.
    """

    compressor: DecodeCompressor
    first: int
    readers: tuple[int, ...]
    position_ids: Tensor
    pruned: tuple[VideoTrace, ...]
    before: dict[tuple[int, int], DecodeView] = field(default_factory=dict)
    """The step before, by row of the pass and video."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._newest: tuple[Tensor, Tensor] | None = None
        self._reading: tuple[_CacheView, Tensor | None] | None = None
        """What the layers of the present step read, and their mask."""
        self._read = [(0.0, 0)] * len(self.videos)  # sum and number of shares, by video
        self._end_keys: Tensor | None = None
        self._steps = 0

    def traces(self) -> list[VideoTrace]:
        """Return the trace of each video, with the share of its kept tokens that was read while decoding."""
        means = [total / steps if steps else None for total, steps in self._read]
        return [
            replace(trace, decoded=mean, layers=self.readers[:1], attention_layers=(self.first - 1,))
            for trace, mean in zip(self.pruned, means, strict=True)
        ]

    def check_decoded(self, tokens: int) -> None:
        """Raise an error if `generate` decoded several tokens and no step of them was seen.

        Raises
        ------
        UnsupportedTransformersError
        """
        if tokens > 1 and not self._steps:
            unsupported(f"{self.compressor.name} saw none of the steps in which {tokens} tokens were generated")

    def _hooked_layers(self) -> Sequence[int]:
        return (self.first - 1, *self.readers)

    def _end(self) -> None:
        self._newest, self._reading, self._end_keys = None, None, _last_keys(self._mine.cache)

    def _enter(
        self, number: int, layer: Any, hidden: Tensor, cache: Any, kwargs: dict[str, Any]
    ) -> tuple[Tensor, dict[str, Any]]:
        filled = 0 if cache is None else cache.get_seq_length(number)
        if not self._passes:
            self._steps, end = 0, _last_keys(cache)
            if self.fresh and filled:
                self._refuse_filled()
            if end is None or self._end_keys is None or not torch.equal(self._end_keys, end.to(self._end_keys)):
                self.before.clear()  # cropped, or its rows moved: the step before is not known any more
        if not filled or hidden.shape[1] != 1:
            return hidden, {}  # a prompt, or words of the user: everything is read
        if number == self.first - 1:
            self._newest = hidden, self._position(argument(kwargs, "position_ids", layer), len(hidden))
            return hidden, {}
        if number == self.readers[0]:
            table = self._choose(cache, argument(kwargs, "attention_mask", layer))
            real = (table >= 0).to(hidden.device)
            mask = None if bool(real.all()) else self._mask(real, real[:, None], hidden)
            self._reading, self._steps = (_CacheView(cache, table), mask), self._steps + 1
        if self._reading is None:
            raise SelectionError(f"layer {self.readers[0]} did not run before layer {number}")
        view, mask = self._reading
        return hidden, {cache_argument(layer): view, "attention_mask": mask if mask is None else mask.to(hidden.device)}

    def _position(self, ids: Tensor, rows: int) -> Tensor:
        """Return the newest token's rotary positions (P, R, 1) from its position id: all rows advance equally.

        Some LLMs hand their layers the rotary positions themselves, (P, R, n).
        """
        if ids.ndim == 3:
            return ids[..., -1:].expand(-1, rows, 1)
        repeats = rows // len(self.real)
        ids = ids[:, -1:].expand(rows, 1).to(self.position_ids.device)
        steps = ids - per_row(self.position_ids[:, -1:], rows)
        newest: Tensor = self.positions[:, :, -1:].repeat_interleave(repeats, 1) + steps.to(self.positions)
        return newest

    @torch.no_grad()
    def _choose(self, cache: Any, mask: Tensor | None) -> Tensor:
        """Return the columns of the cache (R, K) that are read in this step, −1 where a row reads fewer.

        `mask` is the step's attention mask: columns that the caller hides stay hidden.
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
        """Return the mask (R, length) of the cache's columns that a step may see."""
        if mask is None:
            after = self.real.new_ones(len(self.real), length - self.real.shape[1])
            return torch.cat([self.real, after], 1).repeat_interleave(repeats, 0)
        if mask.ndim == 4:
            mask = mask[:, 0, -1] if mask.dtype == torch.bool else mask[:, 0, -1] == 0
        return mask[:, :length].bool().expand(len(self.real) * repeats, length)

    def _attention(self, hidden: Tensor, keys: Tensor, position: Tensor, seen: Tensor) -> Tensor:
        """Return the attention (H, n) float32 of the newest token (1, D) to cached keys (H_kv, n, d)."""
        layer = self._decoder.layers[self.first - 1]
        shape, attend = block_shape(self._decoder.config, layer), attention_of(layer)
        x = norm_of(layer)(at_home(hidden, layer))
        query = rotated(attend, "q", shape, x, position)[:, 0].to(keys.device)
        return attention_scores(query, keys.float(), attend.scaling).masked_fill(~seen, -torch.inf).softmax(-1)


class _CacheView:
    """A cache through which one layer reads just the columns (R, K) of a table; −1 stands for the first."""

    def __init__(self, cache: Any, table: Tensor) -> None:
        self._cache, self._table = cache, table.clamp(min=0)[:, None, :, None]

    def update(self, keys: Tensor, values: Tensor, *rest: Any, **options: Any) -> tuple[Tensor, Tensor]:
        """Add the newest token, and return the keys and values of the table's columns."""
        whole = self._cache.update(keys, values, *rest, **options)
        index = self._table.to(keys.device)
        first, second = (some.gather(2, index.expand(-1, some.shape[1], -1, some.shape[3])) for some in whole)
        return first, second

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cache, name)


def _last_keys(cache: Any) -> Tensor | None:
    """Return a cache's newest keys (R, d) with its length: they change if it is cropped or its rows move."""
    keys = first_keys(cache)
    if keys is None:
        return None
    return torch.cat([keys[:, 0, -1], keys.new_full((len(keys), 1), keys.shape[2])], 1)
