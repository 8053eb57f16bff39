"""Calibration on a set of questions: a method at every step of a ladder, or with several frames and tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import msgspec
import numpy as np

from vidsieve.adapters.encoded import Encoded
from vidsieve.adapters.fingerprint import model_digest, policy_digest
from vidsieve.answering import Answer
from vidsieve.compressors.base import Compressor
from vidsieve.compressors.calibrated import LADDER, features
from vidsieve.errors import BudgetError, StageError
from vidsieve.evaluation.calibration import Measured, calibrate
from vidsieve.evaluation.conditions import Condition
from vidsieve.evaluation.experiment import Measurement, Results
from vidsieve.evaluation.items import Item
from vidsieve.evaluation.table import Table
from vidsieve.evaluation.tasks.questions import QuestionsTask
from vidsieve.retention import FrameRule, Rule, Tokens
from vidsieve.types import Stage


@dataclass(frozen=True)
class CalibrationTask(QuestionsTask):
    """Questions that calibrate a method's retention.

    Parameters
    ----------
    tolerance, confidence : float
        As in `calibrate`.
    """

    tolerance: float = 0.01
    confidence: float = 0.9
    form: ClassVar[Any] = (*QuestionsTask.form, ("features", list[float], []), ("frames", int, 0))

    def settings(self) -> dict[str, Any]:
        """Return the settings that records depend on; the bound is not among them."""
        return {**super().settings(), "ladder": list(LADDER)}

    def measure(self, unit: str, conditions: Sequence[Condition]) -> list[Measurement]:
        """Return the answers to the questions about one video.

        Raises
        ------
        BudgetError
            If a condition is refused: without one of its steps the ladder calibrates nothing.
        """
        records = super().measure(unit, conditions)
        for record in records:
            if record.condition and record.reason:
                raise BudgetError(record.reason)
        return records

    def _values(self, encoded: Encoded, item: Item, answer: Answer, score: float) -> dict[str, Any]:
        """Return the values of a record, and what a rule reads of a selection, and the frames of the video's grid."""
        values = super()._values(encoded, item, answer, score)
        if len(encoded.videos) != 1:
            raise BudgetError(f"question {item.id!r} is about {len(encoded.videos)} videos: a rule is for one")
        video = encoded.videos[0].features
        values["frames"] = video.prompted.frames
        if answer.traces:
            values["features"] = list(features(answer.scores[0], answer.traces[0].kept, video.grid.num_tokens))
        return values

    def measured(self, results: Results) -> Measured:
        """Return the answers of the questions that could be asked at every step, as `calibrate` reads them."""
        whole, *steps = results.conditions
        answered = results.samples[whole.key]
        asked = set.intersection(*(set(samples) for samples in results.samples.values()))
        items = [item for item in self.items if item.id in asked]
        names: dict[str, int] = {}
        videos = [names.setdefault(str(item.video), len(names)) for item in items]
        rows = [[results.samples[step.key][item.id] for step in steps] for item in items]
        full = np.array([[answered[item.id]["score"]] for item in items], dtype=np.float64)
        return Measured(
            LADDER,
            np.array([[sample["features"] for sample in row] for row in rows]),
            full - np.array([[sample["score"] for sample in row] for row in rows]),
            np.array([[sample["kept"] / sample["total"] for sample in row] for row in rows]),
            np.array(videos),
        )

    def tabulate(self, results: Results) -> Table:
        """Return the table of accuracies at each step, and in its result the ``rule``."""
        table = super().tabulate(results)
        method = results.conditions[1].method
        assert method is not None  # by `ladder_conditions`
        frames = [sample["frames"] for sample in results.samples[results.conditions[0].key].values()]
        rule = calibrate(
            self.measured(results),
            method.title,
            method.variant,
            tolerance=self.tolerance,
            confidence=self.confidence,
            seed=self.seed,
            frames=(min(frames), max(frames)),
            data=self.benchmark.title,
            model=self.model,
            model_digest=model_digest(self.adapter.model),
            policy_digest=policy_digest(method),
        )
        return replace(table, result={**table.result, "rule": msgspec.to_builtins(rule)})

    @staticmethod
    def rule(table: Table) -> Rule:
        """Return the rule in a table of this task."""
        return msgspec.convert(table.result["rule"], Rule)


def ladder_conditions(method: Compressor, frames: int, label: str = "") -> Sequence[Condition]:
    """Return all tokens, and a method at every step of the ladder.

    Raises
    ------
    StageError
        If the method does not act before the LLM.
    """
    if method.acts is not Stage.PRE_LLM:
        raise StageError(f"{method.name} acts {method.acts.value}: calibrate a method that acts before the LLM")
    return [Condition(None, frames), *(Condition(method.with_retention(step), frames, label) for step in LADDER)]


@dataclass(frozen=True)
class FramesTask(QuestionsTask):
    """Questions that tell how many frames to read for a number of tokens.

    Parameters
    ----------
    tolerance : float
        As in `FrameRule`; nothing is bounded.
    """

    tolerance: float = 0.01

    def tabulate(self, results: Results) -> Table:
        """Return the table of accuracies, and in its result the ``rule``.

        Raises
        ------
        BudgetError
            If the method refuses a number of tokens with every number of frames.
        """
        table = super().tabulate(results)
        found = {(row["frames"], row["retention"]): row["accuracy"] for row in table.result["rows"]}
        frames = sorted({condition.frames for condition in results.conditions})
        methods = [condition.method for condition in results.conditions if condition.method is not None]
        budgets = {method.retention.count for method in methods if isinstance(method.retention, Tokens)}
        for count in budgets:
            if not any((number, f"{count}t") in found for number in frames):
                raise BudgetError(next(iter(results.refused.values()))[0])
        rule = FrameRule(
            method=methods[0].name,
            variant=methods[0].variant,
            frames=tuple(frames),
            tokens=tuple(sorted(budgets)),
            accuracy=tuple(tuple(found.get((number, f"{count}t")) for count in sorted(budgets)) for number in frames),
            tolerance=self.tolerance,
            videos=len(self.units()),
            questions=len(self.items),
            model_digest=model_digest(self.adapter.model),
            data=self.benchmark.title,
            model=self.model,
        )
        return replace(table, result={**table.result, "rule": msgspec.to_builtins(rule)})

    @staticmethod
    def rule(table: Table) -> FrameRule:
        """Return the rule in a table of this task."""
        return msgspec.convert(table.result["rule"], FrameRule)


def frame_conditions(
    method: Compressor, frames: Sequence[int], tokens: Sequence[int], label: str = ""
) -> Sequence[Condition]:
    """Return a method with every number of frames and of tokens."""
    return [Condition(method.with_retention(Tokens(kept)), count, label) for count in frames for kept in tokens]
