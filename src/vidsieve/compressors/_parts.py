"""Methods with a part before the LLM and one inside it, which drops once more: how one budget is split between them."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import ClassVar

from vidsieve.compressors.base import Compressor, LayerCompressor, check_layer, check_switch, layer_of
from vidsieve.errors import BudgetError, StageError
from vidsieve.types import Stage, Tokens


@dataclass(frozen=True)
class PartedCompressor(LayerCompressor):
    """Base of methods whose part inside the LLM can be left out.

    Parameters
    ----------
    inner : bool
        Whether the part inside the LLM runs. Without it the method acts before the LLM only.
    """

    inner: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_switch("inner", self.inner)

    @property
    def acts(self) -> Stage:
        """Inside the LLM; before it where `inner` is off."""
        return Stage.LAYER if self.inner else Stage.PRE_LLM

    def check_outer(self) -> None:
        """Refuse to select before the LLM what a part inside it completes.

        Raises
        ------
        StageError
        """
        if self.inner:
            raise StageError(f"{self.name} has a part inside the LLM: attach it to a model, or take inner=False")


@dataclass(frozen=True)
class TwoPartCompressor(PartedCompressor):
    """Base of methods that keep some tokens before the LLM, and of these a fixed share from one of its layers on.

    A method writes `_select` for the part before the LLM and `choose`, and `merge` if it merges, for the part inside;
    `default_layer` is where the release drops, and of how many layers.

    Parameters
    ----------
    layer : int or None
        The first layer that sees fewer tokens; None: the release's, scaled to the model's depth.
    inner_kept : float
        Share of the tokens that stay there.

    With both parts R is, in variant ``"ours"``, the mean over layers: the part before the LLM keeps more than R, and
    where that would be more than all, the part inside does. In ``"official"`` R is the part's before the LLM, and what
    the part inside drops comes on top.
    """

    default_layer: ClassVar[tuple[int, int]]
    layer: int | None = None
    inner_kept: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.layer is not None:
            check_layer(self.layer)
        if not 0 < self.inner_kept <= 1:
            raise BudgetError(f"inner_kept is a share in (0, 1], got {self.inner_kept}")

    def first_layer(self, num_layers: int) -> int:
        """Return the first of `num_layers` layers that sees fewer tokens.

        Raises
        ------
        BudgetError
            If there is no such layer.
        """
        at, of = self.default_layer
        layer = self.layer if self.layer is not None else max(1, round(Fraction(at * num_layers, of)))
        return layer_of(layer, num_layers)

    def outer(self, num_layers: int) -> Compressor:
        """Return the part before the LLM, at its own budget."""
        retention = self.retention
        if self.variant == "ours":
            layer = self.first_layer(num_layers)
            mean = (layer + self._share * (num_layers - layer)) / num_layers
            if isinstance(retention, Tokens):
                retention = Tokens(max(1, math.floor(retention.count / mean)))
            else:
                retention = float(min(Fraction(1), Fraction(repr(retention)) / mean))
        return replace(self, inner=False, retention=retention)

    def stages(self, num_layers: int, num_tokens: int) -> tuple[tuple[int, int], ...]:
        """Return the one stage (layer, tokens kept from there on)."""
        layer, kept = self.first_layer(num_layers), self._share
        if self.variant == "official":
            return ((layer, max(1, round(num_tokens * kept))),)
        if not isinstance(self.retention, Tokens):  # all tokens enter: the rest of the budget is spent inside
            spent = (Fraction(repr(self.retention)) * num_layers - layer) / (num_layers - layer)
            kept = max(kept, min(spent, Fraction(1)))
        return ((layer, max(1, math.floor(num_tokens * kept))),)

    @property
    def _share(self) -> Fraction:
        return Fraction(repr(float(self.inner_kept)))
