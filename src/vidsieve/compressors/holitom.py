"""HoliTom: merge static tokens over windows of frames, keep those with much attention; merge again inside."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Generator, Tensor

from vidsieve.compressors._budgets import TwoPartCompressor
from vidsieve.compressors._clustering import Distances, Group, along_time, centres, most_alike, peak_scores, totals
from vidsieve.compressors.base import encoder_attention, within
from vidsieve.compressors.inside import LayerChoice, LayerView
from vidsieve.selection import other_indices, proportional_counts, top_indices
from vidsieve.types import Need, Selection, VideoTokens


@dataclass(frozen=True)
class HoliTom(TwoPartCompressor):
    """Merge tokens that stay alike over a window of frames into one, then keep a part of every frame and window.

    Windows are chosen by dynamic programming so that as many tokens as possible vanish: within a window, a place where
    neighbouring frames are alike throughout (cosine above `threshold`) holds one static token, the mean of its frames.
    Of the others every frame keeps those that the vision encoder attends to most; static tokens are merged into density
    peaks among them. Inside the LLM, the tokens that the last prompt token attends to most stay, and each of the others
    goes into the one it is most like.

    Parameters
    ----------
    threshold : float
        Cosine above which a place does not change (release: 0.65 at 10 %, else 0.8).
    longest : int
        Frames of a window at most.
    neighbours : int
        Neighbours that make a token's density.
    centre_weight : float
        Weight of a density peak in its mean.
    layer, inner_kept, inner
        As in `TwoPartCompressor`: layer 18 of 28, where 0.5 stay. Without the inner part it is blind to the question.

    Variants: ``"ours"`` keeps exactly ⌊R·N⌋ tokens before the LLM, shared out by largest remainder; where merging over
    time leaves fewer, the most attended of the merged places are kept in later frames too. With both parts R is the
    mean over layers. ``"official"`` divides R by the share that merging over time leaves, and rounds in every frame and
    window. ``docs/methods/holitom.md`` lists the other differences from the release.

    References
    ----------
    HoliTom, NeurIPS 2025 (arXiv 2505.21334); cokeshao/HoliTom @ e9b2972, holitom/llava_arch.py, modeling_qwen2.py.
    """

    name: ClassVar[str] = "holitom"
    paper: ClassVar[str] = "HoliTom, NeurIPS 2025"
    needs: ClassVar[frozenset[Need]] = frozenset({Need.ENCODER_ATTENTION, Need.LAYER_ATTENTION})
    variants: ClassVar[tuple[str, ...]] = ("ours", "official")
    adaptive_variants: ClassVar[tuple[str, ...]] = ("official",)
    default_layer: ClassVar[tuple[int, int]] = (18, 28)
    threshold: float = within(0.8, "[-1, 1]")
    longest: int = within(1024, "[1, inf)")
    neighbours: int = within(7, "[1, inf)")
    centre_weight: float = within(0.6, "[0, 1]")

    def _select(self, video: VideoTokens, budget: int, generator: Generator) -> Selection:
        self.check_outer()
        grid, attention = video.grid, encoder_attention(video)
        frames = video.embeds.reshape(grid.frames, grid.per_frame, -1)
        with torch.no_grad():
            same = along_time(frames, torch.float32) > self.threshold
            spans, reduced = windows(same, self.longest)
        groups = grouped(frames, same, spans)
        if self.adaptive_budget:
            ratio = adjusted(float(self.budget_ratio(grid.num_tokens)), reduced, grid.num_tokens)
            counts = official_counts(groups, ratio)
        else:
            sizes = [len(group.places) for group in groups]
            counts = proportional_counts(sizes, min(budget, sum(sizes)))
        indices, rows = kept_of_groups(groups, counts, attention, self.neighbours, self.centre_weight)
        if not self.adaptive_budget and len(indices) < budget:
            rest = other_indices(indices, grid.num_tokens)
            more = rest[top_indices(attention[rest], budget - len(indices))]
            indices, rows = torch.cat([indices, more]), torch.cat([rows, video.embeds[more]])
        kept, order = indices.sort()
        return Selection(kept, rows[order], scores=attention.float())

    def step(self, view: LayerView, keep: int) -> LayerChoice:
        """Return the tokens of the highest mean attention, which absorb the others one by one."""
        chosen = top_indices(view.attention("last", view.layer - 1)[:, 0].mean(0), keep)
        return LayerChoice(chosen, absorbed(view.hidden, chosen.to(view.hidden.device)))


# -- windows ------------------------------------------------------------------------------------------------


def windows(same: Tensor, longest: int) -> tuple[list[tuple[int, int]], int]:
    """Return the windows (first, last frame) in which most tokens vanish, and the number of tokens that do.

    Parameters
    ----------
    same : Tensor, (T − 1, n), bool
        True where a place is alike in a frame and the next.
    longest : int

    Among equal windows the shorter one wins.
    """
    frames = len(same) + 1
    run = torch.zeros(same.shape[1], dtype=torch.int64, device=same.device)
    best, length = [0], [1]
    for last in range(1, frames):
        run = torch.where(same[last - 1], run + 1, 0)
        # at[k]: places that have been alike for k steps or more.
        at = torch.bincount(run, minlength=last + 1).flip(0).cumsum(0).flip(0).tolist()
        top, chosen = best[-1], 1
        for size in range(2, min(last + 1, longest) + 1):
            gain = (size - 1) * at[size - 1] + (best[last - size] if last >= size else 0)
            if gain > top:
                top, chosen = gain, size
        best.append(top)
        length.append(chosen)
    spans, last = [], frames - 1
    while last >= 0:
        spans.append((last - length[last] + 1, last))
        last -= length[last]
    return spans[::-1], best[-1]


def adjusted(ratio: float, reduced: int, total: int) -> float:
    """Return the share of the tokens left by merging over time that makes up `ratio` of all, at most 1."""
    return min(ratio / ((total - reduced) / total), 1.0)


def grouped(frames: Tensor, same: Tensor, spans: list[tuple[int, int]]) -> list[Group]:
    """Return, window by window, its static tokens and each frame's others; empty groups are left out."""
    size = frames.shape[1]
    groups = []
    for first, last in spans:
        static = same[first:last].all(0) if last > first else torch.zeros_like(frames[0, :, 0], dtype=torch.bool)
        still, moving = static.nonzero().flatten(), (~static).nonzero().flatten()
        if len(still):
            groups.append(Group(still + first * size, frames[first : last + 1], last - first + 1))
        if len(moving):
            groups += [Group(moving + t * size, frames[t : t + 1], 0) for t in range(first, last + 1)]
    return groups


# -- budgets and merging ------------------------------------------------------------------------------------


def official_counts(groups: list[Group], ratio: float) -> list[int]:
    """Return the number of tokens that the release keeps of each group: half to even where static, else rounded up."""
    sizes = [len(group.places) for group in groups]
    return [round(n * ratio) if g.length else math.ceil(n * ratio) for g, n in zip(groups, sizes, strict=True)]


def kept_of_groups(
    groups: list[Group],
    counts: list[int],
    attention: Tensor,
    neighbours: int,
    weight: float,
) -> tuple[Tensor, Tensor]:
    """Return raster indices (K,) and tokens (K, D) of the kept tokens, group by group, in the release's order.

    Parameters
    ----------
    attention : Tensor, (N,)
    neighbours, weight : as in `clustered`
    """
    indices, rows = [], []
    for group, count in zip(groups, counts, strict=True):
        if group.length:
            chosen, tokens = group.places[:0], group.frames[0, :0]
            if count:
                chosen, tokens = clustered(group.tokens, count, neighbours, weight)
        else:
            chosen = top_indices(attention[group.places], count)
            tokens = replace(group, places=group.places[chosen]).tokens
        indices.append(group.places[chosen])
        rows.append(tokens)
    return torch.cat(indices), torch.cat(rows)


def clustered(tokens: Tensor, count: int, neighbours: int, weight: float) -> tuple[Tensor, Tensor]:
    """Return `count` density peaks of tokens (n, D), sorted, and each merged with the tokens nearest to it, (count, D).

    `neighbours`, at most `count`, make a density; a peak has `weight` in its mean, those that join it the rest.
    """
    with torch.no_grad():
        distance = Distances.of(tokens)
        chosen = centres(peak_scores(distance, min(neighbours, count)), count).sort().values
    owner, peaks = distance.nearest(chosen), tokens[chosen].float()
    total, members = totals(tokens, owner, count)
    joined = members - 1
    merged = weight * peaks + (1 - weight) * (total - peaks) / joined.clamp(min=1)
    return chosen, torch.where(joined > 0, merged, peaks).to(tokens.dtype)


def absorbed(hidden: Tensor, chosen: Tensor) -> Tensor:
    """Return hidden states (K, D) of `chosen` among hidden (n, D), each merged with the others that it is most like.

    A token that takes in others becomes the mean of itself and the first, then of that and the second, and so on: the
    last of m weighs one half, the one before a quarter, the token itself 2⁻ᵐ.
    """
    others = other_indices(chosen, len(hidden))
    owner = most_alike(hidden[others], hidden[chosen])
    count = torch.bincount(owner, minlength=len(chosen))
    # Place of each among its owner's tokens, counted from the last: 1 for the last.
    order = owner.argsort(stable=True)
    place = torch.empty_like(owner)
    place[order] = count.cumsum(0)[owner[order]] - torch.arange(len(owner), device=owner.device)
    weighted = hidden[others].float() * torch.exp2(-place.float())[:, None]
    own = hidden[chosen].float() * torch.exp2(-count.float())[:, None]
    return own.index_add(0, owner, weighted).to(hidden.dtype)
