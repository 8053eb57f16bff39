"""The engine of experiments on a task of two units: what it keeps, what it measures again, what it refuses."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import ClassVar

import pytest

import vidsieve
from vidsieve.errors import EvaluationError
from vidsieve.evaluation.conditions import Condition
from vidsieve.evaluation.experiment import Measurement, run
from vidsieve.evaluation.table import Table
from vidsieve.io import faults
from vidsieve.io.faults import contained


@dataclass
class Lengths:
    """Measures the length of every unit's name; one method breaks on one unit until it is mended."""

    broken: bool = False
    asked: list = field(default_factory=list)
    name: str = "lengths"
    form: ClassVar = (("length", int),)

    def settings(self):
        return {}

    def units(self):
        return ["a", "bb"]

    def measure(self, unit, conditions):
        self.asked.append(unit)
        refused = {}
        for condition in conditions:
            with contained(refused, condition.key):
                if self.broken and unit == "bb" and condition.method is not None:
                    raise RuntimeError("out of memory")
                yield Measurement(unit, condition.key, {"length": len(unit)})
        yield from (Measurement(condition=key, reason=reason) for key, reason in refused.items())

    def tabulate(self, results):
        rows = [
            condition.described() | {"mean": sum(run["length"] for run in results.turns(condition.key)) / 2}
            for condition in results.measured
        ]
        return Table("lengths", ("method", "mean"), [], result={"rows": rows, "refused": results.refused_rows()})


CONDITIONS = [Condition(), Condition(vidsieve.load("random", retention=0.5))]


def test_a_unit_with_an_unexpected_error_is_measured_again(tmp_path, monkeypatch):
    monkeypatch.setattr(faults, "seen", False)
    first = Lengths(broken=True)
    result = run(first, CONDITIONS, tmp_path).result
    assert [row["method"] for row in result["rows"]] == ["full"] and faults.seen
    assert "out of memory" in result["refused"][0]["reason"]
    again = Lengths()
    result = run(again, CONDITIONS, tmp_path).result
    assert (first.asked, again.asked) == (["a", "bb"], ["bb"])
    assert [(row["method"], row["mean"]) for row in result["rows"]] == [("full", 1.5), ("random", 1.5)]
    assert json.loads((tmp_path / "result.json").read_text())["refused"] == []
    third = Lengths()
    run(third, CONDITIONS, tmp_path)
    assert third.asked == []


def test_conditions_that_a_table_cannot_tell_apart_are_refused():
    fast = [Condition(vidsieve.load("fastv", retention=0.8, layer=layer)) for layer in (1, 2)]
    with pytest.raises(EvaluationError, match="two conditions are both 'fastv/ours"):
        run(Lengths(), fast)
    task = Lengths()
    run(task, [*CONDITIONS, *CONDITIONS])
    assert task.asked == ["a", "bb"], "the same condition twice is one"
