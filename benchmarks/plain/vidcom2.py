"""VidCom²: every difference to both means at once, a loop over frames (xuyang-liu16/VidCom2)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

WIDTHS = [2**k for k in range(-3, 2)]


def gaussians(distance: Tensor) -> Tensor:
    """Return the sum of Gaussians of squared distances."""
    return torch.stack([torch.exp(-distance / (2 * width)) for width in WIDTHS]).sum(0)


def select(frames: Tensor, ratio: float) -> Tensor:
    """Return kept raster indices, sorted, of frames (T, n, D)."""
    count, size, width = frames.shape
    channels = frames.reshape(-1, width).var(0, unbiased=False).topk(width // 2, largest=False).indices
    unit = F.normalize(frames[..., channels], dim=-1)
    video = unit.mean((0, 1), keepdim=True).expand_as(unit)
    frame = unit.mean(1, keepdim=True).expand_as(unit)
    to_video = gaussians(((unit - video) ** 2).sum(-1))
    to_frame = gaussians(((unit - frame) ** 2).sum(-1))
    unlike = -to_video.mean(-1)
    weights = torch.softmax((unlike - unlike.max()) / 0.01, 0)
    shares = (ratio * (1 + weights - weights.mean())).clamp(max=1)
    kept = []
    for place in range(count):
        keep = max(1, int(torch.round(shares[place] * size)))
        best = (-(to_video[place] + to_frame[place])).topk(keep).indices.sort().values
        kept.append(best + place * size)
    return torch.cat(kept)
