"""Calibrating a retention: learn then test, so that the mean loss over videos is bounded with a stated confidence.

Angelopoulos et al., "Learn then test" (2021): candidate rules are ordered from the safest on, and each is accepted
while the hypothesis that it loses more than the tolerance is rejected at level δ (fixed-sequence testing), so that the
chance that the accepted rule loses more is at most δ, whatever the distribution of videos. The test is the capital of a
gambler who bets on small losses (Waudby-Smith and Ramdas, 2024, §4): under the hypothesis it exceeds 1/δ with
probability at most δ (Ville), and it adapts to the losses' variance, as a bound for any losses in [−1, 1] would not.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vidsieve.errors import EvaluationError
from vidsieve.retention import FEATURES, Rule

Floats = NDArray[np.float64]

FIT_SHARE = 0.25
"""Share of the videos that fit the model of harm; the others calibrate its threshold."""
THRESHOLDS = (0.0, *np.geomspace(1e-4, 0.5, 60).tolist())
_PRIOR_VARIANCE, _MOST = 0.01, 0.75
"""Variance assumed before the first loss, and the share of the largest possible bet that is ever made."""


def p_value(losses: Sequence[float] | Floats, tolerance: float) -> float:
    """Return a p-value of the hypothesis that the mean of losses in [−1, 1] is above `tolerance`.

    Parameters
    ----------
    losses : sequence of float, (n,)
        Independent draws of one distribution, in an order that does not depend on them.
    """
    x = (np.asarray(losses, dtype=np.float64) + 1) / 2
    mean = (tolerance + 1) / 2
    count = np.arange(1, len(x) + 1)
    # Estimates before each draw: one imagined draw of no loss.
    before = (0.5 + np.concatenate([[0.0], np.cumsum(x)[:-1]])) / count
    spread = (_PRIOR_VARIANCE + np.concatenate([[0.0], np.cumsum((x - before) ** 2)[:-1]])) / count
    edge = mean - before
    bet = np.clip(edge / (spread + edge**2), 0, _MOST / (1 - mean))
    capital = np.cumsum(np.log1p(bet * (mean - x)))
    return float(min(1.0, math.exp(-max(capital.max(initial=0.0), 0.0))))


def videos_needed(tolerance: float, confidence: float) -> int:
    """Return the number of videos from which on rules that never lose anything can be accepted."""
    high = 1
    while p_value(np.zeros(high), tolerance) > 1 - confidence:
        high *= 2
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if p_value(np.zeros(middle), tolerance) <= 1 - confidence else (middle, high)
    return high


def check_enough(videos: int, tolerance: float, confidence: float) -> int:
    """Return how many of `videos` fit the model of harm; the others calibrate.

    Raises
    ------
    EvaluationError
        If a tolerance or confidence is not in (0, 1), or the others are too few for them.
    """
    if not (0 < tolerance < 1 and 0 < confidence < 1):
        raise EvaluationError(f"tolerance and confidence lie between 0 and 1, got {tolerance:g} and {confidence:g}")
    fitting = round(FIT_SHARE * videos)
    needed = videos_needed(tolerance, confidence)
    if videos - fitting < needed:
        raise EvaluationError(
            f"{videos} videos are too few to lose at most {tolerance:g} with confidence {confidence:g}: give "
            f"questions about {math.ceil(needed / (1 - FIT_SHARE))} videos at least, or allow a larger loss"
        )
    return fitting


@dataclass(frozen=True)
class Measured:
    """Answers of Q questions at the L retentions of a ladder.

    Parameters
    ----------
    ladder : tuple of float
    features : ndarray, (Q, L, F)
    losses : ndarray, (Q, L)
        Score with all tokens − score with those kept.
    kept : ndarray, (Q, L)
        Fraction kept.
    videos : ndarray, (Q,), int
        The video of each question.
    """

    ladder: tuple[float, ...]
    features: Floats
    losses: Floats
    kept: Floats
    videos: NDArray[np.int64]

    def of(self, videos: Sequence[int] | NDArray[np.int64]) -> Measured:
        """Return the questions about some videos."""
        mine = np.isin(self.videos, videos)
        return Measured(self.ladder, self.features[mine], self.losses[mine], self.kept[mine], self.videos[mine])

    def by_video(self, values: Floats) -> Floats:
        """Return the mean of values (Q,) over each video's questions, (V,)."""
        _, place = np.unique(self.videos, return_inverse=True)
        mean: Floats = np.bincount(place, values) / np.bincount(place)
        return mean


def calibrate(
    measured: Measured,
    method: str,
    variant: str,
    *,
    tolerance: float,
    confidence: float,
    seed: int = 0,
    frames: tuple[int, int] = (1, 2**20),
    data: str = "",
    model: str = "",
    model_digest: str = "",
    policy_digest: str = "",
) -> Rule:
    """Return the rule that keeps least among those accepted.

    Parameters
    ----------
    seed : int
        Of the split into fitting and calibration videos, and of the latter's order.
    frames, data, model, model_digest, policy_digest
        As in `Rule`, for its record.

    Raises
    ------
    EvaluationError
        If a tolerance or confidence is not in (0, 1), or there are too few videos for them.
    """
    order = np.random.default_rng(seed).permutation(np.unique(measured.videos))
    fitting = check_enough(len(order), tolerance, confidence)
    model_of_harm = fit(measured.of(order[:fitting]))
    # Renumbered in the drawn order, which is the order of the bets.
    held = measured.of(order[fitting:])
    place = {int(video): number for number, video in enumerate(order[fitting:])}
    held = Measured(
        held.ladder, held.features, held.losses, held.kept, np.array([place[int(video)] for video in held.videos])
    )
    harm = predicted(model_of_harm, held.features)

    def outcome(steps: NDArray[np.int64]) -> tuple[Floats, Floats]:
        """Return loss and retention of each video where question q takes step `steps[q]`; the last keeps everything."""
        whole = np.zeros((len(steps), 1))
        rows = np.arange(len(steps))
        losses = np.concatenate([held.losses, whole], 1)[rows, steps]
        return held.by_video(losses), held.by_video(np.concatenate([held.kept, whole + 1], 1)[rows, steps])

    last = len(held.ladder)
    threshold, chosen = -1.0, np.full(len(held.videos), last)
    for candidate in THRESHOLDS:
        steps = steps_at(harm, candidate)
        if p_value(outcome(steps)[0], tolerance) > 1 - confidence:
            break
        threshold, chosen = candidate, steps
    fixed = 1.0
    for step in reversed(range(last)):
        if p_value(outcome(np.full(len(held.videos), step))[0], tolerance) > 1 - confidence:
            break
        fixed = held.ladder[step]
    losses, kept = outcome(chosen)
    return Rule(
        method=method,
        variant=variant,
        ladder=held.ladder,
        means=tuple(model_of_harm[0].tolist()),
        scales=tuple(model_of_harm[1].tolist()),
        weights=tuple(model_of_harm[2][1:].tolist()),
        bias=float(model_of_harm[2][0]),
        threshold=threshold,
        fixed=fixed,
        tolerance=tolerance,
        confidence=confidence,
        videos=len(order) - fitting,
        questions=len(held.videos),
        retention=float(kept.mean()),
        loss=float(losses.mean()),
        frames=frames,
        model_digest=model_digest,
        policy_digest=policy_digest,
        data=data,
        model=model,
    )


def fit(measured: Measured, ridge: float = 1.0) -> tuple[Floats, Floats, Floats]:
    """Return means (F,), scales (F,) and weights (1 + F,) of a logistic model of harm: a loss above 0.

    Newton steps on the penalised likelihood; the bias, the first weight, is not penalised.
    """
    rows = measured.features.reshape(-1, len(FEATURES))
    harm = (measured.losses.reshape(-1) > 0).astype(np.float64)
    means, scales = rows.mean(0), np.maximum(rows.std(0), 1e-9)
    x = np.concatenate([np.ones((len(rows), 1)), (rows - means) / scales], 1)
    penalty = np.diag([1e-3, *[ridge] * len(FEATURES)])
    weights = np.zeros(x.shape[1])
    weights[0] = math.log((harm.sum() + 0.5) / (len(harm) - harm.sum() + 0.5))
    for _ in range(50):
        chance = 1 / (1 + np.exp(-np.clip(x @ weights, -50, 50)))
        slope = x.T @ (harm - chance) - penalty @ weights
        curve = (x * (chance * (1 - chance))[:, None]).T @ x + penalty
        step = np.linalg.solve(curve, slope)
        weights = weights + step / max(1.0, float(np.abs(step).max()))  # no step beyond 1: far from the optimum
        if float(np.abs(step).max()) < 1e-8:
            break
    return means, scales, weights


def predicted(model: tuple[Floats, Floats, Floats], features: Floats) -> Floats:
    """Return the predicted harm (…,) of features (…, F)."""
    means, scales, weights = model
    logit = weights[0] + ((features - means) / scales) @ weights[1:]
    chance: Floats = 1 / (1 + np.exp(-np.clip(logit, -50, 50)))
    return chance


def steps_at(harm: Floats, threshold: float) -> NDArray[np.int64]:
    """Return for each question the first step of harm (Q, L) at most `threshold`; L where there is none."""
    accepted = np.concatenate([harm <= threshold, np.ones((len(harm), 1), dtype=bool)], 1)
    first: NDArray[np.int64] = accepted.argmax(1)
    return first
