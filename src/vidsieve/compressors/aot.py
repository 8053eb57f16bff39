"""AOT: merge the tokens of a frame into anchors, then a clip's anchors into its first frame's, by optimal transport."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from vidsieve.compressors.base import Compressor, encoder_attention, within
from vidsieve.selection import even_counts, mask_to_indices, other_indices, proportional_counts
from vidsieve.types import Need, Selection, TokenGrid, VideoTokens

_ROUNDS, _STEP, _SOFTNESS = 100, 0.01, 0.1
_NEAREST, _PLACE, _SPREAD = 0.1, 0.5, 4.5
"""Weights of the nearest tokens' mean and of the distance of places; twice the variance of frames, in frames²."""


@dataclass(frozen=True)
class AOT(Compressor):
    """Choose anchors in every frame, merge the others into them, and merge a clip's anchors into its first frame's.

    Anchors are tokens of much encoder attention: a part of them the best of each of nine windows, the rest the best of
    the whole frame. Within a frame the other tokens go into the anchors by an entropic transport plan over likeness
    and distance, and a little by nearest anchor. Along a clip every frame's anchors go into those of the first frame;
    those whose plan is least decided stay as they are. Blind to the question.

    Parameters
    ----------
    clip : int
        Frames of a clip (release: 4 of 32, 8 of 64).
    keep : float
        Share of the anchors of a clip's later frames that stay unmerged (release: 0.1 to 0.4, by benchmark).
    global_share : float
        Share of a frame's anchors that is chosen over the whole frame.
    scaling : float
        Weight of what a first frame's anchor takes in.

    Variants: ``"ours"`` keeps exactly ⌊R·N⌋ tokens; a merged anchor replaces the one it came from. ``"official"`` puts
    the first frame's anchors out twice, as they were and merged (at the last free places of their clip), loses the
    remainder of the windows' share, stops the plans of all frames together, and hands over a frame's tokens with a
    total mass of 1, which hardly moves an anchor. Windows read the attention that adapters give, one deep layer, in
    place of a shallow one; the release merges before pooling. ``docs/methods/aot.md`` lists the other differences.

    References
    ----------
    AOT, CVPR 2026 (arXiv 2603.01400); TyroneLi/AOT @ 88455ee, LLaVA-NeXT/llava/model/llava_arch.py.
    """

    name: ClassVar[str] = "aot"
    paper: ClassVar[str] = "AOT, CVPR 2026"
    needs: ClassVar[frozenset[Need]] = frozenset({Need.ENCODER_ATTENTION})
    variants: ClassVar[tuple[str, ...]] = ("ours", "official")
    adaptive_variants: ClassVar[tuple[str, ...]] = ("official",)
    clip: int = within(4, "[1, inf)")
    keep: float = within(0.3, "(0, 1)")
    global_share: float = within(0.5, "[0, 1]")
    scaling: float = within(1.0, "(0, inf)")

    def _select(self, video: VideoTokens, budget: int, generator: Generator) -> Selection:
        grid, attention = video.grid, encoder_attention(video)
        frames = video.embeds.reshape(grid.frames, grid.per_frame, -1)
        clips = list(torch.split(torch.arange(grid.frames), self.clip))
        if self.adaptive_budget:
            indices, rows = self._official(frames, attention, grid, clips)
        else:
            indices, rows = self._exact(frames, attention, grid, clips, budget)
        indices, order = indices.sort()
        return Selection(indices, rows[order].to(video.embeds.dtype), scores=attention.float())

    def _exact(
        self, frames: Tensor, attention: Tensor, grid: TokenGrid, clips: list[Tensor], budget: int
    ) -> tuple[Tensor, Tensor]:
        size, scores = grid.per_frame, attention.reshape(grid.frames, -1)
        indices, rows = [], []
        counts = proportional_counts([len(clip) * size for clip in clips], budget)
        for clip, own, count in zip(clips, torch.split(frames, self.clip), counts, strict=True):
            if not count:
                continue
            later = len(clip) - 1
            # At least an even share, so that later frames have candidates enough for what is left.
            each = min(size, max(-(-count // len(clip)), int(count / (1 + later * self.keep))))
            places = anchors(scores[clip], scores[clip], grid, each, self.global_share)
            merged = merged_within(own, places, grid)
            kept = even_counts(count - each, later).tolist() if later else []
            anchor, masks = merged_along(list(merged), self.keep, self.scaling, kept)
            indices.append(places[0] + int(clip[0]) * size)
            rows.append(anchor)
            for t, place, made, mask in zip(clip[1:].tolist(), places[1:], merged[1:], masks, strict=True):
                indices.append(place[mask] + t * size)
                rows.append(made[mask])
        return torch.cat(indices), torch.cat(rows)

    def _official(
        self, frames: Tensor, attention: Tensor, grid: TokenGrid, clips: list[Tensor]
    ) -> tuple[Tensor, Tensor]:
        size, scores = grid.per_frame, attention.reshape(grid.frames, -1)
        # Tokens put out per anchor of a frame: the first frame's twice, and those that later frames keep.
        cost = sum(2 + (len(clip) - 1) * self.keep if len(clip) > 1 else 1 for clip in clips)
        each = max(1, min(size, int(self.budget_ratio(grid.num_tokens) * grid.num_tokens / cost)))
        places = anchors(scores, scores, grid, each, self.global_share, lossy=True)
        merged = merged_within(frames, places, grid, official=True)
        indices, rows = [], []
        for clip in clips:
            start = int(clip[0])
            anchor, masks = merged_along(list(merged[clip]), self.keep, self.scaling)
            shown = [torch.ones_like(places[0], dtype=torch.bool), *masks]
            own = torch.cat([places[start + i][mask] + i * size for i, mask in enumerate(shown)])
            again = other_indices(own, len(clip) * size)[-places.shape[1] :] if masks else own[:0]
            indices.append(torch.cat([own, again]) + start * size)
            rows += [merged[start + i][mask] for i, mask in enumerate(shown)] + [anchor[: len(again)]]
        return torch.cat(indices), torch.cat(rows)


# -- anchors ------------------------------------------------------------------------------------------------


def anchors(
    shallow: Tensor, deep: Tensor, grid: TokenGrid, count: int, global_share: float, lossy: bool = False
) -> Tensor:
    """Return the anchors (T, A) int64 of every frame, sorted: the best of nine windows, then the best of the frame.

    Parameters
    ----------
    shallow, deep : Tensor, (T, n), floating
        Attention that windows and the whole frame go by.
    grid : TokenGrid
        Its height and width, n tokens together.
    count : int
        A, at most n.
    global_share : float
        Share of the anchors that is chosen over the whole frame; the windows' is rounded down.
    lossy : bool
        Leave out, as the release does, what the windows' share leaves over when divided by nine.
    """
    local = int(count * (1 - global_share))
    row = torch.arange(grid.height, device=deep.device) * 3 // grid.height
    column = torch.arange(grid.width, device=deep.device) * 3 // grid.width
    window = (row[:, None] * 3 + column).flatten()
    picks = [
        _best(shallow[:, inside], inside, local // 9) for inside in (mask_to_indices(window == w) for w in range(9))
    ]
    chosen = torch.cat(picks, 1)
    rest = count - (local if lossy else chosen.shape[1])
    if not chosen.shape[1]:
        rest = max(rest, 1)
    everywhere = torch.arange(deep.shape[1], device=deep.device)
    others = deep.float().scatter(1, chosen, -torch.inf)
    return torch.cat([chosen, _best(others, everywhere, rest)], 1).sort(1).values


def _best(scores: Tensor, places: Tensor, count: int) -> Tensor:
    return places[scores.sort(dim=1, descending=True, stable=True).indices[:, :count]]


# -- transport ----------------------------------------------------------------------------------------------


def plan(cost: Tensor, together: bool = False) -> Tensor:
    """Return the entropic transport plan (B, m, a) of costs (B, m, a) between uniform masses, columns exact.

    Rounds end, at most 100, when the mean change of a plan's row factors is below 0.01: of each plan for itself, or
    of all `together`.
    """
    count, m, a = cost.shape
    kernel = (-cost / _SOFTNESS).exp()
    rows, columns = cost.new_ones(count, m, 1), cost.new_ones(count, a, 1)
    live = torch.ones(count, dtype=torch.bool, device=cost.device)
    for _ in range(_ROUNDS):
        new = 1 / m / (kernel @ columns)
        change = (new - rows).abs().mean((1, 2))
        rows = torch.where(live[:, None, None], new, rows)
        columns = torch.where(live[:, None, None], 1 / a / (kernel.mT @ rows), columns)
        live = live & ((change.mean() if together else change) >= _STEP)
        if not bool(live.any()):
            break
    return rows * columns.mT * kernel


def merged_within(frames: Tensor, places: Tensor, grid: TokenGrid, official: bool = False) -> Tensor:
    """Return the anchors (T, A, D) of frames (T, n, D) with each frame's other tokens merged into them.

    At least float32.

    Parameters
    ----------
    places : Tensor, (T, A), int64
        Anchors, sorted.
    grid : TokenGrid
        Its height and width, n tokens together.
    official : bool
        Hand over the whole frame with a mass of 1, and stop all plans together; else each token has a mass of 1.
    """
    count, size, _ = frames.shape
    own = _taken(frames, places)
    rest = torch.ones(count, size, dtype=torch.bool, device=frames.device).scatter(1, places, False)
    others = rest.nonzero()[:, 1].reshape(count, -1)
    if not others.shape[1]:
        return own.float()
    down = torch.linspace(0, 1, grid.height, device=frames.device)
    across = torch.linspace(0, 1, grid.width, device=frames.device)
    spots = torch.cartesian_prod(down, across)
    alike = torch.stack([cosines(*of) for of in zip(frames.detach(), places, others, strict=True)])
    share = plan(1 - alike + _PLACE * torch.cdist(spots[others], spots[places]), together=official)
    share = share if official else _per_row(share)
    joins = F.one_hot(alike.argmax(2), own.shape[1]).to(share)
    # An anchor becomes a weighted mean: of itself with weight 1 and of what each of the two hands over to it.
    by_plan, by_place = (1 - _NEAREST) / (1 + share.sum(1, True)), _NEAREST / (1 + joins.sum(1, True))
    part = by_plan * share + by_place * joins
    handed = part.new_zeros(count, size, own.shape[1]).scatter(1, others[..., None].expand_as(part), part)
    return (by_plan + by_place).mT * own + handed.mT.to(frames.dtype) @ frames


def cosines(frame: Tensor, anchor: Tensor, other: Tensor) -> Tensor:
    """Return the cosines (m, a) of the tokens of a frame (n, D) at `other` (m,) to those at `anchor` (a,).

    At least float32: in float16 the product of two tokens may be too large.
    """
    values = frame.to(torch.promote_types(frame.dtype, torch.float32))
    lengths = torch.linalg.vector_norm(values, dim=1, keepdim=True).clamp(min=1e-12)
    alike: Tensor = values @ (values[anchor] / lengths[anchor]).T / lengths
    return alike[other]


def merged_along(
    clip: list[Tensor], keep: float, scaling: float, counts: list[int] | None = None
) -> tuple[Tensor, list[Tensor]]:
    """Return a clip's first tokens (a, D) with those of later frames merged in, and which of each frame's stay.

    Parameters
    ----------
    clip : list of Tensor, (m, D), float32
        The anchors of each frame.
    keep : float
        Quantile of the largest share below which a token stays unmerged, as the release has it.
    scaling : float
        Weight of what is merged in.
    counts : list of int, optional
        Number that stays in each later frame instead: those of the smallest largest share, the first of equals.

    Returns
    -------
    anchor : Tensor, (a, D)
    masks : list of Tensor, (m,), bool
        For each later frame: True where a token stays.
    """
    anchor, masks = clip[0], []
    for apart, tokens in enumerate(clip[1:], 1):
        alike = F.normalize(tokens.detach(), dim=-1) @ F.normalize(anchor.detach(), dim=-1).T
        alike = alike.clamp(-1 + 1e-6, 1 - 1e-6)
        far = 1 - torch.exp(torch.tensor(-(apart**2) / _SPREAD)).item()
        share = _per_row(plan(((alike.max() - alike) * far)[None]))[0]
        top = share.amax(1)
        if counts is None:
            stays = top < torch.quantile(top.double(), keep)
        else:
            stays = torch.zeros_like(top, dtype=torch.bool)
            stays[top.sort(stable=True).indices[: counts[apart - 1]]] = True
        anchor = _taken_in(anchor, tokens, share * ~stays[:, None], scaling)
        masks.append(stays)
    return anchor, masks


def _taken(frames: Tensor, places: Tensor) -> Tensor:
    return frames[torch.arange(len(frames), device=frames.device)[:, None], places]


def _per_row(plans: Tensor) -> Tensor:
    return plans / plans.sum(2, keepdim=True).clamp(min=1e-9)


def _taken_in(anchor: Tensor, tokens: Tensor, share: Tensor, scaling: float = 1.0) -> Tensor:
    load = share.sum(-2)[..., None]
    return (anchor + scaling * share.mT @ tokens) / (1 + scaling * load)
