"""PyramidDrop: in several steps through the LLM, keep fewer and fewer of the video tokens."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar

from torch import Tensor

from vidsieve.compressors._stages import scaled_counts, scaled_layers
from vidsieve.compressors.base import LayerCompressor, check_layer
from vidsieve.errors import BudgetError
from vidsieve.selection import exact_ratio, top_indices
from vidsieve.types import LayerView, Tokens

_LAYERS, _DEPTH = (8, 16, 24), 32
_FRACTIONS = (Fraction(1, 2), Fraction(1, 4), Fraction(1, 8))
_MEAN = Fraction(15, 32)
"""What layers see on average in the paper."""


@dataclass(frozen=True)
class PyramidDrop(LayerCompressor):
    """Before some layers, keep the tokens with the highest attention from the last prompt token in that very layer.

    Attention is averaged over heads, from the layer's own projections of what is about to enter it. Every step keeps
    half of what the one before left.

    Parameters
    ----------
    layers : tuple of int or None
        The layers before which tokens are dropped; None: the paper's 8, 16 and 24 of 32, scaled to the model's depth.
    fractions : tuple of float or None
        Share of the video's tokens that is left from each of them on; None: the paper's 1/2, 1/4 and 1/8.
    earliest : bool
        Where R is less than the first layers alone see, drop before earlier layers instead of refusing; the trace says
        which.

    Variants: in ``"ours"`` the budget is the mean over all layers: fractions keep their ratios to each other and are
    scaled by one factor, up to all tokens; R cannot go below the share of the layers before the first step. Kept tokens
    stay at their positions. In ``"official"`` fractions are as they stand, and without any R is λ, the share that a
    step keeps: ⌊N·λⁱ⌋ tokens after the i-th; positions are numbered anew after every step, as in the release, where a
    model has one row of them. The release is for one still image of LLaVA-1.5, newlines among what is ranked; there is
    no official port to video: here N is every token of the video, newlines excluded, and all videos of a prompt are
    ranked each for itself.

    References
    ----------
    PyramidDrop, CVPR 2025 (arXiv 2410.17247); Cooperx521/PyramidDrop @ 6444f304.
    """

    name: ClassVar[str] = "pyramiddrop"
    paper: ClassVar[str] = "PyramidDrop, CVPR 2025"
    variants: ClassVar[tuple[str, ...]] = ("ours", "official")
    own_layer: ClassVar[bool] = True
    retention: float | Tokens = 0.5
    layers: tuple[int, ...] | None = None
    fractions: tuple[float, ...] | None = None
    earliest: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.layers is not None:
            for layer in self.layers:
                check_layer(layer)
            if list(self.layers) != sorted(set(self.layers)) or not self.layers:
                raise BudgetError(f"layers are rising numbers, as (8, 16, 24), got {self.layers}")
        shares = self.fractions
        falling = shares is None or (
            shares and all(0 < f <= 1 for f in shares) and list(shares) == sorted(shares)[::-1]
        )
        if not falling:
            raise BudgetError(f"fractions are falling shares in (0, 1], as (0.5, 0.25, 0.125), got {shares}")
        if len(self.layers or _LAYERS) != len(shares or _FRACTIONS):
            raise BudgetError(f"{len(self.layers or _LAYERS)} layers need as many fractions, got {shares}")

    @property
    def renumbers(self) -> bool:
        """Under ``"official"``."""
        return self.variant == "official"

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
        found = scaled_counts(shares, layers, num_layers, num_tokens, ratio, self.describe(), self.earliest)
        return tuple(zip(layers, found, strict=True))

    def _layers(self, num_layers: int, ratio: Fraction) -> list[int]:
        """Return the layers of all steps, rising."""
        scale = Fraction(1) if self.layers is not None else Fraction(num_layers, _DEPTH)
        wanted = self.layers or _LAYERS
        if self.earliest and ratio < _MEAN:
            scale *= ratio / _MEAN
        return scaled_layers(wanted, scale, num_layers)

    def choose(self, view: LayerView, keep: int) -> Tensor:
        """Return the tokens of the highest mean attention."""
        return top_indices(view.attention.mean(0), keep)
