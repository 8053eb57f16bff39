"""Several stages inside the LLM: at which layers of a model, and how much each leaves under one budget."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

from vidsieve.errors import BudgetError


def left_for_later(budget: Fraction, layer: int, num_layers: int, name: str, advice: str) -> Fraction:
    """Return what a budget, summed over layers in shares of a video, leaves from `layer` on, all before it see all.

    Raises
    ------
    BudgetError
        If it leaves nothing: `name` the method, the floor, and the `advice`.
    """
    if budget < layer:
        raise BudgetError(
            f"{name}: {layer} of {num_layers} layers see every token, so the retention cannot go below "
            f"{layer / num_layers:.3f}; {advice}"
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


def scaled_shares(
    shares: Sequence[Fraction], layers: Sequence[int], num_layers: int, budget: Fraction, name: str
) -> list[Fraction]:
    """Return shares times one factor, at most 1 each, for which all layers see `budget` on average.

    Parameters
    ----------
    shares : sequence of Fraction, falling
        What is left of a video from each of `layers` on.
    name : str
        The method, for the message.

    Raises
    ------
    BudgetError
        If the layers before the first stage alone see more.
    """
    advice = "choose earlier layers, or earliest=True"
    left = left_for_later(budget * num_layers, layers[0], num_layers, name, advice)
    edges = [*layers[1:], num_layers]
    spans = [stop - start for start, stop in zip(layers, edges, strict=True)]
    factor = Fraction(0)
    for number, (share, span) in enumerate(zip(shares, spans, strict=True)):
        rest = sum((s * n for s, n in zip(shares[number:], spans[number:], strict=True)), Fraction(0))
        factor = left / rest
        if factor * share <= 1:
            break
        left -= span  # the largest share is full: the others take the rest
        factor = 1 / shares[-1]
    return [min(Fraction(1), factor * share) for share in shares]
