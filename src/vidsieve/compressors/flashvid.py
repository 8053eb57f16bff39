"""FlashVID: keep attended tokens that differ, merge the others along trees through time; drop again inside."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from vidsieve.compressors._budgets import TwoPartCompressor
from vidsieve.compressors._clustering import Distances, centres, frame_means, neighbours_alike, peak_scores, totals
from vidsieve.compressors.base import encoder_attention, within
from vidsieve.compressors.inside import LayerChoice, LayerView
from vidsieve.errors import UnknownNameError
from vidsieve.selection import even_counts, proportional_counts, top_indices
from vidsieve.types import Need, Selection, VideoTokens

Form = Literal["v1", "v2"]
FORMS: tuple[Form, ...] = ("v1", "v2")
_NEIGHBOURS = 7
_SCALE = 1e6
"""Factor of the attention in distances, as in the release."""
_RESOLUTION = 1e-6
"""Cosine distance below which tokens count as equal in variant "ours"."""
_MOST = 2**24
"""Most distances that are kept at once."""


@dataclass(frozen=True)
class FlashVID(TwoPartCompressor):
    """Keep attended tokens of every frame that differ from each other; merge the others over time, then in a frame.

    The video is cut into segments where neighbouring frames differ. In every frame a share `alpha` of the budget goes
    to tokens that are far from each other in cosine distance, weighted by the attention that they receive in the
    encoder. Each of the others is linked to the token of the frame before that it is most like, if it is like enough;
    the trees that arise are merged into their roots. The roots of a frame are merged into density peaks. Inside the
    LLM, the tokens that the last prompt token attends to most stay.

    Parameters
    ----------
    form : {"v1", "v2"}
        The weight of a distance: the attention alone (the release's Qwen models), or its product with the token's
        mean dot product with the frame vectors of its segment (its LLaVA models).
    alpha : float
        Share of a frame's budget that goes to tokens that differ.
    threshold : float
        Cosine to a token of the frame before above which there is a link.
    segments : int
        Least number of segments (release: 8 for its LLaVA models, 4 for its Qwen models; 1 adds no cuts).
    segment_threshold : float
        Cosine of neighbouring frames below which there is always a cut.
    expansion : float
        Factor of R before the LLM, in ``"official"`` only.
    layer, inner_kept, inner
        As in `TwoPartCompressor`: layer 20 of 28, where 0.3 stay (Qwen3-VL: 28 of 36, where 0.1 stay). Without the
        inner part it is blind to the question.

    Variants: ``"ours"`` keeps exactly ⌊R·N⌋ different tokens before the LLM, and a merged tree is the mean of its
    tokens. With both parts R is the mean over layers. ``"official"`` keeps `expansion` times R before the LLM, rounds
    up in every frame, divides a tree's sum by its root's links, and may pick a token twice. Given a count, it selects
    as ``"ours"``. ``docs/methods/flashvid.md`` lists the other differences from the release.

    References
    ----------
    FlashVID, ICLR 2026 (arXiv 2602.08024); Fanziyang-v/FlashVID @ 1d37422, flashvid/utils.py, token_selection.py.
    """

    name: ClassVar[str] = "flashvid"
    paper: ClassVar[str] = "FlashVID, ICLR 2026"
    needs: ClassVar[frozenset[Need]] = frozenset({Need.ENCODER_ATTENTION, Need.LAYER_ATTENTION})
    variants: ClassVar[tuple[str, ...]] = ("ours", "official")
    adaptive_variants: ClassVar[tuple[str, ...]] = ("official",)
    default_layer: ClassVar[tuple[int, int]] = (20, 28)
    form: Form = "v2"
    alpha: float = within(0.7, "[0, 1]")
    threshold: float = within(0.8, "[-1, 1]")
    segments: int = within(8, "[1, inf)")
    segment_threshold: float = within(0.9, "[-2, 1]")
    expansion: float = within(1.25, "(0, inf)")
    inner_kept: float = within(0.3, "(0, 1]")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.form not in FORMS:
            raise UnknownNameError("form of flashvid", str(self.form), FORMS)

    def _select(self, video: VideoTokens, budget: int, generator: Generator) -> Selection:
        self.check_outer()
        grid, attention = video.grid, encoder_attention(video)
        frames = video.embeds.reshape(grid.frames, grid.per_frame, -1)
        received, release = attention.reshape(grid.frames, grid.per_frame), self.adaptive_budget
        with torch.no_grad():
            means = frame_means(frames)
            spans = cut(neighbours_alike(means), self.segments, self.segment_threshold, release)
            if release:
                ratio = float(self.budget_ratio(grid.num_tokens))
                shares = [official_share(grid.per_frame, ratio, self.expansion, self.alpha)] * grid.frames
            else:
                shares = [share_of(int(count), self.alpha) for count in even_counts(budget, grid.frames)]
            weights = received.float() * _SCALE
            relevance = relevances(frames, means, spans) if self.form == "v2" else None
            most = max(picks for picks, _ in shares)
            # Only the release's second form may pick a token twice.
            again = release and self.form == "v2"
            picks = distinct_picks(frames, weights, relevance, most, again=again, exact=release)
        kept, rows = merged_segments(frames, picks, spans, shares, self.threshold, release)
        kept, order = kept.sort(stable=True)
        first = torch.ones_like(kept, dtype=torch.bool)  # of an index that occurs twice, the token that was picked
        first[1:] = kept[1:] != kept[:-1]
        return Selection(kept[first], rows[order[first]], scores=attention.float())

    def stages(self, num_layers: int, num_tokens: int) -> tuple[tuple[int, int], ...]:
        """Return the one stage (layer, tokens kept from there on); the release rounds up."""
        if self.variant == "official":
            return ((self.first_layer(num_layers), math.ceil(num_tokens * self.inner_kept)),)
        return super().stages(num_layers, num_tokens)

    def step(self, view: LayerView, keep: int) -> LayerChoice:
        """Return the tokens of the highest mean attention in the layer before."""
        return LayerChoice(top_indices(view.attention("last", view.layer - 1)[:, 0].mean(0), keep))


# -- segments and shares ------------------------------------------------------------------------------------


def cut(alike: Tensor, least: int, threshold: float, release: bool) -> list[tuple[int, int]]:
    """Return segments (start, stop): cuts where `alike` (T − 1,) is below `threshold`, then at the smallest others.

    There are `least` of them, if the video has as many frames. The release calls places with a cut alike to 1, so that
    it may choose them again: a segment is then empty.
    """
    below = alike < threshold
    cuts = below.nonzero().flatten()
    missing = max(0, least - 1 - len(cuts))
    room = len(alike) if release else len(alike) - len(cuts)
    others = alike.masked_fill(below, 1.0 if release else torch.inf).sort(stable=True).indices
    edges = torch.cat([cuts, others[: min(missing, room)]]).sort().values + 1
    return list(pairwise([0, *edges.tolist(), len(alike) + 1]))


def share_of(budget: int, alpha: float) -> tuple[int, int]:
    """Return the numbers of tokens that are picked, and that are merged, of a frame's budget."""
    picks = math.ceil(budget * alpha)
    return picks, budget - picks


def official_share(size: int, ratio: float, expansion: float, alpha: float) -> tuple[int, int]:
    """Return the share of every frame of `size` tokens as the release rounds it, at most the whole frame."""
    return share_of(min(size, math.ceil(size * ratio * expansion)), alpha)


# -- tokens that differ -------------------------------------------------------------------------------------


def relevances(frames: Tensor, means: Tensor, spans: list[tuple[int, int]]) -> Tensor:
    """Return the mean dot product (T, n) float32 of each token of (T, n, D) with the frame vectors of its segment.

    `means` (T, D) float32 are the frame vectors.
    """
    found = torch.empty(frames.shape[:2], device=frames.device)
    for start, stop in spans:
        if stop > start:
            own = means[start:stop].T
            found[start:stop] = torch.stack([(frame.float() @ own).mean(-1) for frame in frames[start:stop]])
    return found


def distinct_picks(
    frames: Tensor, weights: Tensor, relevance: Tensor | None, count: int, *, again: bool = False, exact: bool = False
) -> Tensor:
    """Return `count` tokens of every frame that are far from each other, (T, count) int64, in the order of picking.

    The distance to a token is one minus the cosine, times the token's weight and relevance. The first pick is the token
    whose second smallest distance, itself counted, is largest; then the one whose nearest pick is farthest.

    Parameters
    ----------
    frames : Tensor, (T, n, D), floating
    weights : Tensor, (T, n), float32
    relevance : Tensor or None, (T, n), float32
    again : bool
        A token that has been picked can be picked again.
    exact : bool
        Distances below `_RESOLUTION` are not taken as zero.
    """
    total, size = frames.shape[:2]
    picks = torch.zeros(total, count, dtype=torch.int64, device=frames.device)
    block = max(1, _MOST // size**2)
    for part in (slice(start, start + block) for start in range(0, total if count else 0, block)):
        unit = (F.normalize(frame.float(), dim=-1) for frame in frames[part])
        distance = torch.stack([1.0 - rows @ rows.T for rows in unit])
        if not exact:
            distance.masked_fill_(distance < _RESOLUTION, 0.0)
        distance *= weights[part, None]
        if relevance is not None:
            distance *= relevance[part, None]
        alone = distance.topk(min(2, size), dim=1, largest=False).values[:, -1]
        row, chosen = torch.arange(len(alone), device=frames.device), alone.argmax(1)
        nearest = torch.full_like(alone, torch.inf)
        for place in range(count):
            picks[part, place] = chosen
            nearest = torch.minimum(nearest, distance[row, chosen])
            if not again:
                nearest[row, chosen] = -torch.inf
            chosen = nearest.argmax(1)
    return picks


# -- merging ------------------------------------------------------------------------------------------------


def merged_segments(
    frames: Tensor,
    picks: Tensor,
    spans: list[tuple[int, int]],
    shares: list[tuple[int, int]],
    threshold: float,
    release: bool,
) -> tuple[Tensor, Tensor]:
    """Return raster indices (K,) int64 and tokens (K, D) of frames (T, n, D): segment by segment, first the picks.

    Parameters
    ----------
    picks : Tensor, (T, m), int64
        Tokens of every frame, of which its share are taken.
    shares : list of (int, int)
        Numbers of picks and of merged tokens of every frame.
    """
    size = frames.shape[1]
    indices: list[Tensor] = []
    rows: list[Tensor] = []
    for start, stop in spans:
        length, own = stop - start, shares[start:stop]
        free = torch.ones(length, size, dtype=torch.bool, device=frames.device)
        for frame, (count, _) in enumerate(own):
            chosen = picks[start + frame, :count].sort().values
            free[frame, chosen] = False
            indices.append(chosen + (start + frame) * size)
            rows.append(frames[start + frame, chosen])
        merged = sum(count for _, count in own)
        if not merged:
            continue
        if length == 1:
            places = torch.arange(size, device=frames.device) if release else free[0].nonzero().flatten()
            tokens = frames[start, places]
        else:
            places, tokens = merged_trees(frames[start:stop], free, threshold, sum(map(sum, own)), release)
        if merged >= len(places):
            indices.append(places + start * size)
            rows.append(tokens)
            continue
        found = torch.bincount(places // size, minlength=length).tolist()
        counts = official_counts(found, merged) if release else proportional_counts(found, merged)
        for own_places, own_tokens, count in zip(
            torch.split(places, found), torch.split(tokens, found), counts, strict=True
        ):
            if count:
                chosen, means = clustered(own_tokens, count, min(count, _NEIGHBOURS) if release else _NEIGHBOURS)
                indices.append(own_places[chosen] + start * size)
                rows.append(means)
    return torch.cat(indices), torch.cat(rows)


def official_counts(found: list[int], merged: int) -> list[int]:
    """Return how many of the tokens `found` in each frame the release leaves, for `merged` in all, rounded up."""
    ratio = merged / sum(found)
    return [math.ceil(count * ratio) for count in found]


def links(frames: Tensor, free: Tensor, threshold: float, least: int, release: bool) -> tuple[Tensor, Tensor]:
    """Return which tokens of frames (L, n, D) are linked to the frame before, (L, n) bool, and to which, int64.

    Parameters
    ----------
    free : Tensor, (L, n), bool
        Tokens that take part.
    threshold : float
        Cosine above which there is a link.
    least : int
        Tokens without a link, of all in the segment. Where fewer would be left, only the strongest links hold; in the
        release those stronger than the last of these.
    """
    alike = torch.full(free.shape, -1.0, device=frames.device)
    parent = torch.zeros(free.shape, dtype=torch.int64, device=frames.device)
    before = F.normalize(frames[0].float(), dim=-1)
    for frame in range(1, len(frames)):
        unit = F.normalize(frames[frame].float(), dim=-1)
        own, others = free[frame].nonzero().flatten(), free[frame - 1].nonzero().flatten()
        if len(own) and len(others):
            alike[frame, own], best = (unit @ before.T)[own][:, others].max(1)
            parent[frame, own] = others[best]
        before = unit
    linked, most = alike > threshold, alike.numel() - least
    if int(linked.sum()) > most:
        order = alike.flatten().sort(descending=True, stable=True)
        if release:
            linked = alike > order.values[most - 1] if most else torch.zeros_like(linked)
        else:
            linked = torch.zeros_like(linked).flatten().index_fill(0, order.indices[:most], True).view_as(linked)
    return linked, parent


def merged_trees(frames: Tensor, free: Tensor, threshold: float, least: int, release: bool) -> tuple[Tensor, Tensor]:
    """Return the places (m,) in a segment (L, n, D) of the roots of trees of linked tokens, and their means (m, D).

    The release divides a tree's sum by one more than the number of links to its root. Other arguments as in `links`.
    """
    length, size = free.shape
    with torch.no_grad():
        linked, parent = links(frames, free, threshold, least, release)
        places = torch.arange(length * size, device=frames.device).view(length, size)
        root = places.clone()
        for frame in range(1, length):
            root[frame] = torch.where(linked[frame], root[frame - 1][parent[frame]], places[frame])
        roots, members = places[free & ~linked], places[free]
        owner = torch.searchsorted(roots, root[free])
    total, count = totals(frames.flatten(0, 1)[members], owner, len(roots))
    if release:
        parents = (places[:, :1] - size + parent)[linked]
        count = 1 + torch.bincount(parents, minlength=length * size)[roots, None]
    return roots, (total / count).to(frames.dtype)


def clustered(tokens: Tensor, count: int, neighbours: int) -> tuple[Tensor, Tensor]:
    """Return the `count` density peaks of tokens (n, D), best first, and the means (count, D) of their clusters."""
    with torch.no_grad():
        distance = Distances.of(tokens)
        chosen = centres(peak_scores(distance, neighbours), count)
        owner = distance.nearest(chosen)
    total, members = totals(tokens, owner, count)
    return chosen, (total / members).to(tokens.dtype)
