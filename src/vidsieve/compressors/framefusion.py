"""FrameFusion: merge tokens that repeat over frames, layer by layer, then drop those with little attention."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from vidsieve.compressors._budgets import PartedCompressor
from vidsieve.compressors._clustering import along_time, totals
from vidsieve.compressors.base import Compressor, within
from vidsieve.compressors.inside import LayerChoice, LayerView
from vidsieve.errors import BudgetError
from vidsieve.selection import exact_ratio, top_indices
from vidsieve.types import Selection, TokenGrid, VideoTokens

_FIRST = -2.0
"""Similarity of a place's first token, which has no predecessor."""
_OFFICIAL_DEPTH = 28
_BLOCK = 512


@dataclass(frozen=True)
class FrameFusion(PartedCompressor):
    """Before each of the first layers, merge tokens like the one before them at the same place; then drop once.

    On an LLM with other layers than full attention, these are the first that it lets the method use. Of every place, a
    token whose cosine to the place's last remaining one is `threshold` or more joins it; whole chains become the mean
    of their members at the first's position. When a step merges less than `least` of the tokens, the next one drops,
    by the attention of the last prompt token in the layer before, as many as the budget asks for. A step that would
    merge more than the budget needs merges the most alike only, and all is done. In ``"ours"`` a step after which
    nothing would be left for later layers drops too, or, before the LLM, merges the most alike.

    Parameters
    ----------
    threshold : float
        Least cosine at which tokens are merged (release: 0.6 for LLaVA-Video, 0.5 for Qwen2-VL).
    least : float
        Share of the tokens that a step must merge for another to follow.
    inner : bool
        Run the steps inside the LLM. Without it the most alike tokens are merged before the LLM until ⌊R·N⌋ are
        left, and the question is not read.
    depth : int
        Set by `outer`: number of layers over which the budget is a mean, for the first of several steps.

    Variants: in both R is the mean over layers. The release counts 28 layers whatever the model has, and rounds what is
    dropped half to even. It merges between attention and MLP; here every step inside the LLM is before a layer.
    ``docs/methods/framefusion.md`` lists the other differences from the release.

    References
    ----------
    FrameFusion, ICCV 2025 (arXiv 2501.01986); thu-nics/FrameFusion @ fbec1d2, framefusion/main.py.
    """

    name: ClassVar[str] = "framefusion"
    paper: ClassVar[str] = "FrameFusion, ICCV 2025"
    variants: ClassVar[tuple[str, ...]] = ("ours", "official")
    expected_failures: ClassVar[dict[str, str]] = {
        "check_layer_step": "the number of tokens that a step leaves depends on the video"
    }
    threshold: float = within(0.6, "[-1, 1]")
    least: float = within(0.1, "[0, 1]")
    depth: int = 0

    @property
    def adaptive_budget(self) -> bool:
        """True for the first of several steps: the number of tokens that it merges depends on the video."""
        return bool(self.depth) and not self.inner

    # -- before the LLM -------------------------------------------------------------------------------------

    def outer(self, num_layers: int) -> Compressor:
        """Return the first step."""
        return replace(self, inner=False, depth=self._depth(num_layers)).fitted(self.cuts)

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
            merged = merged_step(alike, self.threshold, float(over), going)
            if not self._affords(total - int(merged.sum()), (), 0, self.depth, video.grid):
                merged = merged_step(alike, _FIRST - 1, float(over), going)
        else:
            merged = merged_step(alike, _FIRST - 1, 0.0, video.num_tokens - budget)
        kept = (~merged).nonzero().flatten()
        return Selection(kept, collapsed(video.embeds, merged, indices, video.grid))

    def budget(self, video: VideoTokens) -> int:
        """Return K.

        Raises
        ------
        BudgetError
            Without the part inside the LLM, if it is less than one frame: every place keeps a token.
        """
        if self.adaptive_budget:
            return super().budget(video)
        return self.budget_above(video, video.grid.per_frame, "every place keeps a token")

    # -- inside the LLM -------------------------------------------------------------------------------------

    def stages(self, num_layers: int, num_tokens: int) -> tuple[tuple[int, int], ...]:
        """Return all layers that can be used, with every token: the number that a step leaves depends on the video."""
        if num_layers < 2:
            raise BudgetError("framefusion needs a model of two layers or more")
        return tuple((layer, num_tokens) for layer in self._steps(num_layers))

    def _steps(self, num_layers: int) -> Sequence[int]:
        return self.cuts or range(1, num_layers)

    def _count(self, over: Fraction, left: int) -> int:
        """Return the number of tokens, among those left, that must go; the release rounds down."""
        return int(over * left) if self.variant == "official" else math.ceil(over * left)

    def _excess(self, history: Sequence[int], num_layers: int, grid: TokenGrid) -> Fraction:
        shares = [Fraction(count, grid.num_tokens) for count in history]
        return excess(shares, exact_ratio(self.retention, grid.num_tokens), self._depth(num_layers))

    def _affords(self, alive: int, history: Sequence[int], layer: int, num_layers: int, grid: TokenGrid) -> bool:
        """Return True if layers from `layer` to the next step may see `alive` tokens and each later one still one.

        The release does not check.
        """
        if self.variant == "official":
            return True
        budget = exact_ratio(self.retention, grid.num_tokens) * num_layers * grid.num_tokens
        following = next((step for step in self._steps(num_layers) if step > layer), num_layers)
        return sum(history) + alive * (following - layer) + num_layers - following <= budget

    def step(self, view: LayerView, keep: int) -> LayerChoice:
        """Return the tokens that are not merged into another, or not dropped; all where the budget is met.

        After a step that merges, hidden states are means of chains.
        """
        count = len(view.indices)
        over = self._excess(view.history, view.depth, view.grid)
        going = self._count(over, count)
        if not going:
            return LayerChoice(torch.arange(count, device=view.indices.device))
        last = max((step for step in self._steps(view.depth) if step < view.layer), default=0)
        before, after = [view.grid.num_tokens, *view.history][last], view.history[-1]
        drops = before - after < self.least * before  # the last step merged too little
        if not drops:
            alike = similarity(view.hidden.detach(), view.indices.to(view.hidden.device), view.grid)
            merged = merged_step(alike, self.threshold, float(over), going)
            alive = count - int(merged.sum())
            drops = not self._affords(alive, view.history, view.layer, view.depth, view.grid)
        if drops:
            kept = round(count * (1 - over)) if self.variant == "official" else count - going
            attention = view.attention("last", view.layer - 1)[:, 0]
            return LayerChoice(top_indices(attention.mean(0), max(1, kept)))
        hidden = collapsed(view.hidden, merged, view.indices.to(merged.device), view.grid)
        return LayerChoice((~merged).nonzero().flatten(), hidden)


# -- steps --------------------------------------------------------------------------------------------------


def excess(shares: Sequence[Fraction], ratio: Fraction, depth: int) -> Fraction:
    """Return the share of the tokens left that must go for a mean of `ratio` over `depth` layers.

    Parameters
    ----------
    shares : sequence of Fraction
        Share of the tokens that each layer so far has seen.

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
    """Return the cosine (n,) float32 of tokens (n, D) to the last one before them at their place; −2 for the first."""
    if len(indices) == grid.num_tokens:  # nothing to put in order
        frames = hidden.reshape(grid.frames, grid.per_frame, -1)
        whole = along_time(frames, torch.float32)
        return torch.cat([torch.full_like(frames[:1, :, 0], _FIRST, dtype=torch.float32), whole]).flatten()
    order = by_place(indices, grid)
    place = indices[order] % grid.per_frame
    cosine = torch.full((len(indices),), _FIRST, device=hidden.device)
    for start in range(1, len(order), _BLOCK):  # some at a time: no second copy of all tokens
        tokens = hidden[order[start - 1 : start + _BLOCK]].float()
        cosine[start : start + _BLOCK] = F.cosine_similarity(tokens[1:], tokens[:-1], dim=-1)
    first = torch.ones_like(place, dtype=torch.bool)
    first[1:] = place[1:] != place[:-1]
    alike = torch.empty_like(cosine)
    alike[order] = cosine.masked_fill(first, _FIRST)
    return alike


def merged_step(alike: Tensor, threshold: float, over: float, going: int) -> Tensor:
    """Return the mask (n,) of tokens that are merged, by their similarity (n,).

    These are the tokens at `threshold` or above, if they are fewer than the share `over`; else the `going` most alike.
    """
    merged = alike >= threshold
    if float(merged.sum()) / len(alike) < over:
        return merged
    chosen = torch.zeros_like(merged)
    chosen[top_indices(alike, going)] = True
    return chosen & (alike > _FIRST)  # the first token of a place has nothing to join


def chain_heads(merged: Tensor) -> Tensor:
    """Return the place where each token's chain begins, of a mask (n,): the last one before it that is not merged."""
    places = torch.arange(len(merged), device=merged.device)
    return torch.where(merged, -1, places).cummax(0).values


def collapsed(hidden: Tensor, merged: Tensor, indices: Tensor, grid: TokenGrid) -> Tensor:
    """Return the tokens (k, D) that are not merged, among tokens (n, D), each the mean of its chain."""
    order, owner = by_place(indices, grid), torch.empty_like(indices)
    owner[order] = order[chain_heads(merged[order])]
    chain = ((~merged).cumsum(0) - 1)[owner]
    total, members = totals(hidden, chain, int((~merged).sum()))
    return (total / members).to(hidden.dtype)
