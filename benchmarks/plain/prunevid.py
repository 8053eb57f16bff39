"""PruneVID: clusters of frames, what stands still by all pairs of frames, clusters; text rows inside the LLM."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from plain._shared import density_peaks

NEIGHBOURS = 7


def refined(labels: list[int]) -> list[int]:
    """Return labels of which every cluster keeps its longest runs; what is left joins the longer neighbour."""

    def runs(row: list[int]) -> list[list[int]]:
        found: list[list[int]] = []
        for place, label in enumerate(row):
            if found and found[-1][0] == label:
                found[-1][2] = place + 1
            else:
                found.append([label, place, place + 1])
        return found

    longest: dict[int, int] = {}
    for label, start, stop in runs(labels):
        longest[label] = max(longest.get(label, 0), stop - start)
    row = list(labels)
    for label, start, stop in runs(labels):
        if longest[label] == 1 or stop - start < longest[label]:
            row[start:stop] = [-1] * (stop - start)
    while -1 in row:
        found = runs(row)
        at = next(place for place, run in enumerate(found) if run[0] == -1)
        left = found[at - 1] if at else None
        right = found[at + 1] if at + 1 < len(found) else None
        taken = left
        if left is None or (right is not None and right[2] - right[1] > left[2] - left[1]):
            taken = right
        row[found[at][1] : found[at][2]] = [taken[0] if taken else 0] * (found[at][2] - found[at][1])
    return row


def clustered(tokens: Tensor, ratio: float, noise: Iterator[Tensor] | None) -> Tensor:
    """Return the means of a set's clusters, densest first."""
    count = int(len(tokens) * ratio) if len(tokens) > 14 else len(tokens)
    if count == len(tokens):
        return tokens
    piece = next(noise) if noise is not None else None
    _, cluster = density_peaks(tokens, count, NEIGHBOURS, piece)
    return torch.stack([tokens[cluster == number].mean(0) for number in range(count)]) if count else tokens[:0]


def select(
    frames: Tensor,
    segments: float = 0.25,
    threshold: float = 0.8,
    cluster: float = 0.5,
    noise: Iterator[Tensor] | None = None,
) -> list[Tensor]:
    """Return the tokens of every part, segment by segment, of frames (T, n, D)."""
    count = int(len(frames) * segments)
    piece = next(noise) if noise is not None else None
    _, labels = density_peaks(frames.mean(1), count, NEIGHBOURS, piece)
    row = refined(labels.tolist())
    edges = [0, *(place for place in range(1, len(row)) if row[place] != row[place - 1]), len(row)]
    made = []
    for start, stop in pairwise(edges):
        block, width = frames[start:stop], stop - start
        still = torch.zeros(frames.shape[1], dtype=torch.bool)
        if width > 1:
            unit = F.normalize(block.transpose(0, 1), dim=-1)  # (n, w, D)
            pairs = unit @ unit.transpose(1, 2)
            pairs = pairs.masked_fill(torch.eye(width, dtype=torch.bool), 0)
            still = pairs.sum((1, 2)) / (width * (width - 1)) > threshold
        if bool(still.any()):
            made.append(clustered(block[:, still].mean(0), cluster, noise))
        if not bool(still.all()):
            made += [clustered(frame[~still], cluster, noise) for frame in block]
    return made


def inside(attention: Tensor, start: int, length: int, words: Tensor, sizes: list[int], share: float) -> Tensor:
    """Return the places that stay of every group, best first, from whole attention (H, L, L) and text columns."""
    scores = attention[:, words, start : start + length].amax((0, 1))
    kept, first = [], 0
    for size in sizes:
        kept.append(scores[first : first + size].topk(int(size * share)).indices + first)
        first += size
    return torch.cat(kept)
