"""Videos in a batch of prompts, and the views of them that methods inside the LLM get before a layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from vidsieve.adapters.decoder_layer import Decoder, attention_rows, rope_bias
from vidsieve.adapters.encoded import Encoded, kept_newlines
from vidsieve.adapters.transformers_api import window_of
from vidsieve.compressors.inside import LayerView, Rows
from vidsieve.errors import SelectionError
from vidsieve.types import Selection, TokenGrid


@dataclass(frozen=True)
class PlacedVideo:
    """The tokens of one video in a batch of prompts.

    Parameters
    ----------
    row : int
        Number of the prompt.
    columns : Tensor, (n,), int64
        Columns of the tokens `indices` (n,) of the grid.
    newlines : Tensor, (E,), int64
        Columns of its newlines; `per_row` if one follows every row of a frame.
    groups : Tensor or None, (n,), int64
        `Selection.groups`.
    placed_newlines : Tensor or None, (E',), bool
        Mask of the video's newlines that are in the prompt; None: all.
    encoded, frames, whole : as in `VideoFeatures`
    """

    row: int
    columns: Tensor
    grid: TokenGrid
    newlines: Tensor
    per_row: bool
    indices: Tensor
    groups: Tensor | None = None
    placed_newlines: Tensor | None = None
    encoded: int | None = None
    frames: Tensor | None = None
    whole: TokenGrid | None = None

    def at(self, indices: Tensor) -> Tensor:
        """Return the columns of grid tokens, raster indices among those placed."""
        return self.columns[torch.searchsorted(self.indices, indices.to(self.indices.device))]

    def kept_newlines(self, indices: Tensor) -> Tensor:
        """Return the mask (E,) of newlines that stay with the grid tokens `indices` (K,)."""
        if self.placed_newlines is None:
            return kept_newlines(indices, len(self.newlines), self.grid, self.per_row)
        everything = kept_newlines(indices, len(self.placed_newlines), self.grid, self.per_row)
        return everything[self.placed_newlines.to(everything.device)]


def place(encoded: Encoded, kept_positions: Tensor, selections: Sequence[Selection]) -> tuple[PlacedVideo, ...]:
    """Return the places of each video's selected tokens in the pruned prompts."""
    placed = []
    for span, selection in zip(encoded.videos, selections, strict=True):
        # Padding may have moved from the right to the left.
        kept, indices = kept_positions[span.row], selection.indices.to(span.columns.device)
        tail = span.features.kept_tail(indices)
        newlines = span.tail_columns[tail]
        columns, ends = (torch.searchsorted(kept, some.contiguous()) for some in (span.columns[indices], newlines))
        grid, per_row = span.features.grid, span.features.per_row
        video = PlacedVideo(span.row, columns, grid, ends, per_row, indices, selection.groups, tail)
        features = span.features
        placed.append(replace(video, encoded=features.encoded, frames=features.frames, whole=features.whole))
    return tuple(placed)


@dataclass
class PromptRow:
    """One prompt of a batch before a layer; attention is computed once for all of its videos.

    Parameters
    ----------
    decoder : Decoder
        Of the LLM.
    layer : int
        The layer that is about to run.
    columns, positions : Tensor, (l,) and (P, l), int64
        Columns of the prompt that are left, and their rotary positions.
    places : Tensor, (l,), int64
        Rows of their hidden states in `entering` and `before`.
    entering, before : Tensor, (L', D)
        Hidden states that enter the layer, and that entered the one before.
    embeds : Tensor, (L, D)
        Hidden states of the whole prompt that entered the first layer.
    videos : sequence of PlacedVideo
        Of this prompt.
    """

    decoder: Decoder
    layer: int
    columns: Tensor
    positions: Tensor
    places: Tensor
    entering: Tensor
    before: Tensor
    embeds: Tensor
    videos: Sequence[PlacedVideo]
    _attention: dict[tuple[Rows, int], Tensor] = field(default_factory=dict)

    @property
    def read(self) -> set[int]:
        """The layers whose attention was read."""
        return {layer for _, layer in self._attention}

    def text(self, among: Tensor, behind: Tensor) -> Tensor:
        """Return the places (Q,) in `among`, columns of the prompt, of text behind the column `behind`."""
        visual = torch.cat([part for video in self.videos for part in (video.columns, video.newlines)])
        return ((among > behind.to(among.device)) & ~torch.isin(among, visual.to(among.device))).nonzero().flatten()

    @property
    def text_rows(self) -> Tensor:
        """Places (Q,) in `columns` of the text behind the first video."""
        return self.text(self.columns, torch.stack([video.columns.max() for video in self.videos]).min())

    def attention(self, rows: Rows, layer: int) -> Tensor:
        """Return the attention (H, Q, l) of the last token or the text rows, in this layer or the one before."""
        if layer not in (self.layer, self.layer - 1):
            raise SelectionError(f"attention before layer {self.layer} is known for it and the one before, not {layer}")
        if (rows, layer) not in self._attention:
            module, config = self.decoder.layers[layer], self.decoder.config
            hidden = _rows(self.entering if layer == self.layer else self.before, self.places)
            queries = self.text_rows if rows == "text" else torch.tensor([len(self.columns) - 1])
            weights = attention_rows(module, config, hidden, self.positions, queries, window_of(config, layer))
            self._attention[rows, layer] = weights
        return self._attention[rows, layer]


@dataclass(frozen=True)
class PromptView(LayerView):
    """A `LayerView` of one video of a prompt; `places` (n,) are those of its tokens among the prompt's columns."""

    prompt: PromptRow = field(kw_only=True)
    placed: PlacedVideo = field(kw_only=True)
    places: Tensor = field(kw_only=True)

    def _behind(self) -> Tensor:
        """Return the mask (Q',) of the prompt's text rows that are behind this video."""
        return self.prompt.columns[self.prompt.text_rows] > self.placed.columns.max()

    def attention(self, rows: Rows, layer: int) -> Tensor:
        """Return the attention (H, Q, n) float32 from prompt tokens to the video's."""
        weights = self.prompt.attention(rows, layer)
        if rows == "text":
            weights = weights[:, self._behind().to(weights.device)]
        return weights[..., self.places.to(weights.device)]

    @property
    def hidden(self) -> Tensor:
        """Hidden states (n, D) that enter the layer."""
        return _rows(self.prompt.entering, self.prompt.places[self.places])

    @property
    def before(self) -> Tensor:
        """Hidden states (n, D) that entered the layer before."""
        return _rows(self.prompt.before, self.prompt.places[self.places]).detach()

    @property
    def video(self) -> Tensor:
        """Embeddings (N', D) of the video's tokens as they entered the LLM."""
        return _rows(self.prompt.embeds, self.placed.columns).detach()

    @property
    def text(self) -> Tensor:
        """Embeddings (Q, D) of the text behind the video as it entered the LLM."""
        everything = torch.arange(len(self.prompt.embeds), device=self.placed.columns.device)
        return _rows(self.prompt.embeds, self.prompt.text(everything, self.placed.columns.max())).detach()

    @property
    def rope_bias(self) -> Tensor:
        """Scores (Q, n) float32 between a query and a key of ones, by rotary positions alone."""
        prompt, queries = self.prompt, self.prompt.text_rows[self._behind()]
        positions = prompt.positions[:, queries], prompt.positions[:, self.places]
        return rope_bias(prompt.decoder.config, prompt.decoder.layers[self.layer - 1], *positions)


def _rows(states: Tensor, places: Tensor) -> Tensor:
    return states[places.to(states.device)]
