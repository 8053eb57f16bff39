"""EarlyTom: merge frames inside the vision encoder, select by its attention, and merge again inside the LLM."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from vidsieve.compressors._budgets import TwoPartCompressor, check_layers
from vidsieve.compressors.base import encoder_attention, within
from vidsieve.compressors.front import EncoderFront, EncoderView, Front, Merged
from vidsieve.compressors.holitom import absorbed
from vidsieve.compressors.inside import LayerChoice, LayerView
from vidsieve.errors import BudgetError, StageError
from vidsieve.selection import even_counts, kept_tokens, top_indices, top_indices_per_frame
from vidsieve.types import Need, Selection, TokenGrid, VideoTokens

Span = tuple[int, int]
"""The first and the last frame of a segment."""
_LAYERS, _DEPTH = (6, 21, 23), 26
_SLACK = 1e-5
_PLACES = 8
"""Places of all frames that are compared at a time."""


@dataclass(frozen=True)
class EarlyTom(TwoPartCompressor):
    """Merge neighbouring frames between blocks of the vision encoder, so that later blocks encode fewer.

    After each of `layers` the frames are cut into segments of frames that are like their first one. The first and the
    last frame of a segment stay; of those between, pairs that are more alike than these two become one. After the
    last of `layers`, segments are groups: before the LLM, the first and the last frame of a group keep the tokens that
    this block attends to most, and the others the best token of each run of places. Inside the LLM, dropped tokens are
    merged as HoliTom does it.

    Parameters
    ----------
    layers : tuple of int or None
        Blocks of the encoder, from 0 on, after which frames are merged; None: 6, 21 and 23 of 26, scaled to the
        encoder's depth. Not the last.
    threshold : float
        Running cosine with a segment's first frame below which a new one begins.
    window : int
        A segment has fewer frames than this.
    newest : float
        Weight of the newest frame in the running cosine.
    adjacent : bool
        Compare each frame with the one before, as in the paper, and not with the segment's first.
    merge_threshold : float or None
        Cosine above which two frames become one; None: that of the segment's first and last frame.
    mean : bool
        Merge all frames between the first and the last into their mean.
    layer, inner_kept, inner
        As in `TwoPartCompressor`: layer 18 of 28, where 0.5 stay. Without the inner part it is blind to the question.

    Variants: ``"ours"`` keeps exactly ⌊R·N⌋ of the tokens of all frames before the LLM: pairs that are less alike stay
    apart where too few frames would be left. With both parts R is the mean over layers. ``"official"`` rounds in each
    frame, and loses the last but one frame of every segment of four or more. ``docs/methods/earlytom.md`` lists the
    other differences from the release.

    References
    ----------
    EarlyTom (arXiv 2605.30010); the release @ b909322, siglip_encoder.py, earlytom/llava_arch.py.
    """

    name: ClassVar[str] = "earlytom"
    paper: ClassVar[str] = "EarlyTom, arXiv 2605.30010"
    needs: ClassVar[frozenset[Need]] = frozenset({Need.ENCODER_ATTENTION, Need.LAYER_ATTENTION})
    variants: ClassVar[tuple[str, ...]] = ("ours", "official")
    adaptive_variants: ClassVar[tuple[str, ...]] = ("official",)
    default_layer: ClassVar[tuple[int, int]] = (18, 28)
    layers: tuple[int, ...] | None = None
    threshold: float = within(0.6, "[-1, 1]")
    window: int = within(8, "[2, inf)")
    newest: float = within(0.9, "[0, 1]")
    adjacent: bool = False
    merge_threshold: float | None = within(None, "[-1, 1]")
    mean: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_layers(self.layers, _LAYERS, least=0)
        if self.ahead is not None:
            raise StageError(f"{self.name} merges frames inside the encoder itself: nothing can run before it")

    @property
    def front(self) -> Front | None:
        """The part inside the vision encoder; None where everything is kept."""
        return None if self.retention == 1.0 else FrameMerging(self)

    @property
    def title(self) -> str:
        """The name."""
        return self.name

    def merging_layers(self, depth: int) -> tuple[int, ...]:
        """Return the blocks of `depth` after which frames are merged; none in an encoder of one block.

        Raises
        ------
        BudgetError
            If `layers` names the last block or one that is not there.
        """
        if self.layers is None:
            scaled = (round(Fraction(layer * depth, _DEPTH)) for layer in _LAYERS)
            return tuple(sorted({min(layer, depth - 2) for layer in scaled})) if depth > 1 else ()
        if self.layers[-1] > depth - 2:
            raise BudgetError(
                f"{self.name} cannot merge frames after block {self.layers[-1]} of an encoder of {depth}: choose from "
                f"0 to {depth - 2}"
            )
        return self.layers

    def segments(self, alike: Tensor) -> list[Span]:
        """Return the segments of frames whose cosines are (F, F)."""
        return segmented(alike, self.threshold, self.window, self.newest, self.adjacent)

    def _select(self, video: VideoTokens, budget: int, generator: Generator) -> Selection:
        self.check_outer()
        grid, attention = video.grid, encoder_attention(video).float()
        numbers = None if video.encoder is None else video.encoder.segments
        if numbers is None:  # the encoder merged nothing: tokens tell which frames are alike
            with torch.no_grad():
                spans = self.segments(likeness(video.embeds.reshape(grid.frames, grid.per_frame, -1), self.window))
        else:
            spans = spans_of(numbers)
        middle = between(spans)
        if self.adaptive_budget:
            all_frames = (video.whole or grid).frames
            ratio = adjusted(self.budget_ratio(grid.num_tokens), grid.frames, all_frames)
            counts = official_counts(middle, grid.per_frame, ratio)
        else:
            counts = even_counts(budget, grid.frames)
        return Selection(selected(attention, grid, middle, counts), scores=attention)

    def step(self, view: LayerView, keep: int) -> LayerChoice:
        """Return the tokens of the highest mean attention, which absorb the others one by one."""
        chosen = top_indices(view.attention("last", view.layer - 1)[:, 0].mean(0), keep)
        return LayerChoice(chosen, absorbed(view.hidden, chosen.to(view.hidden.device)))


@dataclass(frozen=True)
class FrameMerging(EncoderFront):
    """The part of a method that merges frames inside the vision encoder.

    Parameters
    ----------
    method : EarlyTom
    """

    name: ClassVar[str] = "earlytom"
    method: EarlyTom

    def listens(self, depth: int) -> int | None:
        """Return the last block after which frames are merged."""
        layers = self.method.merging_layers(depth)
        return layers[-1] if layers else None

    def step(self, view: EncoderView) -> Merged | None:
        """Return the frames of every segment, merged; after the last merging block with attention and groups."""
        method, layers = self.method, self.method.merging_layers(view.depth)
        if view.block not in layers:
            return None
        alike = likeness(view.hidden, method.window)
        official = method.variant == "official"
        parts = merges(alike, method.segments(alike), official, method.mean, method.merge_threshold)
        if not official:
            parts = limited(parts, len(alike) - self.least_frames(view))
        hidden, frames = merged(view.hidden, parts), torch.tensor([part.frames[0] for part in parts])
        if view.attention is None:
            return Merged(hidden, frames)
        spans = method.segments(likeness(hidden, method.window))
        numbers = torch.tensor([number for number, (first, last) in enumerate(spans) for _ in range(first, last + 1)])
        return Merged(hidden, frames, merged(view.attention, parts), numbers)

    def least_frames(self, view: EncoderView) -> int:
        """Return the number of frames that must be left for the budget before the LLM."""
        outer = self.method.outer(view.layers) if self.method.inner else self.method
        total = view.frames * view.per_frame
        return -(-min(total, kept_tokens(outer.retention, total)) // view.per_frame)


# -- segments -----------------------------------------------------------------------------------------------


def likeness(frames: Tensor, window: int | None = None) -> Tensor:
    """Return the cosine (F, F) float32 of each pair of frames (F, S, D), the mean over their S places.

    Of a pair `window` frames apart or further it may be 0 instead: no segment holds both.
    """
    count, places, width = frames.shape
    step = min(window or count, count)
    total = torch.zeros(count, count, device=frames.device)
    room = torch.empty(min(_PLACES, places), count, width, device=frames.device)
    for part in torch.split(frames.detach(), _PLACES, 1):
        rows = room[: part.shape[1]].copy_(part.transpose(0, 1))
        length = torch.linalg.vector_norm(rows, dim=2).clamp(min=1e-12)
        for first in range(0, count, step):
            ones, others = slice(first, first + step), slice(first, first + 2 * step - 1)
            products = rows[:, ones] @ rows[:, others].mT  # of each place
            total[ones, others] += (products / (length[:, ones, None] * length[:, None, others])).sum(0)
    return total / frames.shape[1]


def segmented(alike: Tensor, threshold: float, window: int, newest: float, adjacent: bool = False) -> list[Span]:
    """Return the segments of frames whose cosines are (F, F), in order.

    Parameters
    ----------
    threshold, window, newest, adjacent : as in `EarlyTom`
    """
    table, starts, running = alike.tolist(), [0], 1.0
    for frame in range(1, len(table)):
        running = newest * table[frame - 1 if adjacent else starts[-1]][frame] + (1 - newest) * running
        if running < threshold or frame - starts[-1] + 1 >= window:
            starts.append(frame)
            running = 1.0
    return [(first, next_ - 1) for first, next_ in zip(starts, [*starts[1:], len(table)], strict=True)]


def spans_of(numbers: Tensor) -> list[Span]:
    """Return the segments of frames from their numbers (F,) int64, which rise from 0."""
    ends = torch.bincount(numbers).cumsum(0).tolist()
    return [(first, end - 1) for first, end in zip([0, *ends[:-1]], ends, strict=True)]


def between(spans: Sequence[Span]) -> Tensor:
    """Return a mask (F,) bool of the frames that are neither first nor last of their segment."""
    return torch.tensor([first < frame < last for first, last in spans for frame in range(first, last + 1)])


# -- merging frames -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Part:
    """One frame of the output: its frames of the input, their weights, and how alike they are."""

    frames: tuple[int, ...]
    weights: tuple[float, ...] = (1.0,)
    alike: float = math.inf


def merges(
    alike: Tensor, spans: Sequence[Span], official: bool, mean: bool = False, threshold: float | None = None
) -> list[Part]:
    """Return the frames that each segment becomes, in order.

    Parameters
    ----------
    alike : Tensor, (F, F)
    official : bool
        Do as the release does: lose the last frame between the first and the last, and merge only what is more alike
        than the threshold and the next pair, not what is as alike.
    mean, threshold : as in `EarlyTom`
    """
    table, parts = alike.tolist(), []
    slack = 0.0 if official else _SLACK
    for first, last in spans:
        middle = range(first + 1, last)
        parts.append(Part((first,)))
        bound = (table[first][last] if threshold is None else threshold) - slack
        pairs = [table[frame][frame + 1] for frame in middle[:-1]]
        if mean and len(middle) > 1:
            parts.append(Part((*middle,), (1 / len(middle),) * len(middle), min(pairs)))
        else:
            parts += _paired(middle, pairs, bound, slack, official)
        if last > first:
            parts.append(Part((last,)))
    return parts


def _paired(middle: range, pairs: list[float], bound: float, slack: float, official: bool) -> list[Part]:
    """Return the frames `middle` with some neighbours made one; `pairs` are the cosines of neighbours."""
    parts, place = [], 0
    while place < len(pairs):
        own, after = pairs[place], pairs[place + 1] if place + 1 < len(pairs) else None
        if own > bound and (after is None or own > after - slack):
            if official:
                share = 1.0 if after is None else own / (own + after)
            else:
                share = 0.5 if after is None else max(own, _SLACK) / (max(own, _SLACK) + max(after, _SLACK))
            parts.append(Part((middle[place], middle[place + 1]), (share, 1 - share), own))
            place += 2
        else:
            parts.append(Part((middle[place],)))
            place += 1
    if place < len(middle) and not (official and pairs):
        parts.append(Part((middle[-1],)))
    return parts


def limited(parts: Sequence[Part], room: int) -> list[Part]:
    """Return parts that save at most `room` frames: the most alike stay merged, the others come apart."""
    whole = set()
    for number in sorted(range(len(parts)), key=lambda number: -parts[number].alike):
        saved = len(parts[number].frames) - 1
        if saved <= room:
            whole.add(number)
            room -= saved
    return [
        part
        for number, merged_part in enumerate(parts)
        for part in ([merged_part] if number in whole else [Part((frame,)) for frame in merged_part.frames])
    ]


def merged(rows: Tensor, parts: Sequence[Part]) -> Tensor:
    """Return the rows (F', …) that frames (F, …) become."""
    made = []
    for part in parts:
        frames = rows[list(part.frames)]
        if len(part.frames) > 1:
            weights = torch.tensor(part.weights, device=rows.device)
            frames = torch.einsum("f,f...->...", weights, frames.float()).to(rows.dtype)[None]
        made.append(frames)
    return torch.cat(made)


# -- selecting tokens ---------------------------------------------------------------------------------------


def adjusted(ratio: float, left: int, frames: int) -> float:
    """Return the share of the tokens of `left` frames that makes up `ratio` of those of all `frames`, at most 1."""
    return min(ratio / (left / frames), 1.0)


def official_counts(middle: Tensor, size: int, ratio: float) -> Tensor:
    """Return the number of tokens (F,) int64 that the release keeps of frames of `size` tokens.

    Parameters
    ----------
    middle : Tensor, (F,), bool
        Frames between the first and the last of their group: half to even, at least one; else rounded up.
    """
    return torch.where(middle, max(1, round(size * ratio)), math.ceil(size * ratio))


def selected(attention: Tensor, grid: TokenGrid, middle: Tensor, counts: Tensor) -> Tensor:
    """Return the sorted raster indices of the `counts` (F,) tokens kept of each frame.

    Parameters
    ----------
    attention : Tensor, (N,)
    middle : Tensor, (F,), bool
        Frames that keep the best token of each run of places; the others keep the best.
    """
    kept = [top_indices_per_frame(attention, grid, counts.masked_fill(middle, 0))]
    rows = attention.reshape(grid.frames, grid.per_frame)
    for count in sorted({*counts[middle].tolist()}):
        frames = (middle & (counts == count)).nonzero().flatten().to(rows.device)
        if count:
            kept.append((best_of_runs(rows[frames], count) + frames[:, None] * grid.per_frame).flatten())
    return torch.cat(kept).sort().values


def best_of_runs(scores: Tensor, count: int) -> Tensor:
    """Return the place of the highest of (F, n) scores in each of `count` runs, (F, count) int64; ties: the first.

    Runs are as long as each other, but the first n mod `count` one longer.
    """
    runs = torch.arange(scores.shape[1], device=scores.device).tensor_split(count)
    places = torch.stack([F.pad(run, (0, len(runs[0]) - len(run)), value=-1) for run in runs])
    best = scores[:, places].masked_fill(places < 0, -torch.inf).argmax(-1)
    return places.gather(1, best.T).T
