"""FrameFusion: likeness along every place in patch order, chains merged into their first (thu-nics/FrameFusion)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def similarity(tokens: Tensor, patch: Tensor) -> tuple[Tensor, Tensor]:
    """Return the patch order of tokens (n, D), and in it their cosine to the one before; −2 where a place begins."""
    order = torch.argsort(patch, stable=True)
    sorted_, place = tokens[order], patch[order]
    found = torch.full((len(tokens),), -2.0)
    alike = F.cosine_similarity(sorted_[:-1], sorted_[1:], dim=-1)
    found[1:] = torch.where(place[1:] == place[:-1], alike, torch.full_like(alike, -2.0))
    return order, found


def merge(tokens: Tensor, patch: Tensor, threshold: float, over: float) -> tuple[Tensor, Tensor]:
    """Return the tokens' places that stay, sorted, and their states: means of their chains."""
    order, alike = similarity(tokens, patch)
    merged = alike >= threshold
    if merged.float().mean() >= over:
        merged = torch.zeros_like(merged)
        merged[alike.topk(int(over * len(tokens))).indices] = True
        merged &= alike > -2
    chain = (~merged).cumsum(0) - 1
    sums = tokens.new_zeros(int(chain[-1]) + 1, tokens.shape[1]).index_add_(0, chain, tokens[order])
    means = sums / torch.bincount(chain)[:, None]
    kept, back = order[~merged].sort()
    return kept, means[back]
