"""Dropping tokens inside the LLM.

Before a stage's layer the rows of hidden states are cut, together with everything that counts them (rotary angles,
positions, mask), and after the last layer they are put back at their places, zeros elsewhere: outside the layers
nothing changes. The cache of each layer holds the columns that the layer saw.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from vidsieve.adapters.decoder_layer import angles
from vidsieve.adapters.drop import padded
from vidsieve.adapters.inside.hooks import InnerRun, per_row
from vidsieve.adapters.inside.view import PromptRow, PromptView
from vidsieve.adapters.trace import VideoTrace
from vidsieve.adapters.transformers_api import (
    argument,
    attention_of,
    is_flash,
    layer_cache,
    layer_kinds,
    synchronise,
    window_of,
)
from vidsieve.compressors.inside import LayerCompressor
from vidsieve.errors import SelectionError
from vidsieve.types import Selection


@dataclass
class LayerRun(InnerRun):
    """A method that drops tokens inside an LLM.

    Parameters
    ----------
    depth : int
        The LLM's number of layers.
    outer_ms : tuple of float
        Time that the part before the LLM took for each video.
    """

    compressor: LayerCompressor
    depth: int
    outer_ms: tuple[float, ...] = ()
    kept: dict[int, Tensor] = field(default_factory=dict)
    """Columns (B, L') of the prompts that stay, by stage layer, −1 on padding."""
    left: list[Tensor] = field(default_factory=list)
    """Raster indices that stay after the last stage, by video."""
    select_ms: float = 0.0
    """Time spent choosing."""
    read: dict[int, set[int]] = field(default_factory=dict)
    """Layers whose attention was read, by prompt."""

    def __post_init__(self) -> None:
        super().__post_init__()
        # Until a stage has run, its count is the planned one.
        plans = [self.compressor.stages(self.depth, len(video.indices)) for video in self.videos]
        self.stages = [layer for layer, _ in plans[0]]
        self._counts = [dict(plan) for plan in plans]
        self._renumbered = False
        self._prefilling = True
        self._embeds: Tensor | None = None
        self._hidden: Tensor | None = None
        self._paddings: dict[int, tuple[int, int]] = {}
        """By stage: the first stage with its padding, −1 without padding, and the length of the rows."""
        self._later_masks: dict[tuple[tuple[int, int], int | None], Tensor | None] = {}
        """Masks of the present step, by padding and window."""

    def _history(self, video: int, layer: int) -> tuple[int, ...]:
        """Return the number of a video's tokens that each layer before `layer` sees."""
        now, seen = len(self.videos[video].indices), []
        for number in range(layer):
            now = self._counts[video].get(number, now)
            seen.append(now)
        return tuple(seen)

    @property
    def held(self) -> list[float]:
        """Mean over layers of the fraction of a video's tokens that the layer sees, by video."""
        seen = [sum(self._history(number, self.depth)) for number in range(len(self.videos))]
        whole = [(video.whole or video.grid).num_tokens for video in self.videos]
        return [total / (self.depth * count) for total, count in zip(seen, whole, strict=True)]

    def traces(self) -> list[VideoTrace]:
        """Return the trace of each video after the last stage; later steps do not change it."""
        if self.listed:
            return self.listed
        traces = []
        spent = [self.select_ms + outer for outer in self.outer_ms or [0.0] * len(self.videos)]
        left = [indices.sort().values for indices in self.left]
        for number, (video, indices, held, ms) in enumerate(zip(self.videos, left, self.held, spent, strict=True)):
            trace = VideoTrace.of(
                video.row,
                video.grid,
                Selection(indices),
                ms,
                method=self.compressor.title,
                variant=self.compressor.variant,
                nominal=str(self.compressor.retention),
                encoded=video.encoded,
                frames=video.frames,
                whole=video.whole,
            )
            newlines = int(video.kept_newlines(indices).sum())
            seen = self._history(number, self.depth)
            fewer = tuple(layer for layer in self.stages if seen[layer] < seen[layer - 1])
            read = tuple(sorted(self.read.get(video.row, ())))
            traces.append(replace(trace, held=held, layers=fewer, attention_layers=read, newlines=newlines))
        return traces

    def check_decoded(self, tokens: int) -> None:
        """Accept any number: a prompt that did not pass is an error when the hooked block ends."""

    # -- hooks ----------------------------------------------------------------------------------------------

    def _hooked_layers(self) -> Sequence[int]:
        return sorted({0, *range(self.stages[0] - 1, self.depth)})

    def _complete(self) -> bool:
        return super()._complete() and not (self.fresh and not self.kept)

    def _end(self) -> None:
        self._embeds = self._hidden = None

    def _enter(
        self, number: int, layer: Any, hidden: Tensor, cache: Any, kwargs: dict[str, Any]
    ) -> tuple[Tensor, dict[str, Any]]:
        if number == 0:
            self._later_masks.clear()
            self._prefilling = cache is None or cache.get_seq_length() == 0
        if not self._prefilling:
            if self.fresh and self.stages[0] not in self.kept:
                self._refuse_filled()
            return hidden, self._later(layer, number, hidden, cache, kwargs)
        if number == 0:
            self._embeds = hidden
        hidden, changes = self._prefill(layer, number, hidden, kwargs)
        self._hidden = hidden if number + 1 in self.stages else None
        if number == self.stages[-1]:
            self._embeds = None
        return hidden, changes

    def _after(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """Put the rows of a prompt back at their places."""
        if not self._prefilling or not self._mine(layer_cache(kwargs, module)):
            return output
        hidden = output if isinstance(output, Tensor) else output[0]
        table = per_row(self.kept[self.stages[-1]], len(hidden)).to(hidden.device)
        full = hidden.new_zeros(len(hidden), self.real.shape[1], hidden.shape[-1])
        lines, places = (table >= 0).nonzero(as_tuple=True)
        full = full.index_put((lines, table[lines, places]), hidden[lines, places])
        return full if isinstance(output, Tensor) else (full, *output[1:])

    # -- the prompt -----------------------------------------------------------------------------------------

    def _prefill(
        self, layer: Any, number: int, hidden: Tensor, kwargs: dict[str, Any]
    ) -> tuple[Tensor, dict[str, Any]]:
        if number in self.stages:
            hidden = self._cut(number, hidden)
        stage = max((s for s in self.stages if s <= number), default=None)
        if stage is None:
            return hidden, {}
        table = per_row(self.kept[stage], len(hidden)).to(hidden.device)
        real, length = table >= 0, table.shape[1]
        if self._renumbered:
            changes = self._at(number, (real.long().cumsum(1) - 1).clamp(min=0), hidden)
        else:
            changes = self._sliced(layer, kwargs, table)
        whole = bool(real.all())
        # A recurrent layer takes a mask of padding, which must not enter its state; flash attention none of (L, L).
        if attention_of(layer) is None or is_flash(self._decoder.config):
            return hidden, changes | {"attention_mask": None if whole else real.long()}
        if whole and argument(kwargs, "attention_mask", layer) is None:
            return hidden, changes  # causal without padding, as it came
        causal = _causal(length, length, window_of(self._decoder.config, number), hidden.device)
        # A row of padding may look at itself: it is never read, but must not be empty.
        mask = (causal & real[:, None, :]) | torch.eye(length, dtype=torch.bool, device=hidden.device)
        return hidden, changes | {"attention_mask": self._mask(real, mask, hidden)}

    def _cut(self, number: int, hidden: Tensor) -> Tensor:
        """Return the hidden states (R, L', D) of the columns that stay before layer `number`, dropped ones merged."""
        synchronise(hidden.device)
        start = time.perf_counter()
        stage = self.stages.index(number)
        before = self.kept[self.stages[stage - 1]] if stage else None
        left = self.left or [video.indices.to(self.real.device) for video in self.videos]
        self.left, columns, rows = [], [], []
        states, repeats, dropped, reordered = hidden, len(hidden) // len(self.real), 0, False
        for row in range(len(self.real)):
            prompt = self._prompt(number, row, before, hidden)
            line, places = prompt.columns, prompt.places
            among = torch.full((self.real.shape[1],), -1, dtype=torch.int64, device=line.device)
            among[line] = torch.arange(len(line), device=line.device)
            keep, orders = torch.ones(self.real.shape[1], dtype=torch.bool, device=line.device), []
            for which, (video, indices) in enumerate(zip(self.videos, left, strict=True)):
                if video.row != row:
                    continue
                spots, groups = among[video.at(indices)], video.groups
                if groups is not None:
                    groups = groups[torch.searchsorted(video.indices, indices)]
                seen = (number, self.depth, video.grid, indices, self._history(which, number), groups)
                view = PromptView(*seen, prompt=prompt, placed=video, places=spots)
                choice = self.compressor.step(view, self._counts[which][number])
                chosen = choice.indices.to(indices.device)
                self._counts[which][number] = len(chosen)
                keep[video.at(indices)] = False
                keep[video.at(indices[chosen])] = True
                keep[video.newlines] = video.kept_newlines(indices[chosen])
                if choice.hidden is not None:
                    states = hidden.clone() if states is hidden else states
                    tokens = places[spots[chosen]].to(hidden.device)
                    states[row * repeats : (row + 1) * repeats, tokens] = choice.hidden.to(hidden.dtype)
                if choice.order is not None:
                    chosen = choice.order.to(indices.device)
                    orders.append(spots[chosen])
                self.left.append(indices[chosen])
            self.read.setdefault(row, set()).update(prompt.read)
            stay = keep[line].nonzero().flatten()
            for order in orders:
                stay[torch.isin(stay, order)] = order
                reordered = True
            dropped += len(line) - len(stay)
            columns.append(line[stay])
            rows.append(places[stay])
        self.kept[number] = padded(columns)
        self._paddings[number] = self._padding(number)
        self._renumbered |= reordered and len(self.positions) == 1  # several rows of positions have no common order
        synchronise(hidden.device)
        self.select_ms += 1e3 * (time.perf_counter() - start) / len(self.videos)
        return _take(states, per_row(padded(rows), len(hidden)), 1) if dropped or reordered else states

    def _padding(self, number: int) -> tuple[int, int]:
        """Return what stages with the same padding, and so the same later masks, have in common."""
        pads = self.kept[number] < 0
        if not bool(pads.any()):
            return -1, pads.shape[1]
        alike = (other for other in self._paddings if torch.equal(self.kept[other] < 0, pads))
        return next(alike, number), pads.shape[1]

    def _prompt(self, number: int, row: int, before: Tensor | None, entering: Tensor) -> PromptRow:
        """Return one prompt before layer `number`; `before` (B, n) are the columns of `entering` (R, n, D), or all."""
        if self._hidden is None or self._embeds is None:
            raise SelectionError(f"layer {number - 1} did not run before layer {number}")
        if before is None:
            line = places = self.real[row].nonzero().flatten()
        else:
            line = before[row][before[row] >= 0]
            places = torch.arange(entering.shape[1] - len(line), entering.shape[1], device=line.device)
        positions = self.positions[:, row, line]
        if before is not None and self._renumbered:
            positions = torch.arange(len(line), device=line.device).expand_as(positions)
        first = row * (len(entering) // len(self.real))  # beams of a prompt are equal while it is read
        states = entering[first], self._hidden[first], self._embeds[first]
        videos = [video for video in self.videos if video.row == row]
        return PromptRow(self._decoder, number, line, positions, places, *states, videos)

    def _sliced(self, layer: Any, kwargs: dict[str, Any], table: Tensor) -> dict[str, Any]:
        """Return rotary angles and position ids of the columns in a table."""
        changes: dict[str, Any] = {}
        if self._turned(layer):
            cosine, sine = argument(kwargs, "position_embeddings", layer)
            changes = {"position_embeddings": (_take(cosine, table, -2), _take(sine, table, -2))}
        ids = argument(kwargs, "position_ids", layer)
        return changes if ids is None else changes | {"position_ids": _take(ids, table, -1)}

    def _at(self, number: int, ids: Tensor, hidden: Tensor) -> dict[str, Any]:
        """Return rotary angles and ids of positions counted anew (R, n), for layer `number`."""
        if not self._turned(self._decoder.layers[number]):
            return {"position_ids": ids}
        kind = layer_kinds(self._decoder.config)[number]
        return {"position_embeddings": angles(self._decoder.rotary, hidden, ids, kind), "position_ids": ids}

    def _turned(self, layer: Any) -> bool:
        """True if a layer turns queries and keys by their positions."""
        return self._decoder.rotary is not None and attention_of(layer) is not None

    # -- tokens after the prompt ----------------------------------------------------------------------------

    def _later(self, layer: Any, number: int, hidden: Tensor, cache: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Return the changed arguments for tokens after the prompt, which see the columns that this layer kept."""
        stage = max((s for s in self.stages if s <= number), default=None)
        if stage is None:
            return {}
        table, changes = self.kept[stage], {}
        if self._renumbered:
            dropped = per_row(self.real.sum(1) - (table >= 0).sum(1), len(hidden)).to(hidden.device)
            changes = self._at(number, argument(kwargs, "position_ids", layer) - dropped[:, None], hidden)
        if attention_of(layer) is None:
            return changes  # its mask covers the new tokens alone
        key = self._paddings[stage], window_of(self._decoder.config, number)
        if key not in self._later_masks:
            real = (per_row(table, len(hidden)) >= 0).to(hidden.device)
            self._later_masks[key] = self._later_mask(number, hidden, cache, real)
        mask = self._later_masks[key]
        return changes | {"attention_mask": mask if mask is None else mask.to(hidden.device)}

    def _later_mask(self, number: int, hidden: Tensor, cache: Any, real: Tensor) -> Tensor | None:
        """Return the mask of tokens after the prompt, which see its columns `real` (R, L'); None: all before them.

        A layer that slides holds no more keys than its window reaches back to.
        """
        rows, count = len(hidden), hidden.shape[1]
        after = cache.get_seq_length(number) - real.shape[1] + count
        seen = real.new_ones(rows, after)
        if self._words is not None:
            words = self._words[:, :after].bool().to(seen.device)
            seen[:, : words.shape[1]] = per_row(words, rows)
        if count == 1 and bool(real.all()) and bool(seen.all()):
            return None
        seen, window = torch.cat([real, seen], 1), window_of(self._decoder.config, number)
        allowed = _causal(count, seen.shape[1], window, seen.device) & seen[:, None]
        held = slice(None) if window is None else slice(-(window - 1 + count), None)
        return self._mask(seen[:, held], allowed[:, :, held], hidden)


def _causal(count: int, length: int, window: int | None, device: torch.device) -> Tensor:
    """Return the mask (count, length) of columns that the last `count` may see: none behind, and `window` at most."""
    mask = torch.ones(count, length, dtype=torch.bool, device=device).tril(length - count)
    return mask if window is None else mask.triu(length - count - window + 1)


def _take(values: Tensor, table: Tensor, dim: int) -> Tensor:
    """Return the entries of `values` (…, B, L, …) along `dim` that a table (B, L') names; −1 gives the first."""
    index = table.clamp(min=0).to(values.device)
    lines = values.movedim((dim - 1, dim), (0, 1))
    lines = lines.expand(len(index), *lines.shape[1:])
    return lines[torch.arange(len(index), device=index.device)[:, None], index].movedim((0, 1), (dim - 1, dim))
