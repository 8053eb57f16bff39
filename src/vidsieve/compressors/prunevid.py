"""PruneVID: merge static places over segments and similar tokens in a frame; keep those that the text attends to."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby, pairwise
from typing import ClassVar

import torch
from torch import Generator, Tensor

from vidsieve.compressors._budgets import TwoPartCompressor
from vidsieve.compressors._clustering import Distances, Group, centres, cosines, frame_means, peak_scores, totals
from vidsieve.compressors.base import within
from vidsieve.compressors.inside import LayerChoice, LayerView
from vidsieve.errors import BudgetError
from vidsieve.selection import other_indices, proportional_counts, top_indices
from vidsieve.types import Selection, VideoTokens

_NEIGHBOURS, _FEW = 7, 14
"""Neighbours that make a density; sets of this many tokens are not clustered."""


@dataclass(frozen=True)
class PruneVID(TwoPartCompressor):
    """Merge places that stand still over a segment into one token each, then cluster the others frame by frame.

    Frames are clustered by density peaks into segments of neighbours. In a segment a place stands still if its tokens
    are alike in all pairs of frames (mean cosine above `threshold`). Static tokens are clustered once a segment, the
    others frame by frame; each cluster becomes its mean. Inside the LLM the tokens stay that any text behind the video
    attends to most, in any head.

    Parameters
    ----------
    threshold : float
        Mean cosine above which a place stands still.
    segments : float
        Clusters of frames as a share of the frames.
    cluster : float
        Share of a set's tokens that clustering leaves, in ``"official"``.
    layer, inner_kept, inner
        As in `TwoPartCompressor`: after layer 10, so from layer 11 of 32 on, where 0.4 stay.

    Variants: ``"ours"`` keeps exactly ⌊R·N⌋ tokens before the LLM, shared out by largest remainder; where merging over
    time leaves fewer, the places of later frames that are least like their mean are kept too. In ``"official"`` R only
    scales `cluster` (R = 0.25 leaves it unchanged), sets of 14 tokens or fewer are not clustered, and inside the LLM
    every set is rounded down. ``docs/methods/prunevid.md`` lists the other differences from the release.

    References
    ----------
    PruneVID, ACL 2025 (arXiv 2412.16117); Visual-AI/PruneVid @ b12600c, models/pllava.
    """

    name: ClassVar[str] = "prunevid"
    paper: ClassVar[str] = "PruneVID, ACL 2025"
    variants: ClassVar[tuple[str, ...]] = ("ours", "official")
    adaptive_variants: ClassVar[tuple[str, ...]] = ("official",)
    default_layer: ClassVar[tuple[int, int]] = (11, 32)
    inner_kept: float = within(0.4, "(0, 1]")
    threshold: float = within(0.8, "[-1, 1]")
    segments: float = within(0.25, "(0, 1]")
    cluster: float = within(0.5, "(0, 1]")

    def _select(self, video: VideoTokens, budget: int, generator: Generator) -> Selection:
        self.check_outer()
        grid = video.grid
        frames = video.embeds.reshape(grid.frames, grid.per_frame, -1)
        with torch.no_grad():
            labels = frame_labels(frame_means(frames), max(1, int(grid.frames * self.segments)))
            spans = runs_of(refined(labels))
        parts = split(frames, spans, self.threshold)
        sizes = [len(part.places) for part in parts]
        if self.adaptive_budget:
            share = min(1.0, self.cluster * self.budget_ratio(grid.num_tokens) / 0.25)
            counts = [official_count(size, share) for size in sizes]
            if not any(counts):
                raise BudgetError(f"the release rounds every cluster of {grid} tokens at {self.retention:g} to none")
        else:
            counts = proportional_counts(sizes, min(budget, sum(sizes)))
        clusters = [clustered(part, count) for part, count in zip(parts, counts, strict=True)]
        indices, rows = (torch.cat(pieces) for pieces in zip(*clusters, strict=True))
        groups = torch.repeat_interleave(torch.arange(len(parts)), torch.tensor(counts)).to(indices.device)
        if not self.adaptive_budget and len(indices) < budget:
            rest = other_indices(indices, grid.num_tokens)
            alike = likeness(frames, spans).flatten()
            more = rest[top_indices(-alike[rest], budget - len(indices))]
            indices, rows = torch.cat([indices, more]), torch.cat([rows, video.embeds[more]])
            groups = torch.cat([groups, torch.full_like(more, len(parts))])
        kept, order = indices.sort()
        return Selection(kept, rows[order], groups=groups[order])

    def step(self, view: LayerView, keep: int) -> LayerChoice:
        """Return the tokens that some text token attends to most in some head; of every group, in ``"official"``."""
        scores = view.attention("text", view.layer - 1).amax((0, 1))
        if self.variant != "official" or view.groups is None:
            return LayerChoice(top_indices(scores, keep))
        return LayerChoice(official_choice(scores, view.groups.to(scores.device), self.inner_kept).sort().values)


# -- segments -----------------------------------------------------------------------------------------------


def frame_labels(frames: Tensor, count: int) -> list[int]:
    """Return every frame's cluster, numbered from the densest, of frame vectors (T, D)."""
    distance = Distances.of(frames)
    chosen = centres(peak_scores(distance, _NEIGHBOURS), count)
    labels: list[int] = distance.nearest(chosen).tolist()
    return labels


def runs_of(labels: list[int]) -> list[tuple[int, int]]:
    """Return the runs (start, stop) of equal labels."""
    lengths = [len(list(run)) for _, run in groupby(labels)]
    edges = [0]
    for length in lengths:
        edges.append(edges[-1] + length)
    return list(pairwise(edges))


def refined(labels: list[int]) -> list[int]:
    """Return labels whose runs are the longest of each cluster; other frames join the longer neighbouring run.

    Clusters of single frames are given up. From left to right, a run without a label takes the label of the longer of
    its two neighbours as they are by then, the left one of equals; 0 without neighbours.
    """
    runs = [(labels[start], start, stop) for start, stop in runs_of(labels)]
    longest = {label: max(stop - start for other, start, stop in runs if other == label) for label, _, _ in runs}
    refined_labels = list(labels)
    for label, start, stop in runs:
        if longest[label] == 1 or stop - start < longest[label]:
            refined_labels[start:stop] = [-1] * (stop - start)
    while -1 in refined_labels:
        spans = runs_of(refined_labels)
        place = next(i for i, (start, _) in enumerate(spans) if refined_labels[start] == -1)
        start, stop = spans[place]
        before, after = spans[place - 1 : place] if place else [], spans[place + 1 : place + 2]
        neighbours = [(-(b - a), side, refined_labels[a]) for side, (a, b) in enumerate([*before, *after])]
        refined_labels[start:stop] = [min(neighbours)[2] if neighbours else 0] * (stop - start)
    return refined_labels


def split(frames: Tensor, spans: list[tuple[int, int]], threshold: float) -> list[Group]:
    """Return, segment by segment, the static places of frames (T, n, D) and the other places of every frame."""
    size, parts = frames.shape[1], []
    for start, stop in spans:
        width = stop - start
        still = torch.zeros(size, dtype=torch.bool, device=frames.device)
        if width > 1:
            still = (_directions(frames[start:stop]).square().sum(-1) - width) / (width * (width - 1)) > threshold
        places, moving = still.nonzero().flatten(), (~still).nonzero().flatten()
        if len(places):
            parts.append(Group(places + start * size, frames[start:stop], width))
        if len(moving):
            parts += [Group(moving + t * size, frames[t : t + 1], 0) for t in range(start, stop)]
    return parts


def likeness(frames: Tensor, spans: list[tuple[int, int]]) -> Tensor:
    """Return the cosine (T, n) float32 of each token of frames (T, n, D) to its place's mean direction in a segment."""
    means = [_directions(frames[start:stop]).expand(stop - start, -1, -1) for start, stop in spans]
    return torch.cat([cosines(frames[a:b].detach().float(), mean) for (a, b), mean in zip(spans, means, strict=True)])


def _directions(frames: Tensor) -> Tensor:
    """Return the sum (n, D) float32 of the unit vectors of frames (w, n, D)."""
    total = torch.zeros_like(frames[0], dtype=torch.float32)
    for frame in frames.detach():
        tokens = frame.float()
        total.addcmul_(tokens, torch.linalg.vector_norm(tokens, dim=-1, keepdim=True).clamp(min=1e-12).reciprocal())
    return total


# -- clusters -----------------------------------------------------------------------------------------------


def official_count(size: int, share: float) -> int:
    """Return the number of clusters that the release makes of a set."""
    return int(size * share) if size > _FEW else size


def clustered(part: Group, count: int) -> tuple[Tensor, Tensor]:
    """Return `count` clusters of a set, densest first: the raster indices of their centres, and their means.

    A set of `count` tokens stays unchanged.
    """
    tokens = part.tokens
    if count == len(tokens):
        return part.places, tokens
    with torch.no_grad():
        distance = Distances.of(tokens)
        chosen = centres(peak_scores(distance, _NEIGHBOURS), count)
    if not count:
        return part.places[:0], tokens[:0]
    owner = distance.nearest(chosen)
    total, members = totals(tokens, owner, count)
    return part.places[chosen], (total / members).to(tokens.dtype)


def official_choice(scores: Tensor, groups: Tensor, share: float) -> Tensor:
    """Return the ⌊n·share⌋ tokens of the highest `scores` (n,) in every group, group by group, best first."""
    kept = []
    for group in sorted(set(groups.tolist())):
        members = (groups == group).nonzero().flatten()
        kept.append(members[centres(scores[members], int(len(members) * share))])
    return torch.cat(kept)
