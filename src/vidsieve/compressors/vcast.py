"""V-CAST: more tokens for frames where the video turns, and in every frame the tokens unlike it and of large norm."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from vidsieve.compressors.base import Compressor, within
from vidsieve.selection import allocate_frames, top_indices_per_frame
from vidsieve.types import Selection, TokenGrid, VideoTokens

_EPSILON = 1e-6


@dataclass(frozen=True)
class VCast(Compressor):
    """Share the budget between frames by the curvature of the path that their means take; keep tokens that stand out.

    The curvature at a frame is 1 − cos of the step into it and the step out of it. A softmax of curvatures gives the
    frames' shares: the largest ratio of two is e^(2 / temperature), 17 as published. In a frame a token scores by how
    unlike the frame's mean it is, plus its norm. Blind to the question.

    Parameters
    ----------
    temperature : float
        Of the softmax over frames; lower values give more to frames where the video turns.
    least : int
        Tokens that every frame keeps, where the budget reaches that far.

    Variants: ``"ours"`` keeps exactly ⌊R·N⌋ tokens, shared by largest remainder; scores are float32. ``"official"``
    keeps R·N tokens rounded half to even, but one a frame at the least, and hands all tokens that rounding leaves over
    to one frame until it is full. ``docs/methods/vcast.md`` lists the other differences from the release.

    References
    ----------
    V-CAST (arXiv 2603.27650); xinyouu/V-CAST @ c235ef3, compressor/v_cast/modeling_qwen3_vl_v_cast.py.
    """

    name: ClassVar[str] = "vcast"
    paper: ClassVar[str] = "V-CAST (arXiv 2603.27650)"
    variants: ClassVar[tuple[str, ...]] = ("ours", "official")
    adaptive_variants: ClassVar[tuple[str, ...]] = ("official",)
    temperature: float = within(0.7, "(0, inf)")
    least: int = within(1, "[0, inf)")

    def _select(self, video: VideoTokens, budget: int, generator: Generator) -> Selection:
        grid = video.grid
        frames = video.embeds.reshape(grid.frames, grid.per_frame, -1)
        with torch.no_grad():
            dtype = frames.dtype if self.variant == "official" else torch.float32
            means = torch.stack([frame.to(dtype).mean(0) for frame in frames])
            centres = F.normalize(means, dim=-1, eps=_EPSILON)
            weights = torch.softmax(curvature(centres).float() / self.temperature, 0)
            scores = prominence(frames, centres).flatten()
        if self.adaptive_budget:
            if grid.frames == 1:  # an image to the release, which it leaves alone
                return Selection(torch.arange(grid.num_tokens, device=scores.device), scores=scores)
            total = max(1, round(grid.num_tokens * float(self.budget_ratio(grid.num_tokens))))
            counts = official_counts(weights, total, grid, min(self.least, grid.per_frame))
        else:
            floor = min(self.least, budget // grid.frames)
            counts = allocate_frames(weights, budget, grid.per_frame, floor)
        return Selection(top_indices_per_frame(scores, grid, counts), scores=scores, frame_scores=weights)


def curvature(centres: Tensor) -> Tensor:
    """Return the curvature (T,) in [0, 2] of a path through unit vectors (T, D); 1 at both ends and where it stands."""
    curved = torch.ones(len(centres), dtype=centres.dtype, device=centres.device)
    if len(centres) > 2:
        steps = centres[1:] - centres[:-1]
        curved[1:-1] = 1 - F.cosine_similarity(steps[:-1], steps[1:], dim=-1, eps=_EPSILON)
    return curved


def prominence(frames: Tensor, centres: Tensor) -> Tensor:
    """Return the score (T, n) float32 of each token of frames (T, n, D) around unit centres (T, D).

    1 − cosine to the centre, plus the norm, scaled to 0 … 1 within the frame.
    """
    scores = []
    for frame, centre in zip(frames, centres, strict=True):  # no second copy of the video
        norm = frame.float().norm(dim=-1)
        unlike = 1 - F.normalize(frame.to(centre.dtype), dim=-1, eps=_EPSILON) @ centre
        scores.append(unlike.float() + (norm - norm.min()) / (norm.max() - norm.min() + _EPSILON))
    return torch.stack(scores)


def official_counts(weights: Tensor, total: int, grid: TokenGrid, least: int) -> Tensor:
    """Return the release's counts (T,) int64: what rounding leaves over goes to one frame until it is full.

    They add up to `total`, or to `least` a frame where that is more.
    """
    cap = max(min(total, grid.num_tokens) - least * grid.frames, 0)
    shares = weights * cap
    counts = (least + shares.floor().long()).clamp(max=grid.per_frame)
    left = least * grid.frames + cap - int(counts.sum())
    for frame in torch.sort(shares - shares.floor(), descending=True, stable=True).indices.tolist():
        given = min(left, grid.per_frame - int(counts[frame]))
        counts[frame] += given
        left -= given
    return counts
