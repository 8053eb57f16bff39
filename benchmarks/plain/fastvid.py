"""FastVID: segments, salient tokens, anchors that take in a whole segment (its LLaVA-Video form)."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from plain._shared import density_peaks

SEGMENTS, THRESHOLD, CONTEXT, STRIDE, WEIGHT, NEIGHBOURS = 8, 0.9, 0.4, 4, 0.6, 4


def segments(globals_: Tensor) -> list[int]:
    """Return the lengths of the segments of frame vectors (T, D)."""
    unit = F.normalize(globals_, dim=-1)
    similarity = (unit[:-1] * unit[1:]).sum(-1)
    cuts = set(similarity.topk(SEGMENTS - 1, largest=False).indices.tolist())
    cuts |= set((similarity < THRESHOLD).nonzero().flatten().tolist())
    edges = [-1, *sorted(cuts), len(globals_) - 1]
    return [b - a for a, b in pairwise(edges)]


def select(
    frames: Tensor, globals_: Tensor, saliency: Tensor, ratio: float, noise: Iterator[Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """Return kept raster indices, sorted, and tokens, of frames (T, n, D) and their saliency (T, n)."""
    size, share = frames.shape[1], int(frames.shape[1] * ratio)
    indices, rows, start = [], [], 0
    for length in segments(globals_):
        block, weights = frames[start : start + length], saliency[start : start + length]
        context = int(share * length * CONTEXT)
        salient = share * length - context
        each = [salient // length + (place < salient % length) for place in range(length)]
        anchored = [place for place in range(length) if (length - 1 - place) % STRIDE == 0]
        quota = dict.fromkeys(anchored, context // len(anchored))
        for place in anchored[len(anchored) - context % len(anchored) :]:
            quota[place] += 1
        free = torch.ones(length, size, dtype=torch.bool)
        for place in range(length):
            best = weights[place].topk(each[place]).indices
            free[place, best] = False
            indices.append(best + (start + place) * size)
            rows.append(block[place, best])
        for place in anchored:
            if not quota[place]:
                continue
            there = free[place].nonzero().flatten()
            piece = next(noise) if noise is not None else None
            chosen = there[density_peaks(block[place, there], quota[place], NEIGHBOURS, piece)[0]].sort().values
            source = free.clone()
            source[place, chosen] = False
            tokens, anchors = block[source], block[place, chosen]
            owner = (F.normalize(tokens, dim=-1) @ F.normalize(anchors, dim=-1).T).argmax(1)
            joins = F.one_hot(owner, len(chosen)).to(tokens)
            count = joins.sum(0)[:, None]
            own = (1 / (count + 1)).clamp(min=WEIGHT)
            own = torch.where(count > 0, own, torch.ones_like(own))
            rows.append(own * anchors + (1 - own) * (joins.T @ tokens) / count.clamp(min=1))
            indices.append(chosen + (start + place) * size)
        start += length
    kept, order = torch.cat(indices).sort()
    return kept, torch.cat(rows)[order]
