"""DivPrune: every step looks at all rows of what was picked before (vbdi/divprune)."""

from __future__ import annotations

import torch
from torch import Tensor


def picks(tokens: Tensor, count: int) -> Tensor:
    """Return `count` indices of tokens (N, D) in the order in which they are picked."""
    unit = tokens / tokens.norm(dim=1, keepdim=True)
    distance = 1.0 - unit @ unit.T
    chosen = torch.zeros(count, dtype=torch.int64)
    for step in range(count):
        rows = distance if step == 0 else distance[chosen[:step]]
        score = rows.min(0).values if step else rows.topk(2, dim=0, largest=False).values[1]
        chosen[step] = score.argmax()
    return chosen
