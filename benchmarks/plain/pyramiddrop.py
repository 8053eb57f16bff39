"""PyramidDrop: queries and keys of the whole prompt anew before a stage, of which the last row is read."""

from __future__ import annotations

from torch import Tensor


def select(query: Tensor, key: Tensor, start: int, length: int, keep: int) -> Tensor:
    """Return the video's places that stay, sorted, from queries and keys (H, L, d) of the whole prompt."""
    scores = query[:, -1:] @ key.transpose(1, 2) / query.shape[-1] ** 0.5
    weights = scores.softmax(-1).mean(0)[0]
    return weights[start : start + length].topk(keep).indices.sort().values
