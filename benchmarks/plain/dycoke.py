"""DyCoke's merging over time: frame by frame in windows of four (KD-TAO/DyCoke)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def select(frames: Tensor, merged: float) -> Tensor:
    """Return kept raster indices in the release's order, of frames (T, n, D); `merged` is the share that goes."""
    count, size = frames.shape[:2]
    keep = int((1 - merged) * size)
    order = {frame: torch.arange(size) for frame in range(count // 2 * 2)}

    def least(frame: int, reference: int) -> Tensor:
        return F.cosine_similarity(frames[frame], frames[reference], dim=-1).topk(keep, largest=False).indices

    for frame in range(0, count - 1, 2):
        order[frame + 1] = least(frame + 1, frame)
    for frame in range(0, count - 4, 4):
        order[frame + 2] = least(frame + 2, frame)
    return torch.cat([places + frame * size for frame, places in sorted(order.items())])
