"""FastV: after the first layers, keep the video tokens that the last prompt token attends to most."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from vidsieve.compressors._budgets import left_for_later
from vidsieve.compressors.base import within
from vidsieve.compressors.inside import LayerChoice, LayerCompressor, LayerView, usable_layer
from vidsieve.selection import exact_ratio, top_indices

_LAYER = 2


@dataclass(frozen=True)
class FastV(LayerCompressor):
    """Before layer K, keep the tokens with the highest attention from the last prompt token in layer K − 1.

    Attention is averaged over heads; earlier layers see every token.

    Parameters
    ----------
    layer : int or None
        K, the first layer that runs on fewer tokens (the release's LLaVA demo: 3). None: the paper's 2, or the next
        that an LLM with other layers than full attention lets it use.
    earliest : bool
        Where R is less than the first K layers alone see, drop at an earlier layer instead of raising an error; the
        trace names the layer.

    Variants: in ``"ours"`` the budget is the mean over all layers, Σ_layers tokens = ⌊R·N·layers⌋ to within one token a
    layer; R cannot go below K / layers. In ``"official"`` R is the fraction kept from layer K on, rounded half to even
    as in the release's LLaVA port. ``docs/methods/fastv.md`` lists the other differences from the release.

    References
    ----------
    FastV, ECCV 2024 (arXiv 2403.06764); pkunlp-icler/FastV @ d1659729.
    """

    name: ClassVar[str] = "fastv"
    paper: ClassVar[str] = "FastV, ECCV 2024"
    variants: ClassVar[tuple[str, ...]] = ("ours", "official")
    layer: int | None = within(None, "[1, inf)")
    earliest: bool = False

    def stages(self, num_layers: int, num_tokens: int) -> tuple[tuple[int, int], ...]:
        """Return the one stage (K, tokens kept from there on)."""
        layer = self.placed(self.layer, _LAYER, num_layers)
        if self.variant == "official":
            return ((layer, max(1, round(num_tokens * self.budget_ratio(num_tokens)))),)
        budget = exact_ratio(self.retention, num_tokens) * num_layers
        if self.earliest and budget <= layer:
            layer = max(1, math.floor(budget / 2))  # half of the budget for layers that see every token
            layer = layer if self.cuts is None else usable_layer(layer, self.cuts, early=True)
        left = left_for_later(budget, layer, num_layers, num_tokens, self.describe(), self.earliest, self.cuts)
        return ((layer, math.floor(left / (num_layers - layer) * num_tokens)),)

    def step(self, view: LayerView, keep: int) -> LayerChoice:
        """Return the tokens of the highest mean attention in the layer before."""
        attention = view.attention("last", view.layer - 1)[:, 0]
        return LayerChoice(top_indices(attention.mean(0), keep))
