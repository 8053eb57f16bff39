"""FastVID: cut the video into segments; keep salient tokens, and merge the rest into a few anchors of each segment."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar, Literal

import torch
from torch import Generator, Tensor

from vidsieve.compressors._clustering import (
    Distances,
    centres,
    frame_means,
    most_alike,
    neighbours_alike,
    peak_scores,
    totals,
)
from vidsieve.compressors.base import Compressor, encoder_attention, within
from vidsieve.errors import BudgetError, UnknownNameError
from vidsieve.selection import even_counts, top_indices
from vidsieve.types import Need, Selection, VideoTokens

Form = Literal["llava_onevision", "llava_video", "qwen2_5_vl"]
FORMS: tuple[Form, ...] = ("llava_onevision", "llava_video", "qwen2_5_vl")
_NEIGHBOURS = 4
Shares = list[tuple[int, int]]
"""Numbers of salient tokens and of anchors, by frame of a segment."""


@dataclass(frozen=True)
class FastVID(Compressor):
    """Keep the tokens of every segment that the encoder attends to, and merge the others into anchors of some frames.

    The video is cut where neighbouring frames are least alike. A part of a segment's budget goes to the most salient
    tokens of every frame; the rest to anchors, found by density peaks among the other tokens of every `stride`-th
    frame, counted from the segment's end. Every token that is not salient joins its nearest anchor in each of these
    frames. Blind to the question.

    Parameters
    ----------
    form : {"llava_onevision", "llava_video", "qwen2_5_vl"}
        The release that ``"official"`` follows. In the first every frame has the same share, remainders are lost
        and anchors are merged into anchors too; the second spreads a segment's share and remainders over its
        frames; the third cuts segments again at `again` and keeps only the last frame of each run.
    segments : int
        Least number of segments.
    threshold : float
        Cosine of neighbouring frames below which there is always a cut (0.9; Qwen2.5-VL 0.84).
    again : float
        Cosine below which the third form cuts a segment again.
    context : float
        Share of the budget that goes to anchors.
    stride : int
        Frames from one anchor frame to the next.
    anchor_weight : float
        Least weight of an anchor in its mean.

    Variants: ``"ours"`` keeps exactly ⌊R·N⌋ tokens in the second form; budget that finds no room among anchors goes to
    salient tokens. ``"official"`` keeps as many as its form's rounding leaves. Saliency is the attention that a token
    receives in the encoder's last block, and a frame the mean of its tokens, as in the third release.
    ``docs/methods/fastvid.md`` lists the other differences from the releases.

    References
    ----------
    FastVID, NeurIPS 2025 (arXiv 2503.11187); LunarShen/FastVID @ a40a109.
    """

    name: ClassVar[str] = "fastvid"
    paper: ClassVar[str] = "FastVID, NeurIPS 2025"
    needs: ClassVar[frozenset[Need]] = frozenset({Need.ENCODER_ATTENTION})
    variants: ClassVar[tuple[str, ...]] = ("ours", "official")
    adaptive_variants: ClassVar[tuple[str, ...]] = ("official",)
    form: Form = "llava_onevision"
    segments: int = within(8, "[1, inf)")
    threshold: float = 0.9
    again: float = 0.95
    context: float = within(0.4, "[0, 1)")
    stride: int = within(4, "[1, inf)")
    anchor_weight: float = within(0.6, "[0, 1]")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.form not in FORMS:
            raise UnknownNameError("form of fastvid", str(self.form), FORMS)

    def _select(self, video: VideoTokens, budget: int, generator: Generator) -> Selection:
        grid = video.grid
        frames = video.embeds.reshape(grid.frames, grid.per_frame, -1)
        saliency = encoder_attention(video).reshape(grid.frames, grid.per_frame)
        with torch.no_grad():
            alike = neighbours_alike(frame_means(frames))
            spans = cut(alike, self.segments, self.threshold)
            if self.adaptive_budget:
                share = int(grid.per_frame * self.budget_ratio(grid.num_tokens))
                if not share:
                    raise BudgetError(
                        f"the release rounds {self.retention:g} of a frame's {grid.per_frame} tokens to none; use "
                        f"variant 'ours' or a retention from {1 / grid.per_frame:.2g} on"
                    )
                plan = official_plan(self, spans, alike, grid.per_frame, share)
            else:
                plan = exact_plan(spans, budget, grid.per_frame, self.context, self.stride)
        included = self.adaptive_budget and self.form == "llava_onevision"
        kept, merged = merged_segments(frames, saliency, spans, plan, self.anchor_weight, included)
        return Selection(kept, merged, scores=saliency.flatten().float())


# -- segments and shares ------------------------------------------------------------------------------------


def cut(alike: Tensor, least: int, threshold: float) -> list[tuple[int, int]]:
    """Return segments (start, stop): cuts at the `least` − 1 smallest of `alike` (T − 1,), and below `threshold`."""
    lowest = alike.sort(stable=True).indices[: least - 1]
    cuts = sorted({*lowest.tolist(), *(alike < threshold).nonzero().flatten().tolist()})
    edges = [0, *(place + 1 for place in cuts), len(alike) + 1]
    return list(pairwise(edges))


def anchor_frames(length: int, stride: int) -> list[int]:
    """Return the frames of a segment that have anchors: every `stride`-th, counted from the last, in order."""
    return list(range((length - 1) % stride, length, stride))


def _spread(length: int, salient: int, context: int, stride: int) -> Shares:
    """Return shares as the second release spreads them: remainders to the first frames, and to the last anchors."""
    anchors = anchor_frames(length, stride)
    least, over = divmod(context, len(anchors))
    own = {frame: least + (place >= len(anchors) - over) for place, frame in enumerate(anchors)}
    even, first = divmod(salient, length)
    return [(even + (frame < first), own.get(frame, 0)) for frame in range(length)]


def official_plan(
    method: FastVID, spans: Sequence[tuple[int, int]], alike: Tensor, size: int, share: int
) -> list[Shares]:
    """Return the shares of every segment in a release's form, from the `share` of a frame of `size` tokens."""
    plan = []
    for start, stop in spans:
        length = stop - start
        if method.form == "llava_onevision":
            context = int(share * method.context)
            anchors = anchor_frames(length, method.stride)
            each = context * length // len(anchors)
            plan.append([(share - context, each if frame in anchors else 0) for frame in range(length)])
        elif method.form == "llava_video":
            context = int(share * length * method.context)
            plan.append(_spread(length, share * length - context, context, method.stride))
        else:
            context = max(1, int(share * length * method.context))
            inner = alike[start : stop - 1] < method.again
            ends = [*inner.nonzero().flatten().tolist(), length - 1]  # the last frame of every run
            runs = _spread(len(ends), share * length - context, context, method.stride)
            capped = [(salient, min(anchors, size // 2)) for salient, anchors in runs]
            last_frames = dict(zip(ends, ((min(s, size - c), c) for s, c in capped), strict=True))
            plan.append([last_frames.get(frame, (0, 0)) for frame in range(length)])
    return plan


def exact_plan(spans: Sequence[tuple[int, int]], budget: int, size: int, context: float, stride: int) -> list[Shares]:
    """Return shares of every segment that add up to `budget` tokens, at most `size` a frame."""
    frames = even_counts(budget, spans[-1][1])
    plan = []
    for start, stop in spans:
        length, total = stop - start, int(frames[start:stop].sum())
        anchored = math.floor(total * context)
        shares = _spread(length, total - anchored, anchored, stride)
        shares = [(salient, min(anchors, size - salient)) for salient, anchors in shares]
        left = total - sum(map(sum, shares))
        while left:  # anchors that found no room become salient tokens of frames that have some
            room = [frame for frame, share in enumerate(shares) if sum(share) < size]
            for frame, more in zip(room, even_counts(left, len(room)).tolist(), strict=True):
                salient, anchors = shares[frame]
                more = min(more, size - salient - anchors)
                shares[frame], left = (salient + more, anchors), left - more
        plan.append(shares)
    return plan


# -- merging ------------------------------------------------------------------------------------------------


def merged_segments(
    frames: Tensor,
    saliency: Tensor,
    spans: Sequence[tuple[int, int]],
    plan: Sequence[Shares],
    weight: float,
    included: bool,
) -> tuple[Tensor, Tensor]:
    """Return raster indices (K,) int64, sorted, and tokens (K, D) kept of frames (T, n, D).

    Parameters
    ----------
    saliency : Tensor, (T, n)
    included : bool
        Merge anchors into the anchors of their own frame too, as in the first release.
    """
    size = frames.shape[1]
    indices: list[Tensor] = []
    rows: list[Tensor] = []
    for (start, stop), shares in zip(spans, plan, strict=True):
        free = torch.ones(stop - start, size, dtype=torch.bool, device=frames.device)
        for frame, (salient, _) in enumerate(shares):
            chosen = top_indices(saliency[start + frame], salient)
            free[frame, chosen] = False
            indices.append(chosen + (start + frame) * size)
            rows.append(frames[start + frame, chosen])
        places = free.flatten().nonzero().flatten()
        tokens = frames[start:stop].flatten(0, 1)[places]
        for frame, (_, count) in enumerate(shares):
            if not count:
                continue
            there = free[frame].nonzero().flatten()
            distance = Distances.of(frames[start + frame, there])
            anchors = there[centres(peak_scores(distance, _NEIGHBOURS), count)].sort().values
            own = torch.searchsorted(places, anchors + frame * size)
            owner = most_alike(tokens, tokens[own])
            if not included:
                owner[own] = count  # joins nothing
            indices.append(anchors + (start + frame) * size)
            rows.append(_joined(tokens[own], tokens, owner, weight))
    kept, order = torch.cat(indices).sort()
    return kept, torch.cat(rows)[order]


def _joined(anchors: Tensor, sources: Tensor, owner: Tensor, weight: float) -> Tensor:
    """Return anchors (a, D) as means with the sources (m, D) they own; an anchor weighs one, and at least `weight`.

    A source whose owner is a goes nowhere.
    """
    total, count = (values[:-1] for values in totals(sources, owner, len(anchors) + 1))
    own = (1 / (count + 1)).clamp(min=weight)
    joined = own * anchors.float() + (1 - own) * total / count.clamp(min=1)
    return torch.where(count > 0, joined, anchors.float()).to(anchors.dtype)
