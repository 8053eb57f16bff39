"""Budgets of methods inside the LLM: one mean over layers, shared between parts and stages."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import pairwise
from typing import ClassVar, Protocol

from vidsieve.compressors.base import Compressor, within
from vidsieve.compressors.inside import LayerCompressor, usable_layer
from vidsieve.errors import BudgetError, StageError
from vidsieve.selection import exact_ratio, kept_tokens, least_retention
from vidsieve.types import Stage, Tokens

# -- a part before the LLM and one inside it --------------------------------------------------------------------


@dataclass(frozen=True)
class PartedCompressor(LayerCompressor):
    """Base of methods whose part inside the LLM can be left out.

    Parameters
    ----------
    inner : bool
        Run the part inside the LLM. Without it the method acts before the LLM only.
    """

    inner: bool = True

    @property
    def acts(self) -> Stage:
        """Inside the LLM; before it where `inner` is off."""
        return Stage.LAYER if self.inner else Stage.PRE_LLM

    def check_outer(self) -> None:
        """Raise StageError if the part inside the LLM is on: selecting before the LLM is then only half the method."""
        if self.inner:
            raise StageError(f"{self.name} has a part inside the LLM: attach it to a model, or take inner=False")


@dataclass(frozen=True)
class TwoPartCompressor(PartedCompressor):
    """Base of methods that keep some tokens before the LLM, and a fixed share of them from one of its layers on.

    A method writes `_select` for the part before the LLM and `step` for the part inside; `default_layer` is the layer
    where the release drops, and its number of layers.

    Parameters
    ----------
    layer : int or None
        The first layer that sees fewer tokens; None: the release's, scaled to the model's depth, or the next
        that an LLM with other layers than full attention lets it use.
    inner_kept : float
        Share of the tokens that stay there.

    With both parts R is, in variant ``"ours"``, the mean over layers: the part before the LLM keeps more than R; if
    it would exceed 100 %, it keeps everything, and the part inside uses the rest. In
    ``"official"`` R belongs to the part before the LLM, and the part inside drops more on top.
    """

    default_layer: ClassVar[tuple[int, int]]
    layer: int | None = within(None, "[1, inf)")
    inner_kept: float = within(0.5, "(0, 1]")

    def first_layer(self, num_layers: int) -> int:
        """Return the first of `num_layers` layers that sees fewer tokens.

        Raises
        ------
        BudgetError
            If there is no such layer.
        """
        at, of = self.default_layer
        return self.placed(self.layer, max(1, round(Fraction(at * num_layers, of))), num_layers)

    def outer(self, num_layers: int) -> Compressor:
        """Return the part before the LLM, at its own budget."""
        retention = self.retention
        if self.variant == "ours":
            layer = self.first_layer(num_layers)
            mean = (layer + self._share * (num_layers - layer)) / num_layers
            if isinstance(retention, Tokens):
                retention = Tokens(max(1, math.floor(retention.count / mean)), capped=True)
            else:
                retention = float(min(Fraction(1), Fraction(repr(retention)) / mean))
        return replace(self, inner=False, retention=retention)

    def stages(self, num_layers: int, num_tokens: int) -> tuple[tuple[int, int], ...]:
        """Return the one stage (layer, tokens kept from there on)."""
        layer, kept = self.first_layer(num_layers), self._share
        if self.variant == "official":
            return ((layer, max(1, round(num_tokens * kept))),)
        kept_tokens(self.retention, num_tokens)  # an error if a count is more
        # What is left of the budget if all tokens enter is spent inside.
        spent = (exact_ratio(self.retention, num_tokens) * num_layers - layer) / (num_layers - layer)
        kept = max(kept, min(spent, Fraction(1)))
        return ((layer, max(1, math.floor(num_tokens * kept))),)

    @property
    def _share(self) -> Fraction:
        return Fraction(repr(float(self.inner_kept)))


# -- stages -----------------------------------------------------------------------------------------------------


class Moving(Protocol):
    """A method inside the LLM that offers to drop earlier."""

    @property
    def earliest(self) -> bool:
        """True if it has moved to earlier layers where its budget asks for it."""

    @property
    def cuts(self) -> tuple[int, ...] | None:
        """See `InnerCompressor`."""

    def describe(self) -> str:
        """Return the method, for messages."""


def check_layers(layers: Sequence[int] | None, example: tuple[int, ...], least: int = 1) -> None:
    """Raise BudgetError unless `layers` is None or holds rising whole numbers from `least`, such as `example`."""
    if layers is None:
        return
    whole = all(isinstance(layer, int) and not isinstance(layer, bool) and layer >= least for layer in layers)
    if not layers or not whole or list(layers) != sorted(set(layers)):
        raise BudgetError(f"layers must be rising whole numbers from {least}, as {example}, got {layers}")


def left_for_later(
    budget: Fraction,
    layer: int,
    num_layers: int,
    num_tokens: int,
    name: str,
    earliest: bool | None = None,
    cuts: Sequence[int] | None = None,
) -> Fraction:
    """Return the rest of a budget for the layers from `layer` on, if all layers before it see every token.

    Parameters
    ----------
    budget : Fraction
        Sum over layers of the fraction of the video's tokens that each sees.
    name : str
        The method, for the message.
    earliest : bool, optional
        True if the method has moved to earlier layers; None if it does not offer to.
    cuts : sequence of int, optional
        The layers from which on there may be fewer tokens; None: all but the first.

    Raises
    ------
    BudgetError
        If less than a token is left for each later layer; it names the floor.
    """
    floor = layer * num_tokens + num_layers - layer
    if budget * num_tokens < floor:
        advice = "no layer is earlier"
        if layer > (cuts or [1])[0]:
            advice = "choose an earlier layer" + (", or earliest=True (--earliest)" if earliest is False else "")
        raise BudgetError(
            f"{name}: {layer} of {num_layers} layers see every token, so the retention cannot go below "
            f"{least_retention(floor, num_layers * num_tokens):g}; {advice}"
        )
    return budget - layer


def scaled_layers(layers: Sequence[int], scale: Fraction, num_layers: int, method: Moving | None = None) -> list[int]:
    """Return layers times `scale`, rounded, rising by at least 1 from at least 1, or the next that `method` can use.

    Raises
    ------
    BudgetError
        If the model has too few layers.
    """
    scaled: list[int] = []
    for layer in layers:
        above = scaled[-1] if scaled else 0
        wanted = max(round(layer * scale), above + 1)
        if method is not None and method.cuts is not None:
            wanted = usable_layer(wanted, method.cuts, above, early=method.earliest)
        scaled.append(wanted)
    if scaled[-1] >= num_layers:
        raise BudgetError(
            f"layers {', '.join(map(str, scaled))} are not all among the model's {num_layers}: choose 1 to "
            f"{num_layers - 1}"
        )
    return scaled


def scaled_counts(
    shares: Sequence[Fraction],
    layers: Sequence[int],
    num_layers: int,
    num_tokens: int,
    budget: Fraction,
    method: Moving,
) -> list[int]:
    """Return the number of tokens left from each of `layers` on, for all layers to see `budget` on average.

    The counts are `shares` of the video times one common factor, but at least one token and at most all.

    Parameters
    ----------
    shares : sequence of Fraction, falling
        Wanted share of the video from each of `layers` on.
    method : Moving
        For the message.

    Raises
    ------
    BudgetError
        If the layers before the first stage alone see more.
    """
    told = method.describe(), method.earliest, method.cuts
    left = left_for_later(budget * num_layers, layers[0], num_layers, num_tokens, *told)
    spans = [stop - start for start, stop in pairwise([*layers, num_layers])]
    least = Fraction(1, num_tokens)

    def kept(factor: Fraction) -> list[Fraction]:
        return [min(Fraction(1), max(least, factor * share)) for share in shares]

    def spent(factor: Fraction) -> Fraction:
        return sum((share * span for share, span in zip(kept(factor), spans, strict=True)), Fraction(0))

    # Between the factors at which a share meets a bound, the sum grows linearly.
    bends = sorted({bound / share for share in shares for bound in (least, Fraction(1))})
    factor = bends[-1]
    for low, high in pairwise(bends):
        if spent(low) <= left < spent(high):
            factor = low + (high - low) * (left - spent(low)) / (spent(high) - spent(low))
    return [math.floor(share * num_tokens) for share in kept(factor)]
