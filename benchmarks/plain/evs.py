"""EVS: change since the frame before, over the whole video (vLLM)."""

from __future__ import annotations

import torch
from torch import Tensor


def select(frames: Tensor, count: int) -> Tensor:
    """Return the `count` kept raster indices, sorted, of frames (T, n, D)."""
    similarity = torch.cosine_similarity(frames[1:], frames[:-1], dim=-1)
    change = torch.cat([255 * torch.ones_like(frames[:1, :, 0]), 1 - similarity]).view(-1)
    order = torch.argsort(change, dim=-1, descending=True, stable=True)
    mask = torch.zeros_like(change, dtype=torch.bool)
    mask[order[:count]] = True
    return mask.nonzero().flatten()
