"""Retention: a fraction of the video tokens, or their number, and the rules that calibration makes of them."""

from __future__ import annotations

import math
import re
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import msgspec

from vidsieve.errors import RetentionError, SelectionError


@dataclass(frozen=True)
class Tokens:
    """A budget as a token count instead of a fraction: ``retention=Tokens(512)``.

    `capped`: of a video with fewer tokens, all of them; else that is an error.
    """

    count: int
    capped: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.count, int) or isinstance(self.count, bool) or self.count < 1:
            raise SelectionError(f"Tokens(...) needs a whole number ≥ 1, got {self.count!r}")

    def __repr__(self) -> str:
        return f"Tokens({self.count})"


Share = Annotated[float, msgspec.Meta(gt=0, lt=1)]
Finite = Annotated[float, msgspec.Meta(ge=-1e9, le=1e9)]

CALIBRATED, AUTO = "calibrated", "auto"
FEATURES = ("log retention", "log dropped softmax", "log dropped standardised", "last kept", "last kept z", "range z")
"""What a rule reads of a selection, see `compressors.calibrated.features`."""


Count = Annotated[int, msgspec.Meta(ge=1)]


class Rule(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A rule from a video's scores to its retention, and the record of its calibration.

    Parameters
    ----------
    method, variant : str
        The method whose scores it reads, with what acts before it: ``reuse+score``.
    ladder : tuple of float
        Retentions in ascending order.
    means, scales, weights : tuple of float, bias : float
        A logistic model of the probability that a selection harms the answer, on standardised `FEATURES`.
    threshold : float
        The least retention whose predicted harm is at most this is used; below 0: everything is kept.
    fixed : float
        The least fixed retention that met the same bound, on the same videos.
    tolerance, confidence : float
        With probability `confidence` over the calibration videos, the mean loss over videos is at most `tolerance`;
        loss = score with all tokens − score with those kept.
    videos, questions : int
        Calibration videos (those that fitted the model are not among them) and their questions.
    retention, loss : float
        Means over the calibration videos.
    frames : tuple of int
        Fewest and most frames of the videos' token grids; a video of others is warned of.
    model_digest, policy_digest : str
        Hashes of the model and of the method's policy, empty without one; others are refused.
    data, model : str
        Names of the questions and of the model, for information only.
    """

    method: str
    variant: str
    ladder: tuple[Share, ...]
    means: tuple[Finite, ...]
    scales: tuple[Annotated[float, msgspec.Meta(gt=0)], ...]
    weights: tuple[Finite, ...]
    bias: Finite
    threshold: Finite
    fixed: Annotated[float, msgspec.Meta(gt=0, le=1)]
    tolerance: Share
    confidence: Share
    videos: Annotated[int, msgspec.Meta(ge=1)]
    questions: Annotated[int, msgspec.Meta(ge=1)]
    retention: Annotated[float, msgspec.Meta(gt=0, le=1)]
    loss: Finite
    frames: tuple[Count, Count]
    model_digest: str
    policy_digest: str
    data: str = ""
    model: str = ""

    def __post_init__(self) -> None:
        if not self.ladder or list(self.ladder) != sorted(set(self.ladder)):
            raise ValueError("a ladder of retentions ascends")
        if not len(self.means) == len(self.scales) == len(self.weights) == len(FEATURES):
            raise ValueError(f"a rule has {len(FEATURES)} means, scales and weights")

    def harm(self, values: Sequence[float]) -> float:
        """Return the predicted probability of harm from the `FEATURES` of a selection."""
        standard = ((v - mean) / scale for v, mean, scale in zip(values, self.means, self.scales, strict=True))
        logit = self.bias + sum(w * v for w, v in zip(self.weights, standard, strict=True))
        return 1 / (1 + math.exp(-max(-50.0, min(50.0, logit))))


class FrameRule(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A rule from the number of tokens kept to the number of frames read, and the accuracies that it was made from.

    Parameters
    ----------
    method, variant : str
        The method that chooses the tokens.
    frames, tokens : tuple of int
        Numbers of frames read and of tokens kept that were measured, ascending.
    accuracy : tuple of tuple of float or None
        A row for each number of frames; None where they have fewer tokens than are to be kept.
    tolerance : float
        The fewest frames whose accuracy is at most this much below the best are read.
    videos, questions : int
        Those that accuracies were measured on.
    model_digest : str
        Hash of the model, its positions included.
    data, model : str
        Names of the questions and of the model, for information only.

    Raises
    ------
    ValueError
        If numbers do not ascend, or a number of tokens has no accuracy.
    """

    method: str
    variant: str
    frames: tuple[Count, ...]
    tokens: tuple[Count, ...]
    accuracy: tuple[tuple[Annotated[float, msgspec.Meta(ge=0, le=1)] | None, ...], ...]
    tolerance: Annotated[float, msgspec.Meta(ge=0, lt=1)]
    videos: Count
    questions: Count
    model_digest: str
    data: str = ""
    model: str = ""

    def __post_init__(self) -> None:
        for name, counts in (("frames", self.frames), ("tokens", self.tokens)):
            if not counts or list(counts) != sorted(set(counts)):
                raise ValueError(f"numbers of {name} ascend")
        if len(self.accuracy) != len(self.frames) or any(len(row) != len(self.tokens) for row in self.accuracy):
            raise ValueError(f"accuracy has {len(self.frames)} rows of {len(self.tokens)} numbers")
        for count, column in zip(self.tokens, zip(*self.accuracy, strict=True), strict=True):
            if all(value is None for value in column):
                raise ValueError(f"no number of frames has {count} tokens")

    def accuracies(self, count: int) -> dict[int, float]:
        """Return the accuracy by frames read when `count` tokens are kept.

        Between two measured numbers of tokens it is a straight line over their logarithm.

        Raises
        ------
        RetentionError
            If `count` lies outside what was measured.
        """
        least, most = self.tokens[0], self.tokens[-1]
        if not least <= count <= most:
            raise RetentionError(
                f"frames were measured for {least} to {most} tokens, not for {count}: ask for a number between them, "
                "or run `vidsieve calibrate` with it among --tokens"
            )
        above = bisect_left(self.tokens, count)
        below = above if self.tokens[above] == count else above - 1
        low, high = self.tokens[below], self.tokens[above]
        part = math.log(count / low) / math.log(high / low) if high > low else 0.0
        found = {}
        for frames, row in zip(self.frames, self.accuracy, strict=True):
            first, last = row[below], row[above]
            if first is not None and last is not None:
                found[frames] = first + part * (last - first)
        return found

    def frames_for(self, count: int) -> int:
        """Return the fewest frames whose accuracy with `count` tokens is at most `tolerance` below the best.

        Raises
        ------
        RetentionError
            As `accuracies`.
        """
        found = self.accuracies(count)
        enough = max(found.values()) - self.tolerance - 1e-9
        return min(frames for frames, value in found.items() if value >= enough)


@dataclass(frozen=True)
class Calibration:
    """What a calibrated rule decides: ``retention="calibrated"`` or ``"calibrated:FILE"``, frames ``auto``.

    Parameters
    ----------
    file : str
        File of the rule; empty: the one that `vidsieve calibrate` saved with the method's policy.
    """

    file: str = ""


def check_retention(retention: object) -> float | Tokens:
    """Return `retention` if it is `Tokens` or a number in (0, 1].

    Raises
    ------
    RetentionError
        For anything else, NaN, booleans and text included.
    """
    if isinstance(retention, Tokens):
        return retention
    if isinstance(retention, bool) or not isinstance(retention, int | float) or not 0 < retention <= 1:
        raise RetentionError(
            f"retention is the fraction of video tokens kept, a number in (0, 1], or Tokens(count); got {retention!r}"
        )
    return float(retention)


def parse_budget(text: str) -> float | Tokens | Calibration:
    """Return the budget in a text such as ``0.25``, ``512t``, ``calibrated`` or ``calibrated:rule.json``.

    Raises
    ------
    RetentionError
    """
    name, _, file = text.strip().partition(":")
    return Calibration(file) if name == CALIBRATED else parse_retention(text)


def budget_text(budget: float | Tokens | Calibration) -> str:
    """Return a budget as commands read it."""
    if isinstance(budget, Calibration):
        return f"{CALIBRATED}:{budget.file}" if budget.file else CALIBRATED
    return f"{budget.count}t" if isinstance(budget, Tokens) else f"{budget:g}"


def parse_frames(text: str) -> int | Calibration:
    """Return the number of frames in a text, or what ``auto`` and ``auto:FILE`` stand for.

    Raises
    ------
    RetentionError
    """
    name, _, file = text.strip().partition(":")
    if name == AUTO:
        return Calibration(file)
    if not text.strip().isdigit() or int(text) < 1:
        raise RetentionError(f"a number of frames is a whole number from 1 on, auto or auto:FILE; got {text!r}")
    return int(text)


def parse_retention(text: str) -> float | Tokens:
    """Return the retention in a text such as ``0.25`` or ``512t`` (a token count).

    Raises
    ------
    RetentionError
    """
    word = text.strip()
    if word.endswith("t") and word[:-1].isdigit() and int(word[:-1]) > 0:
        return Tokens(int(word[:-1]))
    try:
        return check_retention(float(word))
    except ValueError:  # RetentionError is one, too
        percent = re.fullmatch(r"(\d{1,2}(?:\.\d+)?)\s*%?", word)
        count = f" or {word}t" if word.isdigit() else ""
        meant = f"; did you mean {float(percent[1]) / 100:g}{count}?" if percent and float(percent[1]) > 0 else ""
        raise RetentionError(
            "retention is a number in (0, 1], a token count such as 512t, calibrated or calibrated:FILE; "
            f"got {text!r}{meant}"
        ) from None


def parse_retentions(text: str) -> list[float]:
    """Return the retention ratios in a list such as ``0.25,0.1``.

    Raises
    ------
    RetentionError
    """
    values = [parse_retention(word) for word in text.split(",") if word.strip()]
    ratios = [v for v in values if isinstance(v, float)]
    if not ratios or len(ratios) != len(values):
        raise RetentionError(f"give one or more retention ratios, as 0.25,0.1; got {text!r}")
    return ratios
