"""Calibrated rules: the least retention of each video that is harmless enough, and the frames to read for a budget."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import torch
from torch import Generator, Tensor

from vidsieve.compressors.base import Compressor
from vidsieve.errors import BudgetError, RetentionError, StageError
from vidsieve.io.bounded import parsed, read_bytes
from vidsieve.retention import AUTO, CALIBRATED, Calibration, FrameRule, Rule, Tokens, budget_text
from vidsieve.types import Need, Selection, Stage, VideoTokens

LADDER = (0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.6)
"""Retentions that a rule chooses from; above the last one everything is kept."""


@dataclass(frozen=True)
class Calibrated(Compressor):
    """A method before the LLM, at the least retention that its rule allows for each video; built by `calibrated`.

    Parameters
    ----------
    retention : float or Tokens
        The mean over the calibration videos, for tables; the number kept depends on the video.
    method : Compressor
    rule : Rule
    floor, cap : float
        Least and most that is kept. The bound holds with a cap of 1 only.
    """

    method: Compressor = field(kw_only=True)
    rule: Rule = field(kw_only=True)
    floor: float = field(default=0.0, kw_only=True)
    cap: float = field(default=1.0, kw_only=True)

    def __post_init__(self) -> None:
        object.__setattr__(self, "variants", self.method.variants)
        super().__post_init__()
        if not 0 <= self.floor <= self.cap <= 1 or self.cap == 0:
            raise BudgetError(f"floor and cap must be 0 ≤ floor ≤ cap ≤ 1, got {self.floor} and {self.cap}")

    @property
    def name(self) -> str:  # type: ignore[override]
        """The method's name."""
        return self.method.name

    @property
    def paper(self) -> str:  # type: ignore[override]
        """The method's paper."""
        return self.method.paper

    @property
    def needs(self) -> frozenset[Need]:  # type: ignore[override]
        """The method's needs."""
        return self.method.needs

    @property
    def policy(self) -> Any:
        """The method's policy, if it is a trained one."""
        return getattr(self.method, "policy", None)

    @property
    def adaptive_budget(self) -> bool:
        """True: the number kept depends on the video."""
        return True

    @property
    def budget_asked(self) -> Calibration:
        """The calibration."""
        return Calibration()

    @property
    def idle(self) -> bool:
        """False: a rule whose mean is 1 may still drop tokens of some videos."""
        return False

    def with_retention(self, retention: float | Tokens | Calibration) -> Compressor:
        """Return the method at another budget."""
        return self.method.with_retention(retention)

    def compress(self, video: VideoTokens, *, generator: Generator | None = None) -> Selection:
        """Return the selection at the least retention of the ladder whose predicted harm the rule accepts."""
        self._check_needs(video)
        seen, (fewest, most) = (video.whole or video.grid).frames, self.rule.frames
        if not fewest <= seen <= most:
            known = f"{fewest}" if fewest == most else f"{fewest} to {most}"
            warnings.warn(
                f"the rule was calibrated on videos of {known} frames of the token grid, and this one has {seen}: the "
                "bound does not cover it; read as many frames, or run `vidsieve calibrate` for these",
                stacklevel=2,
            )
        return self._select(video, 0, generator or torch.Generator().manual_seed(0))

    def _select(self, video: VideoTokens, budget: int, generator: Generator) -> Selection:
        for retention in self.rule.ladder:
            if self.floor <= retention <= self.cap:
                chosen = self.method.with_retention(retention).compress(video, generator=generator)
                read = features(chosen.scores, chosen.num_kept, video.num_tokens)
                if self.rule.harm(read) <= self.rule.threshold:
                    return chosen
        return self.method.with_retention(self.cap).compress(video, generator=generator)

    def describe(self) -> str:
        """Return name, variant and rule for traces and tables."""
        bound = f"to lose at most {self.rule.tolerance:g} with confidence {self.rule.confidence:g}"
        if self.cap < 1:
            bound += f", but at most {self.cap:g}: without a bound"
        return f"{self.name} (variant {self.variant}, retention calibrated {bound})"


def calibrated(
    method: Compressor, retention: Calibration | Rule, *, floor: float = 0.0, cap: float = 1.0
) -> Calibrated:
    """Return a method with a retention that follows each video.

    Parameters
    ----------
    retention : Calibration or Rule
        A rule, its file, or the one saved with the method's policy.

    Raises
    ------
    RetentionError
        If there is no such rule, or it was calibrated for another method or variant.
    StageError
        If the method does not act before the LLM.
    """
    if method.acts is not Stage.PRE_LLM:
        raise StageError(
            f"{method.name} acts {method.acts.value}: a calibrated retention is for methods before the LLM"
        )
    rule = rule_of(method, retention, Rule)
    return Calibrated(
        rule.retention, method.variant, method=method, rule=rule, floor=floor, cap=cap, ahead=method.front
    )


def frames_for(
    method: Compressor, rule: Calibration | FrameRule | str | Path | None = None, model_digest: str = ""
) -> int:
    """Return the number of frames to read for a method that keeps a number of tokens: ``retention=Tokens(512)``.

    Parameters
    ----------
    rule : Calibration, FrameRule, str or Path, optional
        A rule, or its file; default: the one saved with the method's policy.
    model_digest : str, optional
        Hash of the model that will read them.

    Raises
    ------
    RetentionError
        If the method's budget is no number of tokens, or one that was not measured; if there is no such rule, or it is
        of another method, variant or model.
    """
    budget = method.budget_asked
    if not isinstance(budget, Tokens):
        raise RetentionError(
            f"frames are planned for a number of tokens, and {method.name} keeps {budget_text(budget)}: ask for "
            "Tokens(512), on the command line --tokens 512"
        )
    given = Calibration(str(rule)) if isinstance(rule, str | Path) else rule or Calibration()
    found = rule_of(method, given, FrameRule)
    if model_digest and found.model_digest != model_digest:
        raise RetentionError(
            f"frames were measured with {found.model or 'a model'}, and this is another model, or it has another "
            "precision, layout or positions: run `vidsieve calibrate --tokens` with it, or give --frames a number"
        )
    return found.frames_for(budget.count)


R = TypeVar("R", Rule, FrameRule)


def rule_of(method: Compressor, rule: Calibration | R, kind: type[R]) -> R:
    """Return a rule of a kind: itself, the one in a calibration's file, or the one saved with a method's policy.

    Raises
    ------
    RetentionError
        If there is none, it is damaged, or it was calibrated for another method or variant.
    """
    found = _saved_rule(method, rule, kind) if isinstance(rule, Calibration) else rule
    name = method.title if kind is Rule else method.name  # what acts before a method changes what the bound is of
    if (found.method, found.variant) != (name, method.variant):
        raise RetentionError(
            f"the rule was calibrated for {found.method} (variant {found.variant}), not for {name} (variant "
            f"{method.variant}): run `vidsieve calibrate` for it"
        )
    return found


def _saved_rule(method: Compressor, calibration: Calibration, kind: type[R]) -> R:
    command, word = ("vidsieve calibrate --tokens", AUTO) if kind is FrameRule else ("vidsieve calibrate", CALIBRATED)
    if calibration.file:
        where, path = calibration.file, Path(calibration.file)
        if not path.is_file():
            raise RetentionError(f"there is no calibrated rule in {path}: `{command}` writes one")
        try:
            saved = parsed(read_bytes(path, RetentionError))
        except ValueError as error:
            raise RetentionError(f"{path} {error}: give a file that `{command}` has written") from None
    else:
        config = getattr(getattr(method, "policy", None), "config", None)
        where, saved = f"the policy of {method.name}", None
        if config is not None:
            saved = (config.frames if kind is FrameRule else config.calibration).get(method.variant)
        if saved is None:
            reason = "is not trained" if config is None else "has no rule saved with its policy"
            raise RetentionError(
                f"{method.name} (variant {method.variant}) {reason}: run `{command}`, and where it writes a file, ask "
                f"for {word}:FILE"
            )
    one, other, field_ = (
        ("frames", "retentions", "ladder") if kind is FrameRule else ("retentions", "frames", "accuracy")
    )
    if isinstance(saved, dict) and field_ in saved:
        raise RetentionError(f"{where} is a rule of {other}, and one of {one} is needed, as `{command}` makes it")
    try:
        return msgspec.convert(saved, kind)
    except msgspec.ValidationError as error:
        raise RetentionError(f"{where} holds no calibrated rule: {error!s:.300}") from None


def features(given: Tensor | None, kept: int, num_tokens: int) -> tuple[float, ...]:
    """Return the `FEATURES` of a selection of `kept` tokens from its scores (N,), all known before the LLM runs.

    The logarithms of the retention and of the scores' softmax that is dropped, of the scores as they are and of
    standardised ones; the lowest score among the K highest, as it is and standardised; its distance from the highest.

    Raises
    ------
    BudgetError
        If the method gives no scores.
    """
    if given is None:
        raise BudgetError("the method gives no scores that a rule could read: choose one that scores tokens, as score")
    scores = given.detach().double().cpu().sort(descending=True).values
    z = (scores - scores.mean()) / scores.std(correction=0).clamp(min=1e-9)
    dropped = [float(values.softmax(0)[kept:].sum().clamp(min=1e-6).log()) for values in (scores, z)]
    return (
        math.log(kept / num_tokens),
        *dropped,
        float(scores[kept - 1].clamp(-1e4, 1e4)),
        float(z[kept - 1]),
        float(z[0] - z[kept - 1]),
    )
