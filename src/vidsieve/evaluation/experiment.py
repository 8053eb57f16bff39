"""One engine for all experiments: measure every condition on every unit, in a folder that can be resumed.

The folder of a run has ``run.json`` (what its numbers depend on), ``units-….jsonl`` (the journal of each shard, a unit
a line) and, once every unit is measured, ``samples.jsonl`` (a record a line), ``result.json`` (the table) and
``timing.json``. The same command resumes a run and gives the same files; only ``timing.json`` differs.
"""

from __future__ import annotations

import functools
import json
import platform
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import msgspec
import numpy as np
import torch
import transformers

from vidsieve._version import __version__
from vidsieve.errors import EvaluationError
from vidsieve.evaluation.conditions import Condition
from vidsieve.evaluation.stats import clustered_mean, mcnemar, paired_difference
from vidsieve.evaluation.table import Table, finite
from vidsieve.io import faults
from vidsieve.io.files import writing
from vidsieve.io.journal import Store, measure_all
from vidsieve.io.machine import spread

SAMPLES, RESULT, TIMING = "samples.jsonl", "result.json", "timing.json"
REFERENCES = ("full", "random")
"""Methods that every other one is compared with, item by item."""


@dataclass(frozen=True)
class Measurement:
    """One measurement, or the reason why there is none.

    Parameters
    ----------
    item : str
        What was measured within the unit, such as a question; empty: the whole unit.
    condition : str
        Key of the condition; empty: all of them.
    values : dict
        The measurement, as values for JSON.
    ms : float or None
        Milliseconds spent selecting. They stay out of ``samples.jsonl``, because they differ from run to run.
    reason : str
        Why there is no measurement: the condition is refused, the item cannot be asked, or the unit cannot be read.
    """

    item: str = ""
    condition: str = ""
    values: Mapping[str, Any] = field(default_factory=dict)
    ms: float | None = None
    reason: str = ""


class _Unit(msgspec.Struct):
    """A line of the journal."""

    samples: list[dict[str, Any]]
    refused: dict[str, str]
    faults: dict[str, str] = {}
    select_ms: dict[str, list[float]] = {}
    failed: str = ""


class Task(Protocol):
    """Something to measure, unit by unit. A unit, such as a video, is one cluster of the statistics."""

    @property
    def name(self) -> str:
        """Name of the task in files."""

    @property
    def form(self) -> Sequence[tuple[Any, ...]]:
        """Values of a sample that the table reads: name, type and perhaps default, for `msgspec.defstruct`."""

    def settings(self) -> Mapping[str, Any]:
        """Return the settings that records depend on besides conditions and versions, as values for JSON."""

    def units(self) -> Sequence[str]:
        """Return the names of all units."""

    def measure(self, unit: str, conditions: Sequence[Condition]) -> Iterable[Measurement]:
        """Yield the records of one unit; one condition's refusal or unexpected error leaves the others alone."""

    def tabulate(self, results: Results) -> Table:
        """Return the table of a run whose units have all been measured."""


@dataclass(frozen=True)
class Results:
    """The records of all units.

    Parameters
    ----------
    conditions : sequence of Condition
    units : mapping
        By unit what its line in the journal holds: ``samples: [{item, condition, …}]``, ``refused: {condition:
        reason}``, ``faults: {item: reason}``, ``select_ms: {condition: [ms]}``, and ``failed`` where the whole unit
        could not be measured.
    """

    conditions: Sequence[Condition]
    units: Mapping[str, Mapping[str, Any]]

    @cached_property
    def refused(self) -> dict[str, list[str]]:
        """By condition the reason of every unit that refused it."""
        reasons: dict[str, list[str]] = {}
        for record in self.units.values():
            for key, reason in record["refused"].items():
                reasons.setdefault(key, []).append(reason)
        return {condition.key: reasons[condition.key] for condition in self.conditions if condition.key in reasons}

    @cached_property
    def measured(self) -> list[Condition]:
        """The conditions that no unit refused: those with a row in the table."""
        return [condition for condition in self.conditions if condition.key not in self.refused]

    @cached_property
    def samples(self) -> dict[str, dict[str, Mapping[str, Any]]]:
        """By condition and item what was measured."""
        samples: dict[str, dict[str, Mapping[str, Any]]] = {condition.key: {} for condition in self.conditions}
        for record in self.units.values():
            for sample in record["samples"]:
                samples[sample["condition"]][sample["item"]] = sample
        return samples

    def turns(self, key: str) -> list[Mapping[str, Any]]:
        """Return every sample of a condition, unit by unit, where units measure the same items again."""
        records = [sample for record in self.units.values() for sample in record["samples"]]
        return [sample for sample in records if sample["condition"] == key]

    def refused_rows(self) -> list[dict[str, Any]]:
        """Return for every refused condition its description and the first reason."""
        described = {condition.key: condition.described() for condition in self.conditions}
        return [{**described[key], "reason": reasons[0]} for key, reasons in self.refused.items()]

    def select_ms(self, key: str) -> dict[str, float] | None:
        """Return minimum, median and maximum of the milliseconds that a condition spent selecting."""
        spent = [ms for record in self.units.values() for ms in record.get("select_ms", {}).get(key, [])]
        return spread(spent) if spent else None

    def lines(self) -> Iterator[dict[str, Any]]:
        """Yield what ``samples.jsonl`` has: unit by unit, item by item, in the order of conditions."""
        places = {condition.key: place for place, condition in enumerate(self.conditions)}
        for record in self.units.values():
            faults = record.get("faults", {})
            yield from ({"item": item, "failed": reason} for item, reason in faults.items())
            by_item: dict[str, list[Mapping[str, Any]]] = {}
            for sample in record["samples"]:
                by_item.setdefault(sample["item"], []).append(sample)
            for samples in by_item.values():
                yield from (dict(sample) for sample in sorted(samples, key=lambda sample: places[sample["condition"]]))


def run(
    task: Task,
    conditions: Sequence[Condition],
    folder: Path | None = None,
    *,
    share: tuple[int, int] = (0, 1),
    command: str = "",
    progress: Callable[[int, int], None] | None = None,
) -> Table | None:
    """Measure what has not been measured yet, and return the table; None while other shards are unfinished.

    Parameters
    ----------
    folder : Path, optional
        Folder of the run; without one nothing is written.
    share : (int, int)
        Index of this process's shard and number of shards.
    command : str
        Command line, noted in the result.
    progress : callable, optional
        Called with the number of units done and the number of all.

    Raises
    ------
    EvaluationError
        If the folder holds another run, or nothing could be measured.
    OutputError
        If the folder cannot be written.
    """
    settings = configuration(task, conditions)
    about = {"task": task.name, "command": command, "versions": versions(), "settings": settings}
    check = unit_check(task, {condition.key for condition in conditions})
    with nullcontext() if folder is None else Store(folder, settings, share, check) as store:
        results = measured(task, conditions, store, progress)
    if len(results.units) < len(task.units()):
        return None
    table = task.tabulate(results)
    table = replace(table, result={**about, **table.result})
    if folder is not None:
        _write(folder, results, table)
    return table


def measured(
    task: Task,
    conditions: Sequence[Condition],
    store: Store | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Results:
    """Return the records of a task, those of all shards if there is a store.

    Raises
    ------
    EvaluationError
        If two conditions differ in nothing that a table shows.
    """
    conditions = _distinct(conditions)
    measure = functools.partial(_measured, task, conditions)
    return Results(conditions, measure_all(store, task.units(), measure, progress))


def unit_check(task: Task, keys: Set[str]) -> Callable[[Mapping[str, Any]], None]:
    """Return a function that raises ValueError for a line that is not of this task and conditions."""
    form: Any = msgspec.defstruct("Sample", [("item", str), ("condition", str), *task.form])

    def check(record: Mapping[str, Any]) -> None:
        if not {msgspec.convert(sample, form).condition for sample in msgspec.convert(record, _Unit).samples} <= keys:
            raise ValueError("it has a sample of another condition")

    return check


def _distinct(conditions: Sequence[Condition]) -> list[Condition]:
    """Return each condition once; two of one key that are not the same are an error."""
    by_key: dict[str, Condition] = {}
    for condition in conditions:
        known = by_key.setdefault(condition.key, condition)
        if known is not condition and (known.digest != condition.digest or repr(known) != repr(condition)):
            raise EvaluationError(f"two conditions are both {condition.key!r}: give one of them another label")
    return list(by_key.values())


def configuration(task: Task, conditions: Sequence[Condition]) -> dict[str, Any]:
    """Return everything that the records of a run depend on, as ``run.json`` has it."""
    policies = {c.label or f"{c.method.name}:{c.method.variant}": c.digest for c in conditions if c.method is not None}
    return {
        "task": task.name,
        **task.settings(),
        "versions": versions(),
        "policies": {name: digest for name, digest in policies.items() if digest},
        "conditions": {condition.key: condition.described() for condition in conditions},
    }


def versions() -> dict[str, str]:
    """Return the versions that a number depends on."""
    return {
        "vidsieve": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
    }


def _measured(task: Task, conditions: Sequence[Condition], unit: str) -> dict[str, Any]:
    """Return the records of one unit as its line in the journal has them.

    A line with ``unexpected`` stays out of the journal: the unit is measured again when the run is resumed.
    """
    line: dict[str, Any] = {"samples": [], "refused": {}, "faults": {}, "select_ms": {}}
    before, faults.seen = faults.seen, False
    for record in task.measure(unit, conditions):
        if not record.reason:
            line["samples"].append({"item": record.item, "condition": record.condition, **record.values})
            if record.ms is not None:
                line["select_ms"].setdefault(record.condition, []).append(record.ms)
        elif record.condition:
            line["refused"][record.condition] = record.reason
        elif record.item:
            line["faults"][record.item] = record.reason
        else:
            line["failed"] = record.reason
    if faults.seen:
        line["unexpected"] = True
    faults.seen = faults.seen or before
    return line


def _write(folder: Path, results: Results, table: Table) -> None:
    """Write the files of a finished run; milliseconds go into a separate file."""
    spent = {key: results.select_ms(key) for key in results.samples}
    rows = [{name: cell for name, cell in row.items() if name != "select_ms"} for row in table.result["rows"]]
    for name, text in {
        SAMPLES: "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in results.lines()),
        TIMING: json.dumps({"select_ms": {key: ms for key, ms in spent.items() if ms}}, indent=2) + "\n",
        RESULT: json.dumps(finite({**table.result, "rows": rows}), indent=2) + "\n",
    }.items():
        with writing(folder / name) as temporary:
            temporary.write_text(text, encoding="utf-8")


# -- statistics -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scores:
    """Scores of every condition on the same items, in one order.

    Parameters
    ----------
    conditions : mapping
        By key the description of a condition, as `Condition.described` returns it.
    values : mapping
        By key a score for every item.
    clusters : sequence of int
        Number of the cluster of every item, such as its video.
    """

    conditions: Mapping[str, Mapping[str, Any]]
    values: Mapping[str, Sequence[float]]
    clusters: Sequence[int]

    def mean(self, key: str, places: Sequence[int] | None = None) -> dict[str, Any]:
        """Return mean, standard error and 95 % interval of a condition, over all items or those in `places`."""
        values, clusters = self.values[key], self.clusters
        if places is not None:
            values, clusters = [values[place] for place in places], [clusters[place] for place in places]
        estimate = clustered_mean(values, clusters)
        return {"accuracy": estimate.mean, "stderr": estimate.stderr, "interval": list(estimate.interval)}

    def differences(self, key: str) -> dict[str, dict[str, Any] | None]:
        """Return the paired differences to `REFERENCES`: ``vs_full`` and ``vs_random``, None without a reference.

        Each has ``diff, stderr, interval`` and ``mcnemar``, the p-value of a test that takes items for independent;
        None where scores are not 0 or 1.
        """
        return {f"vs_{name}": self._difference(key, self._reference(key, name)) for name in REFERENCES}

    def _reference(self, key: str, method: str) -> str | None:
        """Return the condition of a method with as many frames and, except for ``full``, the same retention."""
        row = self.conditions[key]
        same = [name for name in ("frames", "retention")[: 1 if method == "full" else 2] if name in row]
        for other, described in self.conditions.items():
            if described["method"] == method and all(described[name] == row[name] for name in same):
                return other if other in self.values else None
        return None

    def _difference(self, key: str, other: str | None) -> dict[str, Any] | None:
        if other is None:
            return None
        values, others = self.values[key], self.values[other]
        estimate = paired_difference(values, others, self.clusters)
        binary = set(values) | set(others) <= {0.0, 1.0}
        return {
            "diff": estimate.mean,
            "stderr": estimate.stderr,
            "interval": list(estimate.interval),
            "mcnemar": mcnemar(values, others) if binary else None,
        }
