"""Downsample: pooled frames, the baseline that nobody may hide."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Generator, Tensor

from vidsieve.compressors.base import Compressor
from vidsieve.selection import even_counts
from vidsieve.types import Selection, VideoTokens


def tile_frame(height: int, width: int, tiles: int) -> Tensor:
    """Return the tile number (H, W) int64 of each place when a frame is cut into `tiles` near-square rectangles.

    Bands of rows, each cut into columns; band heights and column widths differ by at most one.
    """
    bands = min(height, tiles, max(1, round(math.sqrt(tiles * height / width)), math.ceil(tiles / width)))
    labels = torch.empty(height, width, dtype=torch.int64)
    rows = even_counts(height, bands).tolist()
    columns = even_counts(tiles, bands).tolist()
    top = first = 0
    for band_height, count in zip(rows, columns, strict=True):
        widths = even_counts(width, count)
        labels[top : top + band_height] = first + torch.repeat_interleave(torch.arange(count), widths)
        top, first = top + band_height, first + count
    return labels


@dataclass(frozen=True)
class Downsample(Compressor):
    """Replace each frame by average-pooled tiles, as many as the budget allows.

    The budget is shared evenly by the frames; a frame with n tokens is cut into n near-square rectangles and
    each becomes the mean of its tokens, at the index of the token nearest its centre. With fewer tokens than
    frames, neighbouring frames are pooled together, one token each. Lowering the resolution is what a user
    would do without any method, and it beats several published ones (VTC-Bench).
    """

    name: ClassVar[str] = "downsample"
    paper: ClassVar[str] = "baseline"

    def _select(self, video: VideoTokens, budget: int, generator: Generator) -> Selection:
        grid = video.grid
        labels = torch.empty(grid.frames, grid.per_frame, dtype=torch.int64).view(-1, grid.height, grid.width)
        if budget < grid.frames:
            lengths = even_counts(grid.frames, budget)
            labels[:] = torch.repeat_interleave(torch.arange(budget), lengths)[:, None, None]
        else:
            first = 0
            for frame, count in enumerate(even_counts(budget, grid.frames).tolist()):
                labels[frame] = first + tile_frame(grid.height, grid.width, count)
                first += count
        flat = labels.flatten()
        sizes = torch.bincount(flat, minlength=budget)
        device = video.embeds.device
        total = torch.zeros(budget, video.embeds.shape[1], dtype=torch.float32, device=device)
        for tile, tokens in zip(
            torch.split(flat.to(device), grid.per_frame), torch.split(video.embeds, grid.per_frame), strict=True
        ):
            total.index_add_(0, tile, tokens.float())  # frame by frame: no second copy of the video
        merged = (total / sizes.to(device)[:, None]).to(video.embeds.dtype)
        anchors = _anchors(flat, budget, labels.shape)
        order = anchors.argsort()
        return Selection(anchors[order].to(device), embeds=merged[order.to(device)])


def _anchors(labels: Tensor, tiles: int, shape: torch.Size) -> Tensor:
    """Return for each tile the raster index of its member nearest the tile's centre (first one on ties)."""
    places = torch.stack(torch.meshgrid(*(torch.arange(n) for n in shape), indexing="ij"), -1).reshape(-1, 3).double()
    sizes = torch.bincount(labels, minlength=tiles).double()
    centres = torch.zeros(tiles, 3, dtype=torch.float64).index_add(0, labels, places) / sizes[:, None]
    distance = (places - centres[labels]).square().sum(1)
    order = distance.argsort(stable=True)
    order = order[labels[order].argsort(stable=True)]
    starts = torch.cat([torch.zeros(1, dtype=torch.int64), sizes.long().cumsum(0)[:-1]])
    return order[starts]
