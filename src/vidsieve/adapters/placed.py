"""Where a video's tokens stand in the prompts of a batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vidsieve.adapters.encoded import Encoded, kept_newlines
from vidsieve.types import Selection, TokenGrid


@dataclass(frozen=True)
class PlacedVideo:
    """A video's tokens in a prompt of a batch: its row, grid, those placed, their columns, those of its newlines."""

    row: int
    columns: Tensor
    grid: TokenGrid
    newlines: Tensor
    per_row: bool
    indices: Tensor
    groups: Tensor | None = None
    placed_newlines: Tensor | None = None
    """Which of all the video's newlines (E',) bool are placed; None: all."""

    def at(self, indices: Tensor) -> Tensor:
        """Return the columns of grid tokens, raster indices among those placed."""
        return self.columns[torch.searchsorted(self.indices, indices.to(self.indices.device))]

    def kept_newlines(self, indices: Tensor) -> Tensor:
        """Return which newlines (E,) bool stay beside the grid tokens `indices` (K,)."""
        if self.placed_newlines is None:
            return kept_newlines(indices, len(self.newlines), self.grid, self.per_row)
        everything = kept_newlines(indices, len(self.placed_newlines), self.grid, self.per_row)
        return everything[self.placed_newlines.to(everything.device)]


def place(encoded: Encoded, kept_positions: Tensor, selections: Sequence[Selection]) -> tuple[PlacedVideo, ...]:
    """Return where the selected tokens of each video stand in the pruned prompts."""
    placed = []
    for span, selection in zip(encoded.videos, selections, strict=True):
        # Padding may have moved from the right to the left.
        kept, indices = kept_positions[span.row], selection.indices.to(span.columns.device)
        tail = span.features.kept_tail(indices)
        newlines = span.tail_columns[tail]
        columns, ends = (torch.searchsorted(kept, some.contiguous()) for some in (span.columns[indices], newlines))
        grid, per_row = span.features.grid, span.features.per_row
        placed.append(PlacedVideo(span.row, columns, grid, ends, per_row, indices, selection.groups, tail))
    return tuple(placed)
