"""Several stages inside the LLM: at which layers of a model, and how much each leaves under one budget."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from itertools import pairwise

from vidsieve.errors import BudgetError
from vidsieve.selection import least_retention


def left_for_later(
    budget: Fraction, layer: int, num_layers: int, num_tokens: int, name: str, earliest: bool | None = None
) -> Fraction:
    """Return what a budget, summed over layers in shares of a video, leaves from `layer` on, all before it see all.

    Parameters
    ----------
    name : str
        The method, for the message.
    earliest : bool, optional
        Whether the method has moved to earlier layers; None: it does not offer to.

    Raises
    ------
    BudgetError
        If less than a token is left for each later layer; it names the floor.
    """
    floor = layer * num_tokens + num_layers - layer
    if budget * num_tokens < floor:
        advice = "no layer is earlier"
        if layer > 1:
            advice = "choose an earlier layer" + (", or earliest=True (--earliest)" if earliest is False else "")
        raise BudgetError(
            f"{name}: {layer} of {num_layers} layers see every token, so the retention cannot go below "
            f"{least_retention(floor, num_layers * num_tokens):g}; {advice}"
        )
    return budget - layer


def scaled_layers(layers: Sequence[int], scale: Fraction, num_layers: int) -> list[int]:
    """Return layers times `scale`, rounded, each at least 1 and one more than the one before.

    Raises
    ------
    BudgetError
        If the model has too few.
    """
    found: list[int] = []
    for layer in layers:
        found.append(max(round(layer * scale), 1, found[-1] + 1 if found else 1))
    if found[-1] >= num_layers:
        raise BudgetError(
            f"layers {', '.join(map(str, found))} are not all among the model's {num_layers}: choose 1 to "
            f"{num_layers - 1}"
        )
    return found


def scaled_counts(
    shares: Sequence[Fraction],
    layers: Sequence[int],
    num_layers: int,
    num_tokens: int,
    budget: Fraction,
    name: str,
    earliest: bool,
) -> list[int]:
    """Return how many of a video's tokens are left from each of `layers` on, for all layers to see `budget` on average.

    They are `shares` of the video, all times one factor, but at least one token and at most all.

    Parameters
    ----------
    shares : sequence of Fraction, falling
        What is left of a video from each of `layers` on.
    name, earliest
        As `left_for_later` has them.

    Raises
    ------
    BudgetError
        If the layers before the first stage alone see more.
    """
    left = left_for_later(budget * num_layers, layers[0], num_layers, num_tokens, name, earliest)
    spans = [stop - start for start, stop in pairwise([*layers, num_layers])]
    least = Fraction(1, num_tokens)

    def kept(factor: Fraction) -> list[Fraction]:
        return [min(Fraction(1), max(least, factor * share)) for share in shares]

    def spent(factor: Fraction) -> Fraction:
        return sum((share * span for share, span in zip(kept(factor), spans, strict=True)), Fraction(0))

    # Between the factors at which a share meets a bound, what is spent grows linearly.
    bends = sorted({bound / share for share in shares for bound in (least, Fraction(1))})
    factor = bends[-1]
    for low, high in pairwise(bends):
        if spent(low) <= left < spent(high):
            factor = low + (high - low) * (left - spent(low)) / (spent(high) - spent(low))
    return [math.floor(share * num_tokens) for share in kept(factor)]
