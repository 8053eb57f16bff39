"""FlashVID: segments, tokens that differ, trees through time, clusters (its second form)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from plain._shared import density_peaks

NEIGHBOURS = 7


def segments(frames: Tensor, least: int, threshold: float) -> list[tuple[int, int]]:
    """Return the segments (start, stop) of frames (T, n, D)."""
    unit = F.normalize(frames.mean(1), dim=-1)
    similarity = (unit[:-1] * unit[1:]).sum(-1)
    below = similarity < threshold
    cuts, missing = below.nonzero().flatten().tolist(), least - 1 - int(below.sum())
    if missing > 0:
        rest = similarity.masked_fill(below, 1.0)
        cuts += rest.topk(min(missing, len(rest)), largest=False).indices.tolist()
    return list(pairwise([0, *(cut + 1 for cut in sorted(cuts)), len(frames)]))


def picks(frames: Tensor, attention: Tensor, count: int, event: bool) -> Tensor:
    """Return `count` tokens of every frame of a segment (L, n, D), each the farthest from those before, sorted."""
    unit = F.normalize(frames, dim=-1)
    distance = (1 - unit @ unit.mT) * attention[:, None] * 1e6
    if event:
        distance = distance * torch.einsum("lnd,md->lmn", frames, frames.mean(1)).mean(1)[:, None]
    row = torch.arange(len(frames))[:, None]
    chosen = distance.topk(2, dim=1, largest=False).values[:, 1].argmax(-1, keepdim=True)
    for _ in range(1, count):
        nearest = distance[row, chosen].amin(1)
        if not event:
            nearest.scatter_(1, chosen, -1.0)
        chosen = torch.cat([chosen, nearest.argmax(-1, keepdim=True)], 1)
    return chosen.sort(1).values


def trees(frames: Tensor, free: Tensor, threshold: float, least: int) -> tuple[list[Tensor], list[Tensor]]:
    """Return the places that are left in each frame of (L, n, D), and their tokens; sums go back frame by frame."""
    length, size = free.shape
    unit = F.normalize(frames, dim=-1)
    similarity = unit[1:] @ unit[:-1].mT
    similarity = similarity.masked_fill(~(free[1:, :, None] & free[:-1, None]), -1.0)
    best, parent = similarity.max(-1)
    best = torch.cat([torch.full((1, size), -1.0), best])
    linked = best > threshold
    if int((~linked).sum()) < least:
        linked = best > best.flatten().topk(length * size - least).values[-1]
    total, count = frames.clone(), torch.ones(length, size, 1)
    for frame in range(length - 1, 0, -1):
        joins = F.one_hot(parent[frame - 1][linked[frame]], size).to(frames)
        total[frame - 1] += joins.T @ total[frame][linked[frame]]
        count[frame - 1] += joins.sum(0)[:, None]
    left = free & ~linked
    return [row.nonzero().flatten() for row in left], [(total[t] / count[t])[left[t]] for t in range(length)]


def select(
    frames: Tensor,
    attention: Tensor,
    ratio: float,
    alpha: float = 0.7,
    threshold: float = 0.8,
    least: int = 8,
    cut_below: float = 0.9,
    event: bool = True,
    noise: Iterator[Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Return kept raster indices and tokens, segment by segment, of frames (T, n, D) and their attention (T, n)."""
    size = frames.shape[1]
    budget = math.ceil(size * ratio * 1.25)
    picked = math.ceil(budget * alpha)
    indices, rows = [], []
    for start, stop in segments(frames, least, cut_below):
        block, length = frames[start:stop], stop - start
        if not length:
            continue
        chosen = picks(block, attention[start:stop], picked, event)
        indices.append((chosen + torch.arange(start, stop)[:, None] * size).flatten())
        rows.append(block.gather(1, chosen[..., None].expand(-1, -1, block.shape[-1])).flatten(0, 1))
        merged = (budget - picked) * length
        if not merged:
            continue
        places, tokens = [torch.arange(size)], [block[0]]
        if length > 1:
            free = torch.ones(length, size, dtype=torch.bool).scatter(1, chosen, False)
            places, tokens = trees(block, free, threshold, budget * length)
        share = merged / sum(map(len, places))
        for frame, (there, own) in enumerate(zip(places, tokens, strict=True)):
            count = math.ceil(len(there) * share)
            if count and share < 1:
                piece = next(noise) if noise is not None else None
                centres, cluster = density_peaks(own, count, min(count, NEIGHBOURS), piece)
                joins = F.one_hot(cluster, count).to(own)
                there, own = there[centres], (joins.T @ own) / joins.sum(0)[:, None]
            indices.append(there + (start + frame) * size)
            rows.append(own)
    return torch.cat(indices), torch.cat(rows)
