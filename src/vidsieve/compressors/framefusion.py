"""FrameFusion: merge what repeats from frame to frame, layer by layer, then drop what the prompt does not attend to."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from vidsieve.compressors._clustering import along_time, totals
from vidsieve.compressors._parts import PartedCompressor
from vidsieve.compressors.base import Compressor, check_cosine
from vidsieve.errors import BudgetError, StageError
from vidsieve.selection import exact_ratio, kept_tokens, least_retention, top_indices
from vidsieve.types import LayerView, Selection, TokenGrid, VideoTokens

_FIRST = -2.0
"""Similarity of a place's first token, which is compared with nothing."""
_OFFICIAL_DEPTH = 28
_BLOCK = 512


@dataclass(frozen=True)
class FrameFusion(PartedCompressor):
    """Before each of the first layers, merge tokens like the one before them at the same place; then drop once.

    Of every place, a token whose cosine to the place's last remaining one is `threshold` or more joins it; whole chains
    become the mean of their members at the first's position. When a step merges less than `least` of what is there,
    the next one drops, by the attention of the last prompt token in the layer before, as many as the budget asks for.
    A step that would merge more than the budget needs merges the most alike only, and all is done. In ``"ours"`` a step
    after which nothing would be left for later layers drops too, or, before the LLM, merges the most alike.

    Parameters
    ----------
    threshold : float
        Cosine from which on tokens are merged (release: 0.6 for LLaVA-Video, 0.5 for Qwen2-VL).
    least : float
        Share of the tokens that a step must merge for another to follow.
    inner : bool
        Whether steps inside the LLM run. Without it the most alike tokens are merged before the LLM until ⌊R·N⌋ are
        left, and the question is not read.
    depth : int
        Set by `outer`: the layers over which the budget is a mean, where the first of several steps is run.

    Variants: in ``"ours"`` and ``"official"`` R is the mean over layers. The release counts 28 layers whatever the
    model has and rounds what is dropped half to even; ours counts the model's. The release merges before the first
    layer and then inside layers, between attention and MLP, where hooks cannot shorten a prompt: here every later step
    is before the next layer, on the MLP's outputs. Tokens keep their positions, as in the release; newlines of
    LLaVA-Video, which the release merges over time like tokens, are the adapter's. LLaVA-OneVision is not supported by
    the release.

    References
    ----------
    FrameFusion, ICCV 2025 (arXiv 2501.01986); thu-nics/FrameFusion @ fbec1d2, framefusion/main.py.
    """

    name: ClassVar[str] = "framefusion"
    paper: ClassVar[str] = "FrameFusion, ICCV 2025"
    variants: ClassVar[tuple[str, ...]] = ("ours", "official")
    merges: ClassVar[bool] = True
    adaptive: ClassVar[bool] = True
    threshold: float = 0.6
    least: float = 0.1
    depth: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_cosine("threshold", self.threshold)
        if not 0 <= self.least <= 1:
            raise BudgetError(f"least is a share in [0, 1], got {self.least}")

    @property
    def outcome(self) -> bool:
        """How much the first of several steps merges follows from the video."""
        return bool(self.depth) and not self.inner

    # -- before the LLM -------------------------------------------------------------------------------------

    def outer(self, num_layers: int) -> Compressor:
        """Return the first step."""
        return replace(self, inner=False, depth=self._depth(num_layers))

    def _depth(self, num_layers: int) -> int:
        return _OFFICIAL_DEPTH if self.variant == "official" else num_layers

    def _select(self, video: VideoTokens, budget: int, generator: Generator) -> Selection:
        self.check_outer()
        indices = torch.arange(video.num_tokens, device=video.embeds.device)
        alike = similarity(video.embeds.detach(), indices, video.grid)
        if self.depth:
            total = video.num_tokens
            over = excess([], exact_ratio(self.retention, total), self.depth)
            going = self._count(over, total)
            merged, _ = merged_step(alike, self.threshold, float(over), going)
            if not self._affords(total - int(merged.sum()), (), self.depth, video.grid):
                merged, _ = merged_step(alike, _FIRST - 1, float(over), going)
        else:
            merged, _ = merged_step(alike, _FIRST - 1, 0.0, video.num_tokens - budget)
        kept = (~merged).nonzero().flatten()
        return Selection(kept, collapsed(video.embeds, merged, indices, video.grid))

    def budget(self, video: VideoTokens) -> int:
        """Return K.

        Raises
        ------
        BudgetError
            Without the part inside the LLM, if it is less than one frame: every place keeps a token.
        """
        if self.outcome:
            return super().budget(video)
        wanted = kept_tokens(self.retention, video.num_tokens)
        if wanted < video.grid.per_frame:
            raise BudgetError(
                f"{self.describe()}: every place keeps a token, {video.grid.per_frame} of {video.num_tokens} in a grid "
                f"of {video.grid}; ask for a retention from "
                f"{least_retention(video.grid.per_frame, video.num_tokens):g} to 1"
            )
        return wanted

    # -- inside the LLM -------------------------------------------------------------------------------------

    def stages(self, num_layers: int, num_tokens: int) -> tuple[tuple[int, int], ...]:
        """Return all layers but the first: how many tokens each step leaves follows from what it sees."""
        if num_layers < 2:
            raise BudgetError("framefusion needs a model of two layers or more")
        return tuple((layer, num_tokens) for layer in range(1, num_layers))

    def settled(self, history: Sequence[int], num_layers: int, grid: TokenGrid) -> bool:
        """Return whether no step follows: what is there fits the budget."""
        return self._count(self._excess(history, num_layers, grid), history[-1]) == 0

    def _count(self, over: Fraction, alive: int) -> int:
        """Return how many of the tokens alive must go; the release leaves a fraction of one."""
        return int(over * alive) if self.variant == "official" else math.ceil(over * alive)

    def _excess(self, history: Sequence[int], num_layers: int, grid: TokenGrid) -> Fraction:
        shares = [Fraction(count, grid.num_tokens) for count in history]
        return excess(shares, exact_ratio(self.retention, grid.num_tokens), self._depth(num_layers))

    def _affords(self, alive: int, history: Sequence[int], num_layers: int, grid: TokenGrid) -> bool:
        """Return whether a layer may see `alive` tokens and each later one still one; the release does not ask."""
        if self.variant == "official":
            return True
        budget = exact_ratio(self.retention, grid.num_tokens) * num_layers * grid.num_tokens
        return sum(history) + alive + num_layers - len(history) - 1 <= budget

    def _step(self, view: LayerView) -> tuple[Tensor, bool]:
        """Return which tokens (n,) go, and whether they are merged; none where the budget is met."""
        if view.hidden is None:
            raise StageError("framefusion reads hidden states: hand over a view that has them")
        over = self._excess(view.history, view.depth, view.grid)
        count, gone = len(view.indices), torch.zeros(len(view.indices), dtype=torch.bool, device=view.hidden.device)
        going = self._count(over, count)
        if not going:
            return gone, False
        before = [view.grid.num_tokens, *view.history]
        merged = gone
        drops = before[-2] - before[-1] < self.least * before[-2]  # the last step merged too little
        if not drops:
            alike = similarity(view.hidden, view.indices, view.grid)
            merged, _ = merged_step(alike, self.threshold, float(over), going)
            drops = not self._affords(count - int(merged.sum()), view.history, view.depth, view.grid)
        if drops:
            kept = round(count * (1 - over)) if self.variant == "official" else count - going
            gone[:] = True
            gone[top_indices(view.attention.mean(0), max(1, kept)).to(gone.device)] = False
            return gone, False
        return merged, True

    def choose(self, view: LayerView, keep: int) -> Tensor:
        """Return the tokens that are not merged into another, or not dropped."""
        gone, _ = view.notes["step"] = self._step(view)
        return (~gone).nonzero().flatten()

    def merge(self, view: LayerView, chosen: Tensor) -> Tensor:
        """Return the hidden states of the tokens that stay: means of their chains after a step that merges."""
        if view.hidden is None:
            raise StageError("framefusion reads hidden states: hand over a view that has them")
        gone, merging = view.notes.get("step") or self._step(replace(view, hidden=view.hidden.detach()))
        if merging:
            return collapsed(view.hidden, gone, view.indices.to(gone.device), view.grid)
        return view.hidden[chosen.to(view.hidden.device)]


# -- steps --------------------------------------------------------------------------------------------------


def excess(shares: Sequence[Fraction], ratio: Fraction, depth: int) -> Fraction:
    """Return what share of the tokens that are left must go for a mean of `ratio` over `depth` layers.

    Parameters
    ----------
    shares : sequence of Fraction
        What each layer so far has seen of the tokens.

    Raises
    ------
    BudgetError
        If the layers so far have seen more than the whole budget.
    """
    left = depth * ratio - sum(shares, Fraction(0))
    if left < 0 or len(shares) >= depth:
        raise BudgetError(
            f"framefusion: the first {len(shares)} of {depth} layers have seen more than a mean of {float(ratio):g} "
            "allows for all; ask for more, or a lower threshold"
        )
    alive = shares[-1] if shares else Fraction(1)
    return max(Fraction(0), 1 - left / ((depth - len(shares)) * alive))


def by_place(indices: Tensor, grid: TokenGrid) -> Tensor:
    """Return the order (n,) that lists tokens, raster indices, by their places and in them by time."""
    return (indices % grid.per_frame * grid.frames + indices // grid.per_frame).argsort()


def similarity(hidden: Tensor, indices: Tensor, grid: TokenGrid) -> Tensor:
    """Return (n,) float32: the cosine of tokens (n, D) to the last one before them at their place; −2 for the first."""
    if len(indices) == grid.num_tokens:  # nothing to put in order
        frames = hidden.reshape(grid.frames, grid.per_frame, -1)
        whole = along_time(frames.float())
        return torch.cat([torch.full_like(frames[:1, :, 0], _FIRST, dtype=torch.float32), whole]).flatten()
    order = by_place(indices, grid)
    place = indices[order] % grid.per_frame
    found = torch.full((len(indices),), _FIRST, device=hidden.device)
    for start in range(1, len(order), _BLOCK):  # some at a time: no second copy of all tokens
        tokens = hidden[order[start - 1 : start + _BLOCK]].float()
        found[start : start + _BLOCK] = F.cosine_similarity(tokens[1:], tokens[:-1], dim=-1)
    first = torch.ones_like(place, dtype=torch.bool)
    first[1:] = place[1:] != place[:-1]
    made = torch.empty_like(found)
    made[order] = found.masked_fill(first, _FIRST)
    return made


def merged_step(alike: Tensor, threshold: float, over: float, going: int) -> tuple[Tensor, bool]:
    """Return which tokens are merged by their similarity (n,), and whether that is all the budget needs.

    Those at `threshold` or above, if they are fewer than the share `over`; else the `going` most alike.
    """
    merged = alike >= threshold
    if float(merged.sum()) / len(alike) < over:
        return merged, False
    chosen = torch.zeros_like(merged)
    chosen[top_indices(alike, going)] = True
    return chosen & (alike > _FIRST), True  # the first token of a place has nothing to join


def chain_heads(merged: Tensor) -> Tensor:
    """Return for each token of a list (n,) bool where its chain begins: the last one before it that is not merged."""
    places = torch.arange(len(merged), device=merged.device)
    return torch.where(merged, -1, places).cummax(0).values


def collapsed(hidden: Tensor, merged: Tensor, indices: Tensor, grid: TokenGrid) -> Tensor:
    """Return those of tokens (n, D) that are not merged, in their order (k, D), each the mean of its chain."""
    order, owner = by_place(indices, grid), torch.empty_like(indices)
    owner[order] = order[chain_heads(merged[order])]
    chain = ((~merged).cumsum(0) - 1)[owner]
    total, members = totals(hidden, chain, int((~merged).sum()))
    return (total / members).to(hidden.dtype)
