"""Early warnings: what a run's figures show when it goes wrong, long before its end.

Every check reads the last `WINDOW` lines of metrics and nothing else; a sign must show in all of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vidsieve.training.losses import entropy

WINDOW = 3
"""Lines of metrics in a row that must show a sign."""
WARM_UP = 0.2
"""Share of a run's steps in which maps may still change as they like."""

Line = Mapping[str, float]


@dataclass(frozen=True)
class Sign:
    """A sign of trouble: the figure it shows in, from where on, and what to do."""

    name: str
    figure: str
    shows: Callable[[float], bool]
    text: str
    own_rate: bool = False
    """Means something only where the policy chooses how many tokens it keeps."""
    after_warm_up: bool = False


SIGNS = (
    Sign(
        "keep-all",
        "kept",
        lambda kept: kept > 0.95,
        "the policy keeps nearly every token ({value:.0%}) and saves nothing: lower --tolerance, or set the rate by "
        "--rate-low and --rate-high",
        own_rate=True,
    ),
    Sign(
        "drop-all",
        "kept",
        lambda kept: kept < 0.01,
        "the policy drops nearly every token (it keeps {value:.2%}): raise --tolerance or --slack, or lower --lr",
        own_rate=True,
    ),
    Sign(
        "flat scores",
        "score_spread",
        lambda spread: spread < 0.01,
        "all tokens get the same score (spread {value:.1e}), so that none is chosen for a reason: lower --score-decay "
        "or raise the learning rate",
    ),
    Sign(
        "saturated scores",
        "entropy",
        lambda bits: bits < 0.05,
        "every token is kept or dropped for certain ({value:.3f} bit of entropy a token), so that nothing new is "
        "tried: lower the learning rate or raise --score-decay, and begin anew",
    ),
    Sign(
        "blind answers",
        "blind",
        lambda share: share > 0.5,
        "{value:.0%} of the prompts are answered rightly without the video, and teach nothing about it: take them out "
        "with `vidsieve data filter`",
    ),
    Sign(
        "dead groups",
        "dead_groups",
        lambda share: share > 0.5,
        "{value:.0%} of the groups have equal rewards, and teach nothing: choose --reward margin or --advantage group, "
        "draw more rollouts, or take out prompts that are too easy or too hard with `vidsieve data filter`",
    ),
    Sign(
        "unstable maps",
        "map_stability",
        lambda correlation: correlation < 0.5,
        "from one checkpoint to the next the order of tokens changes (rank correlation {value:.2f} on held-out "
        "videos): lower the learning rate, or take more prompts a step",
        after_warm_up=True,
    ),
)


def findings(lines: Sequence[Line], steps: int, own_rate: bool) -> dict[str, str]:
    """Return the warnings that a run's last lines of metrics call for, name → text.

    Parameters
    ----------
    lines : sequence of mappings
        Metrics, oldest first, each with ``step``. A figure need not be in every line.
    steps : int
        Steps of the whole run.
    own_rate : bool
        Whether the policy itself chooses how many tokens it keeps.
    """
    found = {}
    for sign in SIGNS:
        if sign.own_rate and not own_rate:
            continue
        past = WARM_UP * steps if sign.after_warm_up else 0
        values = [line[sign.figure] for line in lines if sign.figure in line and line["step"] > past][-WINDOW:]
        if len(values) == WINDOW and all(map(sign.shows, values)):
            found[sign.name] = sign.text.format(value=values[-1])
    return found


def keep_entropy(logits: Tensor) -> float:
    """Return the mean entropy in bits of keep probabilities, given as logits (N,): 1 = a fair coin, 0 = certain."""
    return float(entropy(logits.detach())) / math.log(2)


def ranks(values: Tensor) -> Tensor:
    """Return the ranks (N,) float64 of values (N,), from 1; equal values share their mean rank."""
    _, inverse, counts = torch.unique(values, sorted=True, return_inverse=True, return_counts=True)
    ends = counts.cumsum(0).double()
    means = ends - (counts.double() - 1) / 2
    found: Tensor = means[inverse]
    return found


def rank_correlation(a: Tensor, b: Tensor) -> float:
    """Return Spearman's rank correlation of two (N,); 0 where one of them is constant."""
    x, y = ranks(a), ranks(b)
    x, y = x - x.mean(), y - y.mean()
    scale = float((x.square().sum() * y.square().sum()).sqrt())
    return float((x * y).sum()) / scale if scale > 0 else 0.0
