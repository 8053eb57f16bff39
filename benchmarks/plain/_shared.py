"""What several releases do alike."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def eager_attention(query: Tensor, key: Tensor, causal: bool = True) -> Tensor:
    """Return the whole attention (…, H, L, L) of queries and keys (…, H, L, d), as a model that returns it does."""
    scores = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5
    if causal:
        length = query.shape[-2]
        scores = scores + torch.full((length, length), -torch.inf).triu(1)
    return F.softmax(scores, dim=-1, dtype=torch.float32)


def density_peaks(tokens: Tensor, count: int, neighbours: int, noise: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return the centres (count,), best first, and the cluster (n,) of every token (n, D): DPC-kNN."""
    size = len(tokens)
    distance = torch.cdist(tokens, tokens) / tokens.shape[-1] ** 0.5
    nearest, _ = distance.topk(neighbours, dim=-1, largest=False)
    density = (-(nearest**2).mean(-1)).exp()
    if noise is not None:
        density = density + noise * 1e-6
    mask = (density[None, :] > density[:, None]).float()
    apart, _ = (distance * mask + distance.max() * (1 - mask)).min(-1)
    chosen = (apart * density).topk(count).indices
    cluster = distance[chosen].argmin(0)
    cluster[chosen] = torch.arange(count)
    assert len(cluster) == size
    return chosen, cluster
