"""Dropping tokens inside the LLM: hooks on its decoder layers, for the length of one call.

Before a stage's layer the rows of hidden states are cut, together with everything that counts them (rotary angles,
positions, mask), and after the last layer they are put back at their places, zeros elsewhere: outside the layers
nothing changes. Each layer's cache holds what that layer saw. Attention is computed for the one query row that a
method reads, from the layer's own projections.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from vidsieve.adapters.drop import padded
from vidsieve.adapters.inside.choosing import Choosing
from vidsieve.adapters.inside.passes import OwnPasses, additive, flash_mask, refuse_filled, take
from vidsieve.adapters.placed import PlacedVideo
from vidsieve.adapters.trace import VideoTrace
from vidsieve.adapters.transformers_api import argument, is_flash, layer_cache, layer_hidden, unsupported
from vidsieve.compressors.base import LayerCompressor
from vidsieve.types import Selection


@dataclass
class LayerRun(Choosing):
    """A method at work inside an LLM, on one prompt batch and whatever follows it on the same cache.

    Parameters
    ----------
    depth : int
        The LLM's number of layers.
    compressor : LayerCompressor
    positions : Tensor, (P, B, L), int64
        Rotary positions of the prompts.
    real : Tensor, (B, L), bool
        False on padding.
    videos : tuple of PlacedVideo
        With the tokens that a part before the LLM has left, if there is one.
    outer_ms : tuple of float
        Time that part took for each video.
    """

    depth: int
    compressor: LayerCompressor
    positions: Tensor
    real: Tensor
    videos: tuple[PlacedVideo, ...]
    outer_ms: tuple[float, ...] = ()
    rotary: Any = None
    """The LLM's rotary embedding, for methods that number positions anew after every stage."""
    kept: dict[int, Tensor] = field(default_factory=dict)
    """Per stage layer the columns of the prompt (B, L') that stay, −1 on padding."""
    alive: list[Tensor] = field(default_factory=list)
    """Per video the raster indices that stay after the last stage."""
    select_ms: float = 0.0
    """Time spent choosing."""
    fresh: bool = True
    """Whether this run has not run yet."""
    listed: list[VideoTrace] = field(default_factory=list)
    """What the session's trace holds of it."""

    def __post_init__(self) -> None:
        # Counts are what a method plans until its stage has run.
        plans = [self.compressor.stages(self.depth, len(video.indices)) for video in self.videos]
        self.stages = [layer for layer, _ in plans[0]]
        self._counts = [dict(plan) for plan in plans]
        self._layers: Sequence[Any] = ()
        self._text_config: Any = None
        self._hidden: Tensor | None = None
        self._told: list[Tensor] = []
        self._prefilling = True
        self._mine = OwnPasses(None)
        self._passes = 0
        self._words: Tensor | None = None
        self._later_masks: dict[int, Tensor | None] = {}

    @property
    def held(self) -> list[float]:
        """Per video the mean over layers of the fraction of its tokens that the layer sees."""
        seen = [sum(self._history(number, self.depth)) for number in range(len(self.videos))]
        return [sum_ / (self.depth * v.grid.num_tokens) for sum_, v in zip(seen, self.videos, strict=True)]

    def traces(self) -> list[VideoTrace]:
        """Return what was kept of each video after the last stage; later steps change nothing of it."""
        if self.listed:
            return self.listed
        named = {"method": self.compressor.name, "variant": self.compressor.variant}
        nominal = str(self.compressor.retention)
        made = []
        spent = [self.select_ms + outer for outer in self.outer_ms or [0.0] * len(self.videos)]
        alive = [indices.sort().values for indices in self.alive]
        for which, (video, indices, held, ms) in enumerate(zip(self.videos, alive, self.held, spent, strict=True)):
            trace = VideoTrace.of(video.row, video.grid, Selection(indices), ms, **named, nominal=nominal)
            newlines = int(video.kept_newlines(indices).sum())
            seen = self._history(which, self.depth)
            fewer = tuple(layer for layer in self.stages if seen[layer] < seen[layer - 1])
            made.append(replace(trace, held=held, layers=fewer, newlines=newlines))
        return made

    @contextmanager
    def hooked(self, layers: Sequence[Any], text: Any, cache: Any, words: Tensor | None = None) -> Iterator[None]:
        """Act on every pass through an LLM's decoder `layers`, configuration `text`, until the block ends.

        Passes of other calls, on another cache than `cache` or in another thread, go through as they are. `words`
        (B, n) says which of the columns behind the prompt are seen; None, and columns after them: all. The masks that
        layers are handed do not tell: transformers makes them as long as the cache of one layer, be it a shorter one.
        """
        handles = []
        self._mine, self._passes = OwnPasses(cache), 0
        self._words = None if words is None else words.bool()
        # Not kept beyond the block: the run travels with the cache, and must not drag the model along.
        self._layers, self._text_config = layers, text
        try:
            if self.compressor.prepares:
                handles.append(self._layers[0].register_forward_pre_hook(self._start, with_kwargs=True))
            for number in range(self.stages[0] - 1, self.depth):
                handles.append(self._layers[number].register_forward_pre_hook(self._before(number), with_kwargs=True))
            handles.append(self._layers[-1].register_forward_hook(self._after, with_kwargs=True))
            yield
            if not self._passes or (self.fresh and not self.kept):
                unsupported(f"{self.compressor.name} saw no prompt pass through the decoder layers")
        finally:
            for handle in handles:
                handle.remove()
            self._layers, self._text_config, self._hidden, self._mine = (), None, None, OwnPasses(None)

    def check_decoded(self, tokens: int) -> None:
        """Refuse nothing: whether a prompt passed was checked when the hooks went."""

    # -- hooks ----------------------------------------------------------------------------------------------

    def _before(self, number: int) -> Any:
        def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            hidden, cache = layer_hidden(args, kwargs, module), layer_cache(kwargs, module)
            if not self._mine(cache):
                return None
            self._passes += 1
            if number == self.stages[0] - 1:
                self._later_masks.clear()
            self._prefilling = cache is None or cache.get_seq_length(number) == 0
            if self.fresh and not self._prefilling and self.stages[0] not in self.kept:
                refuse_filled(self.compressor)
            if self._prefilling:
                hidden, changes = self._prefill(module, number, hidden, kwargs)
            else:
                changes = self._later(module, number, hidden, cache, kwargs)
            if self._prefilling and number + 1 in self.stages:
                self._hidden = hidden
            if args:
                return (hidden, *args[1:]), kwargs | changes
            return (), kwargs | changes | {"hidden_states": hidden}

        return hook

    def _after(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """Put the rows of a prompt back at their places."""
        if not self._prefilling or not self._mine(layer_cache(kwargs, module)):
            return output
        hidden = output if isinstance(output, Tensor) else output[0]
        table = self._rows(self.kept[self.stages[-1]], len(hidden)).to(hidden.device)
        full = hidden.new_zeros(len(hidden), self.real.shape[1], hidden.shape[-1])
        lines, places = (table >= 0).nonzero(as_tuple=True)
        full = full.index_put((lines, table[lines, places]), hidden[lines, places])
        return full if isinstance(output, Tensor) else (full, *output[1:])

    def _prefill(
        self, layer: Any, number: int, hidden: Tensor, kwargs: dict[str, Any]
    ) -> tuple[Tensor, dict[str, Any]]:
        if number in self.stages and self._settled(number):
            self.kept[number] = self._last(number) if self.stages[0] < number else padded(self._all_columns())
        elif number in self.stages:
            before = self._last(number) if self.stages[0] < number else None
            _synchronise(hidden)
            start = time.perf_counter()
            self.kept[number], found = self._choose(number, before, hidden)
            if self.compressor.merges:
                hidden = self._merged(hidden, found)
            _synchronise(hidden)
            self.select_ms += 1e3 * (time.perf_counter() - start) / len(self.videos)
            # Places of the kept columns among those that reach this layer.
            hidden = take(hidden, self._rows(self._within(self.kept[number], before), len(hidden)))
        stage = max((s for s in self.stages if s <= number), default=None)
        if stage is None:
            return hidden, {}
        table = self._rows(self.kept[stage], len(hidden)).to(hidden.device)
        real, length = table >= 0, table.shape[1]
        changes = self._sliced(layer, kwargs, table) if self.rotary is None else self._numbered(hidden, real)
        if is_flash(self._text_config):
            return hidden, changes | {"attention_mask": flash_mask(real)}
        if argument(kwargs, "attention_mask", layer) is None and bool(real.all()):
            return hidden, changes  # causal without padding, as it came
        causal = torch.ones(length, length, dtype=torch.bool, device=hidden.device).tril()
        # A row of padding may look at itself: it is never read, but must not be empty.
        mask = (causal & real[:, None, :]) | torch.eye(length, dtype=torch.bool, device=hidden.device)
        return hidden, changes | {"attention_mask": additive(mask[:, None], hidden)}

    def _last(self, number: int) -> Tensor:
        """Return the columns that the stage before layer `number` has left."""
        return self.kept[self.stages[self.stages.index(number) - 1]]

    def _settled(self, number: int) -> bool:
        """Return whether a stage drops nothing from any video; if so, note it."""
        for video, placed in enumerate(self.videos):
            if not self.compressor.settled(self._history(video, number), self.depth, placed.grid):
                return False
        for video, counts in enumerate(self._counts):
            counts[number] = self._history(video, number)[-1]
        self.alive = self.alive or [video.indices.to(self.real.device) for video in self.videos]
        return True

    def _later(self, layer: Any, number: int, hidden: Tensor, cache: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Return what changes for tokens after the prompt, which see what this layer kept of it."""
        stage = max((s for s in self.stages if s <= number), default=None)
        if stage is None:
            return {}
        real = (self._rows(self.kept[stage], len(hidden)) >= 0).to(hidden.device)
        changes = self._moved_back(layer, hidden, kwargs, real) if self.rotary is not None else {}
        if stage not in self._later_masks:
            self._later_masks[stage] = self._later_mask(number, hidden, cache, real)
        mask = self._later_masks[stage]
        return changes | {"attention_mask": mask if mask is None else mask.to(hidden.device)}

    def _later_mask(self, number: int, hidden: Tensor, cache: Any, real: Tensor) -> Tensor | None:
        """Return the mask of tokens after the prompt, of which `real` (R, L') are seen; None: all that came before."""
        rows, count = len(hidden), hidden.shape[1]
        after = cache.get_seq_length(number) - real.shape[1] + count
        seen = real.new_ones(rows, after)
        if self._words is not None:
            told = self._words[:, :after].to(seen.device)
            seen[:, : told.shape[1]] = told.repeat_interleave(rows // len(told), 0)
        if is_flash(self._text_config):
            return flash_mask(torch.cat([real, seen], 1))
        if count == 1 and bool(real.all()) and bool(seen.all()):
            return None
        causal = real.new_ones(count, after).tril(after - count)
        allowed = torch.cat([real[:, None].expand(-1, count, -1), causal & seen[:, None]], 2)
        return additive(allowed[:, None], hidden)

    # -- bookkeeping ----------------------------------------------------------------------------------------

    def _rows(self, table: Tensor, rows: int) -> Tensor:
        """Return a table with one line a prompt for the rows of a pass: beams repeat each prompt."""
        return table.repeat_interleave(rows // len(table), 0)

    def _within(self, table: Tensor, before: Tensor | None) -> Tensor:
        """Return the places of columns among those of the stage before (all columns of the prompt: themselves)."""
        if before is None:
            return table
        found = torch.full((len(table), self.real.shape[1] + 1), -1, dtype=torch.int64, device=table.device)
        places = torch.arange(before.shape[1], device=table.device).expand_as(before)
        found.scatter_(1, before.where(before >= 0, self.real.shape[1]), places)
        return found.gather(1, table.clamp(min=0)).where(table >= 0, -1)

    def _sliced(self, layer: Any, kwargs: dict[str, Any], table: Tensor) -> dict[str, Any]:
        """Return rotary angles and position ids of the columns in a table."""
        cosine, sine = argument(kwargs, "position_embeddings", layer)
        changes: dict[str, Any] = {"position_embeddings": (take(cosine, table, -2), take(sine, table, -2))}
        ids = argument(kwargs, "position_ids", layer)
        if ids is not None:
            changes["position_ids"] = take(ids, table, -1)
        return changes

    def _numbered(self, hidden: Tensor, real: Tensor) -> dict[str, Any]:
        """Return rotary angles and ids of positions that count the kept columns, `real` (R, L') where there is one."""
        ids = (real.long().cumsum(1) - 1).clamp(min=0)
        return {"position_embeddings": self.rotary(hidden, ids), "position_ids": ids}

    def _moved_back(self, layer: Any, hidden: Tensor, kwargs: dict[str, Any], real: Tensor) -> dict[str, Any]:
        """Return rotary angles and ids of later tokens, less what was dropped before this layer."""
        dropped = self._rows(self.real, len(hidden)).to(real.device).sum(1) - real.sum(1)
        ids = argument(kwargs, "position_ids", layer) - dropped[:, None]
        return {"position_embeddings": self.rotary(hidden, ids), "position_ids": ids}


def _synchronise(tensor: Tensor) -> None:
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)
