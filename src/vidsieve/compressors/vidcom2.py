"""VidCom²: more tokens for frames that are unlike the video, and in every frame the tokens unlike it and the frame."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Generator, Tensor

from vidsieve.compressors.base import Compressor
from vidsieve.selection import frame_ranks, other_indices, top_indices
from vidsieve.types import Selection, TokenGrid, VideoTokens

_WIDTHS = (0.125, 0.25, 0.5, 1.0, 2.0)
_TEMPERATURE = 0.01
_BLOCK = 64
"""Tokens that are worked on at once."""


@dataclass(frozen=True)
class VidCom2(Compressor):
    """Keep the tokens that are least like the mean of their frame and of the video.

    Likeness is a sum of Gaussians of the distance between unit vectors over the half of the channels that varies least.
    A frame's share of the budget grows with how unlike the video its tokens are; as shares are a softmax at a low
    temperature, one frame gets up to twice its part and the others a little less. Blind to the question.

    Variants: ``"ours"`` keeps exactly ⌊R·N⌋ tokens: where rounding the frames' shares gives too many, the most alike
    go, where it gives too few, the least alike of the others come back. Scores are float32. ``"official"`` rounds the
    share of every frame half to even, at least one token, and scores in the tokens' own dtype.
    ``docs/methods/vidcom2.md`` lists the other differences from the release and from vLLM's port.

    References
    ----------
    VidCom², EMNLP 2025 (arXiv 2505.14454); xuyang-liu16/VidCom2 @ 944a17d, token_compressor/vidcom2/vidcom2.py;
    vllm-project/vllm vllm/multimodal/video_prune/vidcom2.py @ 0f17ee0.
    """

    name: ClassVar[str] = "vidcom2"
    paper: ClassVar[str] = "VidCom², EMNLP 2025"
    variants: ClassVar[tuple[str, ...]] = ("ours", "official")
    adaptive_variants: ClassVar[tuple[str, ...]] = ("official",)

    def _select(self, video: VideoTokens, budget: int, generator: Generator) -> Selection:
        grid = video.grid
        frames = video.embeds.reshape(grid.frames, grid.per_frame, -1)
        with torch.no_grad():
            to_video, to_frame = likeness(frames, None if self.variant == "official" else torch.float32)
            shares = frame_shares(to_video, float(self.budget_ratio(grid.num_tokens)))
        alike = to_video + to_frame  # (T, n)
        chosen = kept_by_shares(alike, shares, grid)
        if not self.adaptive_budget:
            chosen = corrected(alike, chosen, budget)
        return Selection(chosen, scores=-alike.flatten().float(), frame_scores=shares.float())


def low_variance_channels(tokens: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Return the ⌊D/2⌋ channels of tokens (…, D) whose variance over all tokens is least, sorted, int64.

    Variances are rounded to `dtype` before they are compared; default: that of the tokens.
    """
    return top_indices(-_variance(tokens.flatten(0, -2)).to(dtype or tokens.dtype), tokens.shape[-1] // 2)


def _variance(tokens: Tensor) -> Tensor:
    """Return the variance (D,) float64 of each channel of tokens (N, D), 0 where all are equal.

    Each block is read once: its variance about its own mean, and then that of the blocks' means.
    """
    wide = torch.promote_types(tokens.dtype, torch.float32)
    first, buffer = tokens[:1].to(wide), tokens.new_empty(min(_BLOCK, len(tokens)), tokens.shape[1], dtype=wide)
    blocks, means, within = torch.split(tokens, _BLOCK), [], []
    for block in blocks:
        moved = torch.sub(block, first, out=buffer[: len(block)])
        means.append(moved.mean(0))
        within.append(moved.sub_(means[-1]).square_().sum(0))
    weights = torch.tensor([len(block) for block in blocks], dtype=torch.float64, device=tokens.device) / len(tokens)
    centres = torch.stack(means).double()
    between = weights @ (centres - weights @ centres).square()
    return torch.stack(within).double().sum(0) / len(tokens) + between


def likeness(frames: Tensor, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """Return the likeness (T, n) of each token of frames (T, n, D) to the video's mean, and to its frame's mean.

    Computed in `dtype`; default: that of the frames. Channels are left out by a factor of 0, and unit vectors are
    computed twice, so that a block of tokens is all the memory that is needed.
    """
    dtype = dtype or frames.dtype
    factors = frames.new_zeros(frames.shape[2], dtype=dtype)
    factors[low_variance_channels(frames, dtype)] = 1
    buffer = frames.new_empty(min(_BLOCK, frames.shape[1]), frames.shape[2], dtype=dtype)
    wide = torch.promote_types(dtype, torch.float32)

    lengths, means, to_frame = frames.new_empty(*frames.shape[:2], 1, dtype=dtype), [], []

    def masked(block: Tensor) -> Tensor:
        return torch.mul(block, factors, out=buffer[: len(block)])

    def squared(frame: Tensor, length: Tensor, centre: Tensor) -> Tensor:
        parts = zip(torch.split(frame, _BLOCK), torch.split(length, _BLOCK), strict=True)
        return torch.cat([masked(block).div_(own).sub_(centre).square_().sum(1) for block, own in parts])

    for frame, length in zip(frames, lengths, strict=True):
        total = torch.zeros_like(factors, dtype=wide)
        for block, own in zip(torch.split(frame, _BLOCK), torch.split(length, _BLOCK), strict=True):
            part = masked(block)
            own.copy_(torch.linalg.vector_norm(part, dim=1, keepdim=True)).clamp_(min=1e-12)  # as F.normalize
            total += part.div_(own).sum(0, dtype=wide)
        means.append(total / len(frame))
        to_frame.append(squared(frame, length, means[-1].to(dtype)))
    middle = torch.stack(means).mean(0).to(dtype)
    to_video = [squared(frame, length, middle) for frame, length in zip(frames, lengths, strict=True)]
    return _gaussians(torch.stack(to_video)), _gaussians(torch.stack(to_frame))


def _gaussians(squared: Tensor) -> Tensor:
    return torch.stack([torch.exp(-squared / (2 * width)) for width in _WIDTHS]).sum(0)


def frame_shares(to_video: Tensor, ratio: float) -> Tensor:
    """Return the fraction (T,) of every frame that is kept, at most 1, from likeness to the video (T, n)."""
    unlike = -to_video.mean(1)
    weights = torch.softmax((unlike - unlike.max()) / _TEMPERATURE, 0)
    return (ratio * (1 + weights - weights.mean())).clamp(max=1)


def kept_by_shares(alike: Tensor, shares: Tensor, grid: TokenGrid) -> Tensor:
    """Return the tokens (K,) int64 that the release keeps: its share of every frame, half to even, the least alike."""
    counts = (shares * grid.per_frame).round().long().clamp(min=1)
    return (frame_ranks(-alike.flatten(), grid) < counts[:, None]).flatten().nonzero().flatten()


def corrected(alike: Tensor, chosen: Tensor, count: int) -> Tensor:
    """Return `count` tokens (count,) int64: `chosen` without the most alike, or with the least alike of the others."""
    scores = -alike.flatten()
    if count <= len(chosen):
        return chosen[top_indices(scores[chosen], count)]
    others = other_indices(chosen, len(scores))
    back = others[top_indices(scores[others], count - len(chosen))]
    return torch.cat([chosen, back]).sort().values
