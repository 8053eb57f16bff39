"""VidCom²: more tokens for frames that are unlike the video, and in every frame the tokens unlike it and the frame."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from vidsieve.compressors.base import Compressor
from vidsieve.selection import frame_ranks, other_indices, top_indices
from vidsieve.types import Selection, TokenGrid, VideoTokens

_WIDTHS = (0.125, 0.25, 0.5, 1.0, 2.0)
_TEMPERATURE = 0.01


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
            to_video, to_frame = likeness(frames if self.variant == "official" else frames.float())
            shares = frame_shares(to_video, float(self.budget_ratio(grid.num_tokens)))
        alike = to_video + to_frame  # (T, n)
        chosen = kept_by_shares(alike, shares, grid)
        if not self.adaptive_budget:
            chosen = corrected(alike, chosen, budget)
        return Selection(chosen, scores=-alike.flatten().float(), frame_scores=shares.float())


def low_variance_channels(tokens: Tensor) -> Tensor:
    """Return the ⌊D/2⌋ channels of tokens (…, D) whose variance over all tokens is least, sorted, int64."""
    variance = tokens.flatten(0, -2).var(0, unbiased=False)
    return top_indices(-variance, tokens.shape[-1] // 2)


def likeness(frames: Tensor) -> tuple[Tensor, Tensor]:
    """Return the likeness (T, n) of each token of frames (T, n, D) to the video's mean, and to its frame's mean."""
    unit = F.normalize(frames[..., low_variance_channels(frames)], dim=-1)
    return _gaussians(unit, unit.mean((0, 1), keepdim=True)), _gaussians(unit, unit.mean(1, keepdim=True))


def _gaussians(unit: Tensor, centre: Tensor) -> Tensor:
    pairs = zip(unit, centre.expand(len(unit), -1, -1), strict=True)  # frame by frame: no second copy of the video
    squared = torch.stack([(frame - middle).square().sum(-1) for frame, middle in pairs])
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
