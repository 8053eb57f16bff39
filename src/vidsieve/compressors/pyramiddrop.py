"""PyramidDrop: in several steps through the LLM, keep fewer and fewer of the video tokens."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar

from vidsieve.compressors._budgets import check_layers, scaled_counts, scaled_layers
from vidsieve.compressors.inside import LayerChoice, LayerCompressor, LayerView
from vidsieve.errors import BudgetError
from vidsieve.selection import exact_ratio, top_indices
from vidsieve.types import Tokens

_LAYERS, _DEPTH = (8, 16, 24), 32
_FRACTIONS = (Fraction(1, 2), Fraction(1, 4), Fraction(1, 8))
_MEAN = Fraction(15, 32)
"""Mean over layers of the fraction that they see in the paper."""


@dataclass(frozen=True)
class PyramidDrop(LayerCompressor):
    """Before some layers, keep the tokens with the highest attention from the last prompt token in that very layer.

    Attention is averaged over heads and computed by the layer's own projections from the states that are about to enter
    it. Every step keeps half of the tokens that are left.

    Parameters
    ----------
    layers : tuple of int or None
        The layers before which tokens are dropped; None: the paper's 8, 16 and 24 of 32, scaled to the model's depth,
        each or the next that an LLM with other layers than full attention lets it use.
    fractions : tuple of float or None
        Share of the video's tokens that is left from each of them on; None: the paper's 1/2, 1/4 and 1/8.
    earliest : bool
        Where R is less than the first layers alone see, drop before earlier layers instead of raising an error; the
        trace names them.

    Variants: in ``"ours"`` the budget is the mean over all layers: the fractions are scaled by one factor, up to all
    tokens. In ``"official"`` fractions are used as given; without them R is λ, the share that a step keeps: ⌊N·λⁱ⌋
    tokens after the i-th. Positions are then counted anew after every step, in models with one row of them.
    ``docs/methods/pyramiddrop.md`` lists the other differences from the release, which is for still images.

    References
    ----------
    PyramidDrop, CVPR 2025 (arXiv 2410.17247); Cooperx521/PyramidDrop @ 6444f304.
    """

    name: ClassVar[str] = "pyramiddrop"
    paper: ClassVar[str] = "PyramidDrop, CVPR 2025"
    variants: ClassVar[tuple[str, ...]] = ("ours", "official")
    lookback: ClassVar[int] = 0
    retention: float | Tokens = 0.5
    layers: tuple[int, ...] | None = None
    fractions: tuple[float, ...] | None = None
    earliest: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_layers(self.layers, _LAYERS)
        shares = self.fractions
        falling = shares is None or (
            shares and all(0 < f <= 1 for f in shares) and list(shares) == sorted(shares)[::-1]
        )
        if not falling:
            raise BudgetError(f"fractions must fall within (0, 1], as (0.5, 0.25, 0.125), got {shares}")
        if len(self.layers or _LAYERS) != len(shares or _FRACTIONS):
            raise BudgetError(f"{len(self.layers or _LAYERS)} layers need as many fractions, got {shares}")

    def stages(self, num_layers: int, num_tokens: int) -> tuple[tuple[int, int], ...]:
        """Return (layer, tokens kept from there on) of every step."""
        ratio = exact_ratio(self.retention, num_tokens)
        layers = self._layers(num_layers, ratio)
        if self.variant == "official":
            if self.fractions is None:
                kept = [int(num_tokens * ratio ** (step + 1)) for step in range(len(layers))]
            else:
                kept = [int(num_tokens * share) for share in self.fractions]
            return tuple((at, max(1, count)) for at, count in zip(layers, kept, strict=True))
        shares = _FRACTIONS if self.fractions is None else tuple(Fraction(repr(float(f))) for f in self.fractions)
        counts = scaled_counts(shares, layers, num_layers, num_tokens, ratio, self)
        return tuple(zip(layers, counts, strict=True))

    def _layers(self, num_layers: int, ratio: Fraction) -> list[int]:
        """Return the layers of all steps, rising."""
        scale = Fraction(1) if self.layers is not None else Fraction(num_layers, _DEPTH)
        wanted = self.layers or _LAYERS
        if self.earliest and ratio < _MEAN:
            scale *= ratio / _MEAN
        return scaled_layers(wanted, scale, num_layers, None if self.layers and scale == 1 else self)

    def step(self, view: LayerView, keep: int) -> LayerChoice:
        """Return the tokens of the highest mean attention in the layer that is about to run."""
        chosen = top_indices(view.attention("last", view.layer)[:, 0].mean(0), keep)
        return LayerChoice(chosen, order=chosen if self.variant == "official" else None)
