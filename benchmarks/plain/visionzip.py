"""VisionZip of a tower with a class token: a layer's whole attention, all frames at once (dvlab-research/VisionZip)."""

from __future__ import annotations

import torch
from torch import Tensor


def select(attention: Tensor, metric: Tensor, hidden: Tensor, dominant: int, contextual: int) -> tuple[Tensor, Tensor]:
    """Return the dominant places (T, dominant), class token first, and tokens (T, dominant + contextual + 1, D).

    Parameters
    ----------
    attention : Tensor, (T, H, n) or (T, H, n, n)
        The class token's row of a layer's attention, or all rows.
    metric : Tensor, (T, n, d), and hidden : Tensor, (T, n, D)
        Mean keys and hidden states, class token first.
    """
    rows = attention[:, :, 0] if attention.ndim == 4 else attention
    best = rows[:, :, 1:].sum(1).topk(dominant, dim=1).indices + 1
    best = torch.cat([torch.zeros(len(best), 1, dtype=best.dtype), best], 1)
    mask = torch.ones(hidden.shape[:2], dtype=torch.bool).scatter_(1, best, False)
    kept = hidden.masked_select(~mask[..., None]).view(len(hidden), dominant + 1, -1)
    left = metric[mask].view(len(hidden), -1, metric.shape[-1])
    states = hidden.masked_select(mask[..., None]).view(len(hidden), left.shape[1], -1)
    unit = left / left.norm(dim=-1, keepdim=True)
    step = max(1, unit.shape[1] // contextual)
    targets = torch.arange(0, unit.shape[1], step)[:contextual]
    others = ~torch.isin(torch.arange(unit.shape[1]), targets)
    similarity = unit[:, others] @ unit[:, targets].transpose(1, 2)
    owner = torch.zeros_like(similarity).scatter_(2, similarity.argmax(2)[..., None], 1)
    count = owner.sum(1).clamp(min=1)[..., None]
    merged = owner.transpose(1, 2) @ states[:, others] / count
    return best, torch.cat([kept, states[:, targets] + merged], 1)
