"""V-CAST: whole-video tensors, then a loop that hands out tokens and one that picks (xinyouu/V-CAST)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def select(frames: Tensor, ratio: float, least: int = 1) -> Tensor:
    """Return kept raster indices, sorted, of frames (T, n, D)."""
    count, size, _ = frames.shape
    centres = F.normalize(frames.mean(1), dim=-1, eps=1e-6)
    bend = torch.ones(count)
    if count > 2:
        steps = centres.diff(dim=0)
        bend[1:-1] = 1 - F.cosine_similarity(steps[:-1], steps[1:], dim=-1, eps=1e-6)
    weights = torch.softmax(bend / 0.7, 0)
    total = max(1, round(count * size * ratio), count * least)
    shares = weights * (total - count * least)
    counts = [min(size, least + int(share)) for share in shares]
    fractions = (shares - shares.floor()).tolist()
    for _ in range(min(total, count * size) - sum(counts)):  # a served frame keeps its fraction, and is served again
        counts[max((t for t in range(count) if counts[t] < size), key=fractions.__getitem__)] += 1
    norms = frames.norm(dim=-1)
    low, high = norms.amin(1, keepdim=True), norms.amax(1, keepdim=True)
    alike = torch.einsum("tnd,td->tn", F.normalize(frames, dim=-1, eps=1e-6), centres)
    scores = 1 - alike + (norms - low) / (high - low + 1e-6)
    kept = [scores[t].topk(keep).indices.sort().values + t * size for t, keep in enumerate(counts)]
    return torch.cat(kept)
