"""FastV: the last row of a layer's whole attention (pkunlp-icler/FastV)."""

from __future__ import annotations

import torch
from torch import Tensor


def select(attention: Tensor, start: int, length: int, keep: int) -> Tensor:
    """Return the columns that stay, sorted, of whole attention (H, L, L): `keep` of the video's, and all others."""
    last = attention.mean(0)[-1]
    best = last[start : start + length].topk(keep).indices + start
    return torch.cat([torch.arange(start), best, torch.arange(start + length, len(last))]).sort().values
