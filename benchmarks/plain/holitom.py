"""HoliTom: every window of frames tried, static places merged over time, clusters; inside the LLM, one by one."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from plain._shared import density_peaks


def windows(same: Tensor, longest: int) -> list[tuple[int, int]]:
    """Return the windows (first, last frame) in which most places (T − 1, n) bool vanish."""
    frames = len(same) + 1
    best, back = [0] * (frames + 1), [0] * (frames + 1)
    for stop in range(1, frames + 1):
        best[stop], back[stop] = best[stop - 1], stop - 1
        for start in range(stop - 2, max(-1, stop - longest - 1), -1):
            vanish = int(same[start : stop - 1].all(0).sum()) * (stop - start - 1)
            if best[start] + vanish > best[stop]:
                best[stop], back[stop] = best[start] + vanish, start
    found, stop = [], frames
    while stop:
        found.append((back[stop], stop - 1))
        stop = back[stop]
    return found[::-1]


def select(
    frames: Tensor,
    attention: Tensor,
    ratio: float,
    threshold: float = 0.8,
    longest: int = 1024,
    neighbours: int = 7,
    weight: float = 0.6,
    noise: Iterator[Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Return kept raster indices and tokens, window by window, of frames (T, n, D) and their attention (T, n)."""
    count, size = frames.shape[:2]
    same = F.cosine_similarity(frames[:-1], frames[1:], dim=-1) > threshold
    found = windows(same, longest)
    gone = sum(int(same[a:b].all(0).sum()) * (b - a) for a, b in found if b > a)
    ratio = min(ratio / ((count * size - gone) / (count * size)), 1.0)
    indices, rows = [], []
    for first, last in found:
        static = same[first:last].all(0) if last > first else torch.zeros(size, dtype=torch.bool)
        still, moving = static.nonzero().flatten(), (~static).nonzero().flatten()
        if len(still):
            tokens, keep = frames[first : last + 1, still].mean(0), round(len(still) * ratio)
            piece = next(noise) if noise is not None else None
            if keep:
                chosen, _ = density_peaks(tokens, keep, min(neighbours, keep), piece)
                chosen = chosen.sort().values
                distance = torch.cdist(tokens, tokens) / tokens.shape[-1] ** 0.5
                owner = distance[chosen].argmin(0)
                owner[chosen] = torch.arange(keep)
                joins = F.one_hot(owner, keep).to(tokens)
                joins[chosen] = 0
                members = joins.sum(0)[:, None]
                means = (joins.T @ tokens) / members.clamp(min=1)
                merged = torch.where(members > 0, weight * tokens[chosen] + (1 - weight) * means, tokens[chosen])
                indices.append(still[chosen] + first * size)
                rows.append(merged)
        for frame in range(first, last + 1) if len(moving) else ():
            best = attention[frame, moving].topk(math.ceil(len(moving) * ratio)).indices.sort().values
            indices.append(moving[best] + frame * size)
            rows.append(frames[frame, moving[best]])
    return torch.cat(indices), torch.cat(rows)


def inside(hidden: Tensor, last_row: Tensor, keep: int) -> tuple[Tensor, Tensor]:
    """Return the places that stay of hidden (n, D), sorted, and their states, the others merged in one by one."""
    best = last_row.topk(keep).indices.sort().values
    others = (~torch.isin(torch.arange(len(hidden)), best)).nonzero().flatten()
    unit = F.normalize(hidden, dim=-1)
    nearest = (unit[others] @ unit[best].T).argmax(1)
    merged = hidden.clone()
    for other, owner in zip(others, best[nearest], strict=True):
        merged[owner] = (merged[owner] + merged[other]) / 2
    return best, merged[best]
