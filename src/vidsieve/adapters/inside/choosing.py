"""Which tokens a stage inside the LLM keeps: what a method is shown of each video, and what it makes of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from vidsieve.adapters.drop import padded
from vidsieve.adapters.inside.passes import OwnPasses, attention_rows
from vidsieve.adapters.inside.views import rope_bias, text_places
from vidsieve.adapters.placed import PlacedVideo
from vidsieve.adapters.transformers_api import layer_cache, layer_hidden, window_of
from vidsieve.compressors.base import LayerCompressor
from vidsieve.errors import SelectionError
from vidsieve.types import LayerView


def _from_last(attention: Callable[[], Tensor], spots: Tensor) -> Tensor:
    """Return the last row's attention (H, n) to some of the tokens."""
    rows = attention()
    return rows[:, -1, spots.to(rows.device)]


class Choosing:
    """The part of a `LayerRun` that chooses."""

    depth: int
    compressor: LayerCompressor
    positions: Tensor
    real: Tensor
    videos: tuple[PlacedVideo, ...]
    rotary: Any
    alive: list[Tensor]
    _counts: list[dict[int, int]]
    _layers: Any
    _text_config: Any
    _hidden: Tensor | None
    _told: list[Tensor]
    _mine: OwnPasses

    def _history(self, video: int, layer: int) -> tuple[int, ...]:
        """Return how many of a video's tokens each layer before `layer` sees."""
        now, found = len(self.videos[video].indices), []
        for number in range(layer):
            now = self._counts[video].get(number, now)
            found.append(now)
        return tuple(found)

    def _all_columns(self) -> list[Tensor]:
        return [line.nonzero().flatten() for line in self.real]

    @torch.no_grad()
    def _choose(
        self, number: int, before: Tensor | None, entering: Tensor
    ) -> tuple[Tensor, list[tuple[int, Tensor, LayerView, Tensor]]]:
        """Return the columns (B, L') that reach layer `number`, and what was chosen among what.

        For each video its row, the places of its tokens in `entering`, what the method saw, and what it chose.
        """
        if self._hidden is None:
            raise SelectionError(f"layer {number - 1} did not run before layer {number}")
        seen, self._hidden = self._hidden, None
        layer = number - 1
        if self.compressor.own_layer:
            seen, layer = entering, number
        hidden = seen[:: len(seen) // len(self.real)]  # beams of a prompt are equal while it is read
        columns = self._all_columns() if before is None else [table[table >= 0] for table in before]
        alive = self.alive or [video.indices.to(self.real.device) for video in self.videos]
        self.alive, found = [], []
        for row, line in enumerate(columns):
            places = torch.arange(hidden.shape[1] - len(line), hidden.shape[1], device=line.device)
            if before is None:
                places = line
            positions = self.positions[:, row, line]
            if self.rotary is not None and before is not None:
                positions = torch.arange(len(line), device=line.device).expand_as(positions)
            among_rows = hidden[row, places.to(hidden.device)]
            asked = self._text(row, line)
            # (H, Q, n), computed where a method reads it, once for all videos of a row.
            attention = cache(
                partial(
                    attention_rows,
                    self._layers[layer],
                    self._text_config,
                    among_rows,
                    positions,
                    asked,
                    window_of(self._text_config, layer),
                )
            )
            keep = torch.ones(self.real.shape[1], dtype=torch.bool, device=line.device)
            among = torch.full((self.real.shape[1],), -1, dtype=torch.int64, device=line.device)
            among[line] = torch.arange(len(line), device=line.device)
            for which, (video, indices) in enumerate(zip(self.videos, alive, strict=True)):
                if video.row != row:
                    continue
                counts = self._counts[which]
                spots = among[video.at(indices)]
                view = LayerView(
                    number,
                    video.grid,
                    indices,
                    partial(_from_last, attention, spots),
                    history=self._history(which, number),
                    depth=self.depth,
                )
                if self.compressor.reads_before:
                    view = replace(view, before=hidden[row, places[spots].to(hidden.device)])
                if self.compressor.merges or self.compressor.reads_before:
                    first = row * (len(entering) // len(self.real))
                    view = replace(view, hidden=entering[first, places[spots].to(entering.device)])
                if self.compressor.reads_text:
                    behind, seen_by = line[asked] > video.columns.max(), attention()
                    to_video = seen_by[:, behind.to(seen_by.device)][..., spots.to(seen_by.device)]
                    view = replace(view, text_attention=to_video)
                    if self._told:
                        view = replace(view, told=self._told[which])
                    if self.compressor.reads_bias:
                        places_of = positions[:, asked[behind]], positions[:, spots]
                        view = replace(view, rope_bias=rope_bias(self._text_config, self._layers[layer], *places_of))
                if video.groups is not None:
                    view = replace(view, groups=video.groups[torch.searchsorted(video.indices, indices)])
                chosen = self.compressor.choose(view, counts[number]).to(indices.device)
                counts[number] = len(chosen)
                found.append((row, places[spots], view, chosen))
                keep[video.at(indices)] = False
                keep[video.at(indices[chosen])] = True
                keep[video.newlines] = video.kept_newlines(indices[chosen])
                self.alive.append(indices[chosen])
            columns[row] = line[keep[line]]
            if self.compressor.reorders:
                self._reorder(columns[row], row)
        return padded(columns), found

    def _reorder(self, line: Tensor, row: int) -> None:
        """Put what stays of each video of a row in the order in which it was chosen, in its places of `line`."""
        for video, indices in zip(self.videos, self.alive, strict=False):
            if video.row == row:
                own = video.at(indices)
                line[torch.isin(line, own)] = own

    def _merged(self, hidden: Tensor, found: list[tuple[int, Tensor, LayerView, Tensor]]) -> Tensor:
        """Return hidden states (R, L, D) in which chosen tokens have taken in what is dropped."""
        repeats, changed = len(hidden) // len(self.real), hidden.clone()
        for row, places, view, chosen in found:
            places, first = places.to(hidden.device), row * repeats
            tokens = self.compressor.merge(replace(view, hidden=hidden[first, places]), chosen)
            for line in range(first, first + repeats):
                changed[line, places[chosen.to(places.device)]] = tokens.to(hidden.dtype)
        return changed

    def _text(self, row: int, line: Tensor) -> Tensor:
        """Return the places (Q,) among the columns `line` of a row whose attention is read, the last token last."""
        if not self.compressor.reads_text:
            return torch.tensor([len(line) - 1], device=line.device)
        first = torch.stack([video.columns.max() for video in self.videos if video.row == row]).min()
        return text_places(self.videos, row, line, first)

    def _start(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Let the method look at the input embeddings of each video and of the text behind it."""
        hidden, cache = layer_hidden(args, kwargs, module), layer_cache(kwargs, module)
        if not self._mine(cache) or not (cache is None or cache.get_seq_length(0) == 0):
            return
        lines, self._told = self._all_columns(), []
        for video in self.videos:
            line = lines[video.row]
            text = line[text_places(self.videos, video.row, line, video.columns.max())]
            rows = hidden[video.row * (len(hidden) // len(self.real))].detach()
            self._told.append(self.compressor.prepare(rows[video.columns.to(rows.device)], rows[text.to(rows.device)]))
