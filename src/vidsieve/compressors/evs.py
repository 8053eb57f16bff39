"""EVS: keep the tokens that changed most since the frame before, as vLLM does."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Generator, Tensor

from vidsieve.compressors._clustering import along_time
from vidsieve.compressors.base import Compressor
from vidsieve.selection import top_indices
from vidsieve.types import Selection, TokenGrid, Tokens, VideoTokens

FIRST_FRAME = 255.0
"""Dissimilarity of the first frame, which has no predecessor: more than any cosine gives."""


@dataclass(frozen=True)
class EVS(Compressor):
    """Keep the tokens of the least cosine to the same place one frame before; the first frame stays whole.

    Later frames have no share of their own: one in which nothing changes vanishes. Blind to the question.

    Variants: ``"ours"`` keeps exactly ⌊R·N⌋ tokens and scores in float32; R cannot go below 1/T. ``"official"`` scores
    in the tokens' own dtype, takes the floor in floating point with q = 1 − R, as vLLM's ``--video-pruning-rate``, and
    keeps the first frame where the budget is smaller. ``docs/methods/evs.md`` lists the other differences.

    References
    ----------
    Efficient Video Sampling (arXiv 2510.14624); vllm-project/vllm vllm/multimodal/evs.py @ 926c71f.
    """

    name: ClassVar[str] = "evs"
    paper: ClassVar[str] = "EVS, arXiv 2510.14624"
    variants: ClassVar[tuple[str, ...]] = ("ours", "official")

    def budget(self, video: VideoTokens) -> int:
        """Return K.

        Raises
        ------
        BudgetError
            If it is less than the first frame, except under ``"official"`` with a retention ratio.
        """
        if self.variant == "official" and not isinstance(self.retention, Tokens):
            return official_count(video.grid, 1 - self.retention)
        return self.budget_above(video, video.grid.per_frame, "the first frame stays whole")

    def _select(self, video: VideoTokens, budget: int, generator: Generator) -> Selection:
        frames = video.embeds.reshape(video.grid.frames, video.grid.per_frame, -1)
        scores = dissimilarity(frames, None if self.variant == "official" else torch.float32).flatten()
        return Selection(top_indices(scores, budget), scores=scores.float())


def dissimilarity(frames: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Return 1 − the cosine (T, n) of each token of frames (T, n, D) to its place one frame before.

    Computed in `dtype`; default: that of the frames.
    """
    changed = 1 - along_time(frames, dtype)
    return torch.cat([changed.new_full((1, frames.shape[1]), FIRST_FRAME), changed])


def official_count(grid: TokenGrid, pruning_rate: float) -> int:
    """Return the number of tokens that vLLM keeps: ⌊N·(1 − q)⌋ in floating point, at least one frame."""
    return max(grid.per_frame, int(grid.num_tokens * (1 - pruning_rate)))
