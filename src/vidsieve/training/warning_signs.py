"""Early warnings, read from the last `WINDOW` lines of a run's metrics; a sign must be in all of them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from vidsieve.io.texts import percent

WINDOW = 3
"""Lines of metrics in a row that must show a sign."""
UNSETTLED = 0.2
"""Fraction of a run's steps in which maps may change without a warning."""


@dataclass(frozen=True)
class Sign:
    """A figure below or above a limit, and advice that may quote it as `value` or as `share`, in per cent."""

    name: str
    figure: str
    advice: str
    below: float = -math.inf
    above: float = math.inf


SIGNS = (
    Sign(
        "keep-all",
        "kept",
        "the policy keeps nearly every token ({share}) and saves nothing: lower tolerance, or set the rate by "
        "rate_low and rate_high",
        above=0.95,
    ),
    Sign(
        "drop-all",
        "kept",
        "the policy drops nearly every token (it keeps {share}): raise tolerance, or lower lr",
        below=0.01,
    ),
    Sign(
        "flat scores",
        "score_spread",
        "all tokens get the same score (spread {value:.1e}): lower score_decay or raise the learning rate",
        below=0.01,
    ),
    Sign(
        "saturated scores",
        "entropy",
        "every token is certainly kept or dropped ({value:.3f} bit of entropy a token), so nothing new is tried: lower "
        "the learning rate or raise score_decay, and start a new run",
        below=0.05,
    ),
    Sign(
        "saturated probabilities",
        "saturated",
        "{share} of the keep probabilities are within 1 % of 0 or 1, so little new is tried: lower lr, and start a "
        "new run",
        above=0.25,
    ),
    Sign(
        "blind answers",
        "blind",
        "{share} of the prompts are answered rightly without the video, and teach nothing about it: remove them "
        "with `vidsieve data filter`",
        above=0.5,
    ),
    Sign(
        "dead groups",
        "dead_groups",
        "{share} of the groups have equal rewards, and teach nothing: choose reward margin or advantage group, "
        "draw more rollouts, or remove prompts that are too easy or too hard with `vidsieve data filter`",
        above=0.5,
    ),
    Sign(
        "unstable maps",
        "map_stability",
        "the order of tokens changes from one checkpoint to the next (rank correlation {value:.2f} on held-out videos):"
        " lower the learning rate, or take more prompts a step",
        below=0.5,
    ),
)


def warnings(lines: Sequence[Mapping[str, float]], steps: int, own_rate: bool) -> dict[str, str]:
    """Return the warnings that the last lines of metrics call for, name → text.

    Parameters
    ----------
    lines : sequence of mappings
        Metrics, oldest first, each with ``step``. A figure need not be in every line.
    steps : int
        Steps of the whole run.
    own_rate : bool
        True if the policy itself chooses how many tokens it keeps; else their number is no sign.
    """
    texts = {}
    for sign in SIGNS:
        start = UNSETTLED * steps if sign.figure == "map_stability" else 0
        figures = [line.get(sign.figure) for line in lines if line["step"] > start]
        values = [value for value in figures if value is not None][-WINDOW:]
        shown = len(values) == WINDOW and all(value < sign.below or value > sign.above for value in values)
        if shown and (own_rate or sign.figure != "kept"):
            texts[sign.name] = sign.advice.format(value=values[-1], share=percent(values[-1]))
    return texts
