"""EVS: keep the tokens that changed most since the frame before, as vLLM does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Generator, Tensor

from vidsieve.compressors._clustering import along_time
from vidsieve.compressors.base import Compressor
from vidsieve.errors import BudgetError, SelectionError
from vidsieve.selection import least_retention, top_indices
from vidsieve.types import Selection, TokenGrid, Tokens, VideoTokens

FIRST_FRAME = 255.0
"""Dissimilarity of the first frame, which is compared with nothing: more than any cosine gives."""


@dataclass(frozen=True)
class EVS(Compressor):
    """Keep the tokens of the least cosine to the same place one frame before; the first frame stays whole.

    Later frames have no share of their own: one in which nothing changes vanishes. Blind to the question.

    Variants: ``"ours"`` keeps exactly ⌊R·N⌋ tokens and scores in float32; the first frame stays whole, so R cannot go
    below 1/T, and an error names it. ``"official"`` scores in the tokens' own dtype, where bfloat16 has few distinct
    cosines and ties favour early frames, takes the floor in floating point with q = 1 − R, as vLLM's
    ``--video-pruning-rate``, and keeps the first frame where the budget is smaller. vLLM numbers positions with a rule
    of its own (`recomputed_positions`); here tokens stay at theirs. The paper compares pixels, the release embeddings.

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
        frame, total = video.grid.per_frame, video.num_tokens
        if self.variant == "official" and not isinstance(self.retention, Tokens):
            return official_count(video.grid, 1 - self.retention)
        wanted = super().budget(video)
        if wanted < frame:
            raise BudgetError(
                f"{self.describe()}: the first frame stays whole, {frame} of {total} tokens in a grid of {video.grid}; "
                f"ask for a retention from {least_retention(frame, total):g} to 1"
            )
        return wanted

    def _select(self, video: VideoTokens, budget: int, generator: Generator) -> Selection:
        frames = video.embeds.reshape(video.grid.frames, video.grid.per_frame, -1)
        scores = dissimilarity(frames if self.variant == "official" else frames.float()).flatten()
        return Selection(top_indices(scores, budget), scores=scores.float())


def dissimilarity(frames: Tensor) -> Tensor:
    """Return (T, n): one minus the cosine of each token of frames (T, n, D) to its place one frame before."""
    changed = 1 - along_time(frames)
    return torch.cat([torch.full_like(frames[:1, :, 0], FIRST_FRAME), changed])


def official_count(grid: TokenGrid, pruning_rate: float) -> int:
    """Return how many tokens vLLM keeps: ⌊N·(1 − q)⌋ in floating point, at least one frame."""
    return max(grid.per_frame, int(grid.num_tokens * (1 - pruning_rate)))


# -- positions of vLLM's M-RoPE models ----------------------------------------------------------------------


def media_positions(grid: TokenGrid, tokens_per_second: float, seconds_per_grid: float) -> Tensor:
    """Return (N, 4) int64: time, row and column of every token, and the width of the grid, as vLLM stores them."""
    moments = (torch.arange(grid.frames) * tokens_per_second * seconds_per_grid).long()
    axes = torch.meshgrid(moments, torch.arange(grid.height), torch.arange(grid.width), indexing="ij")
    return torch.stack([*axes, torch.full_like(axes[0], grid.width)], -1).reshape(-1, 4)


def recomputed_positions(input_ids: Tensor, media: Sequence[Tensor], media_ids: Sequence[int]) -> tuple[Tensor, int]:
    """Return the positions of a pruned prompt as vLLM numbers them, and what decoding adds to a token's index.

    A medium's tokens keep time, row and column, counted from one past the text before it. Text behind it goes on one
    grid width later, which in long videos lies before the last of its tokens.

    Parameters
    ----------
    input_ids : Tensor, (L,), int64
        With one placeholder for every kept token.
    media : sequence of Tensor, (K, 4), int64
        `media_positions` of the kept tokens of each video or image, in the order of the prompt.
    media_ids : sequence of int
        Ids of the placeholders.

    Returns
    -------
    positions : Tensor, (3, L), int64
    delta : int
        The largest position plus one, minus L.

    Raises
    ------
    SelectionError
        If the prompt's placeholders are not as many as the kept tokens.
    """
    is_media = torch.isin(input_ids, torch.tensor(list(media_ids), device=input_ids.device))
    if int(is_media.sum()) != sum(len(kept) for kept in media):
        raise SelectionError(
            f"{int(is_media.sum())} placeholders in the prompt, but {sum(len(kept) for kept in media)} kept tokens"
        )
    parts: list[Tensor] = []
    cursor = following = 0
    places = is_media.nonzero().flatten()
    for kept in media:
        start, places = int(places[0]), places[len(kept) :]
        base = following + start - cursor
        parts += [_text(following, base), kept[:, :3].T + base]
        following, cursor = base + int(kept[-1, 3]), start + len(kept)
    parts.append(_text(following, following + len(input_ids) - cursor))
    positions = torch.cat([part.to(input_ids.device) for part in parts], 1)
    return positions, int(positions.max()) + 1 - len(input_ids)


def _text(start: int, stop: int) -> Tensor:
    return torch.arange(start, stop).expand(3, -1)
