"""Families that encode a video piece by piece, and whose inputs do not tell which pieces are one video."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from vidsieve.adapters.adapter import Adapter
from vidsieve.adapters.encoded import ImageSpan, VideoFeatures, VideoSpan
from vidsieve.adapters.family import Videos
from vidsieve.adapters.locate import check_count
from vidsieve.compressors.front import Front
from vidsieve.errors import PromptError, UnsupportedCallError
from vidsieve.types import Need, Stage, TokenGrid

Encoding = tuple[Tensor, int, int]
"""A piece that is not located: features (n, D), and the rows and columns of its tokens."""


@dataclass(frozen=True)
class Piece:
    """A frame, or a part of one, in a batch of prompts: a run of placeholders.

    Parameters
    ----------
    columns, embeds : Tensor, (n,) int64 and (n, D)
    height, width : int
        Tokens along its sides.
    gap : int
        Tokens between the piece before and this one; for the first of a prompt all before it.
    """

    row: int
    columns: Tensor
    embeds: Tensor
    height: int
    width: int
    gap: int


Frames = tuple[Sequence[Sequence[Piece]], int]
"""Equal frames, each of pieces that tile it row by row, and the number of pieces in such a row."""


class PieceAdapter(Adapter):
    """Base of families that tell videos apart by what lies between their pieces in the prompt."""

    fronts: ClassVar[frozenset[Stage]] = frozenset()
    lacks: ClassVar[Mapping[Need | Stage, str]] = dict.fromkeys(
        [Stage.FRAME, Stage.ENCODER], "which of the encoded pictures are frames of one video, the prompt tells"
    )

    @abstractmethod
    def pieces(self, inputs: Mapping[str, Any]) -> list[Encoding]:
        """Return every piece of a batch, encoded by the model's vision tower and projector, in order."""

    @abstractmethod
    def grids(self, pieces: Sequence[Piece], ids: Tensor) -> Iterator[Frames]:
        """Return the grids that the pieces of one prompt (L,) form; each is a video to methods."""

    def limit_frames(self, processor: Any, tokens: int) -> None:
        """Raise UnsupportedCallError: the processor alone makes a frame's size, and its slices."""
        raise UnsupportedCallError(
            f"the size of {self.family}'s frames, and their slices, are set in its video processor: leave the limit out"
        )

    def video_features(self, inputs: Mapping[str, Any]) -> list[VideoFeatures]:
        """Return all pieces of the batch as if they were one video.

        Raises
        ------
        UnsupportedCallError
            If they differ in size.
        """
        pieces = self.pieces(inputs)
        shapes = {piece[1:] for piece in pieces}
        if len(shapes) > 1:
            raise UnsupportedCallError(
                f"the video's frames have {len(shapes)} sizes, slices counted, and are no single grid of tokens: let "
                "the processor give frames of one size, without slices and stacks"
            )
        embeds = torch.cat([piece[0] for piece in pieces])
        return [VideoFeatures(embeds, TokenGrid(len(pieces), *shapes.pop()), embeds[:0])]

    def locate(
        self,
        ids: Tensor,
        inputs: Mapping[str, Any],
        videos: Videos,
        needs: frozenset[Need],
        front: Front | None = None,
    ) -> tuple[tuple[VideoSpan, ...], tuple[ImageSpan, ...]]:
        """Return every grid of frames and every prompt's still images, located by their placeholders."""
        self.check_front(front, inputs)
        pieces = find_pieces(ids, self.video_token_id, self.pieces(inputs))
        spans = []
        for row in dict.fromkeys(piece.row for piece in pieces):
            spans += [span_of(*grid) for grid in self.grids([p for p in pieces if p.row == row], ids[row])]
        return tuple(spans), self.locate_images(ids, inputs)


def find_pieces(ids: Tensor, token_id: int, encodings: Sequence[Encoding]) -> list[Piece]:
    """Return the place of each piece among the placeholders `token_id` of prompts (B, L).

    Raises
    ------
    PromptError
        If placeholders and pieces do not agree.
    """
    rows, columns = (ids == token_id).nonzero(as_tuple=True)
    sizes = [len(embeds) for embeds, _, _ in encodings]
    check_count(len(rows), sum(sizes), "video")
    found, row, end = [], -1, 0
    for mine, where, encoding in zip(torch.split(rows, sizes), torch.split(columns, sizes), encodings, strict=True):
        first, last = int(where[0]), int(where[-1])
        if int(mine[0]) != int(mine[-1]) or last - first >= len(where):
            raise PromptError(
                "the placeholders of a frame, or of a slice of one, do not lie side by side: use the processor that "
                "belongs to the model"
            )
        gap = first - end if int(mine[0]) == row else first
        row, end = int(mine[0]), last + 1
        found.append(Piece(row, where, *encoding, gap))
    return found


def span_of(frames: Sequence[Sequence[Piece]], across: int) -> VideoSpan:
    """Return equal frames as a video (T, H, W), the pieces of a frame laid out in rows of `across`."""
    first = frames[0][0]
    down = len(frames[0]) // across
    grid = TokenGrid(len(frames), down * first.height, across * first.width)

    def raster(parts: list[Tensor]) -> Tensor:
        tiles = torch.stack(parts)
        tiles = tiles.reshape(len(frames), down, across, first.height, first.width, *tiles.shape[2:]).transpose(2, 3)
        return tiles.flatten(0, 4)

    pieces = [piece for frame in frames for piece in frame]
    columns, embeds = raster([piece.columns for piece in pieces]), raster([piece.embeds for piece in pieces])
    return VideoSpan(first.row, columns, columns[:0], VideoFeatures(embeds, grid, embeds[:0]), columns[:0])
