"""The tokens of a stream that are kept, and which of old and new ones stay."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vidsieve.selection import top_indices
from vidsieve.types import TokenGrid


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
class State:
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
