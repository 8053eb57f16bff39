"""Uniform: a regular sub-sample of space and time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Generator

from vidsieve.compressors.base import Compressor
from vidsieve.selection import even_counts
from vidsieve.types import Selection, VideoTokens

_GOLDEN = 0.6180339887498949


@dataclass(frozen=True)
class Uniform(Compressor):
    """Keep evenly spaced tokens of every frame, shifted from frame to frame.

    The budget is shared evenly by the frames. Inside a frame the kept tokens are equally far apart in
    raster order; the phase moves on by the golden ratio, so that consecutive frames show different places
    and a few frames together cover the grid.
    """

    name: ClassVar[str] = "uniform"
    paper: ClassVar[str] = "baseline"

    def _select(self, video: VideoTokens, budget: int, generator: Generator) -> Selection:
        grid = video.grid
        kept = []
        for frame, count in enumerate(even_counts(budget, grid.frames).tolist()):
            phase = (frame * _GOLDEN) % 1.0
            places = ((torch.arange(count, dtype=torch.float64) + phase) * grid.per_frame / max(count, 1)).long()
            kept.append(places + frame * grid.per_frame)
        return Selection(torch.cat(kept).to(video.embeds.device))
