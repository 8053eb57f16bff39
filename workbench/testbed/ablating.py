"""Running the ablation tables: every training once per seed, in any order, on any number of processes, resumable.

A run's folder is named after its training's settings and its result after what was measured, so that tables share
trainings, another measurement needs no new one, and a stopped command goes on where it was.
"""

from __future__ import annotations

import hashlib
import json
import math
import multiprocessing
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from vidsieve.adapters.pruning import adapter_for
from vidsieve.errors import UnknownNameError
from vidsieve.evaluation.conditions import Condition, method_for
from vidsieve.evaluation.experiment import Measurement, Results, measured
from vidsieve.evaluation.stats import Estimate, clustered_mean
from vidsieve.evaluation.table import NONE, Table
from vidsieve.evaluation.tasks.testbed import SceneCondition, ScenesTask, scene_conditions
from vidsieve.io.files import METRICS, writing
from vidsieve.loading import load_model, shipped_model
from vidsieve.policies import CONFIG, read_config
from vidsieve.testbed.world import WORLD_VERSION
from vidsieve.training.recipes import train_policy
from vidsieve.training.run_folder import POLICY
from vidsieve.training.settings import TrainConfig, config_of
from workbench.testbed.ablations import TABLES, AblationCondition, AblationTable

RETENTIONS = (0.1, 0.05)
EVAL_SEED = 9401
"""Scenes that neither training nor the published comparisons see."""
SECOND = "second answerer"


@dataclass(frozen=True)
class Run:
    """One training and its evaluation."""

    method: str
    condition: AblationCondition
    seed: int
    questions: int
    second: Path | None = None
    """Folder of a second answerer, with which policies of the deep model are measured too."""

    @property
    def folder(self) -> str:
        """A name made of everything that the training depends on, but the code itself."""
        variant, answerer = self.condition.variant, _model_digest(shipped_model(self.condition.model))
        parts = [self.method, variant, asdict(self.config), self.seed, WORLD_VERSION, answerer]
        return f"{self.method}-{_digest(parts)}-{self.seed}"

    @property
    def result(self) -> str:
        """The path of the result, whose name is made of what is measured."""
        parts = [self.condition.probes, self.questions, EVAL_SEED, RETENTIONS, f"{self.world}-b"]
        if self.second is not None:
            parts.append(_model_digest(self.second))
        return f"{self.folder}/result-{_digest(parts)}.json"

    @property
    def world(self) -> str:
        """The world that the policy is trained and measured in."""
        return self.config.world

    @property
    def config(self) -> TrainConfig:
        """The settings of the training, but its seed."""
        return config_of(self.method, self.condition.variant, self.condition.settings)


def _digest(parts: Sequence[Any]) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:12]


@cache
def _model_digest(folder: Path) -> str:
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


def runs_of(tables: Sequence[AblationTable], seeds: int, questions: int, second: Path | None = None) -> list[Run]:
    """Return every run that tables need, each once; the first seed of all of them first."""
    found: dict[str, Run] = {}
    for seed in range(seeds):
        for table in tables:
            for condition in table.conditions:
                run = Run(table.method, condition, seed, questions, second if condition.model == "testbed" else None)
                if seed < table.count(seeds):
                    found.setdefault(run.result, run)
    return list(found.values())


def marks_in(task: ScenesTask, conditions: Sequence[SceneCondition]) -> dict[str, str]:
    """Return the marks of every condition but the first, all tokens, by method and retention: 1 for a right answer."""
    rows = {condition.key: condition.described() for condition in conditions[1:]}
    marks = task.marks(measured(task, conditions[1:]))
    return {
        f"{rows[key]['method']}/{rows[key]['retention']:g}": "".join("01"[mark] for mark in own)
        for key, own in marks.items()
    }


def perform(run: Run, folder: Path) -> dict[str, Any]:
    """Return a run's marks; what has been trained, or measured, before is not again."""
    home, written = folder / run.folder, folder / run.result
    if os.path.exists(written):
        found: dict[str, Any] = json.loads(written.read_text(encoding="utf-8"))
        return found
    torch.set_num_threads(1)
    name = run.condition.model
    model, processor = load_model(name)
    settings = run.condition.settings | {"seed": run.seed, "eval_prompts": 0}
    if not os.path.exists(home / POLICY / CONFIG):
        train_policy(
            run.method,
            model,
            processor,
            home,
            settings,
            variant=run.condition.variant,
            model_name=name,
            resume=os.path.exists(home / METRICS),
        )
    policy, twin = {run.method: method_for(str(home))}, f"{run.world}-b"
    task = ScenesTask(adapter_for(model), processor, run.world, EVAL_SEED, run.questions, name)
    found = marks_in(task, scene_conditions(policy, RETENTIONS, probes=run.condition.probes))
    elsewhere = {twin: replace(task, world=twin)}
    if run.second is not None:
        other, processor = load_model(str(run.second))
        elsewhere[SECOND] = replace(task, adapter=adapter_for(other), processor=processor, model=str(run.second))
    clusters = {"": list(task.items.values())}
    for place, there in elsewhere.items():
        clusters[place] = list(there.items.values())
        for key, marks in marks_in(there, scene_conditions(policy, RETENTIONS)).items():
            found[f"{run.method}[{place}]/{key.rpartition('/')[2]}"] = marks
    minutes = read_config(home / POLICY).training["minutes"]
    result = {"marks": found, "clusters": clusters, "minutes": minutes}
    with writing(written) as temporary:
        temporary.write_text(json.dumps(result), encoding="utf-8")
    return result


@dataclass(frozen=True)
class AblationTask:
    """Trainings of ablation tables, in several processes; a unit is one training with its evaluation.

    Parameters
    ----------
    tables : sequence of AblationTable
    seeds, questions : int
        Training seeds, and questions each policy is measured on.
    folder : Path
        Folder of the trainings, which are resumed there.
    processes : int
        Trainings at a time, one thread each.
    labels : collection of str, optional
        Labels of the conditions that are trained; default: all.
    second : Path, optional
        As `Run` has it.
    """

    tables: Sequence[AblationTable]
    seeds: int
    questions: int
    folder: Path
    processes: int = 2
    labels: Collection[str] | None = None
    second: Path | None = None
    name: str = "ablation"
    form: ClassVar = ()

    @cached_property
    def runs(self) -> dict[str, Run]:
        """Trainings by the paths of their results."""
        runs = runs_of(self.tables, self.seeds, self.questions, self.second)
        return {run.result: run for run in runs if self.labels is None or run.condition.label in self.labels}

    def settings(self) -> dict[str, Any]:
        """Return the settings that records depend on."""
        return {"eval_seed": EVAL_SEED, "questions": self.questions, "seeds": self.seeds}

    def units(self) -> list[str]:
        """Return the paths of the trainings' results."""
        return list(self.runs)

    @cached_property
    def _results(self) -> Iterator[dict[str, Any]]:
        with ProcessPoolExecutor(self.processes, multiprocessing.get_context("spawn")) as pool:
            self.folder.mkdir(parents=True, exist_ok=True)
            try:
                yield from pool.map(partial(perform, folder=self.folder), self.runs.values())
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def measure(self, unit: str, conditions: Sequence[Condition]) -> list[Measurement]:
        """Return a training's ``marks, clusters, minutes``; units are measured in their order."""
        return [Measurement(unit, values=next(self._results))]

    def tabulate(self, results: Results) -> Table:
        """Return the first table, with the others as further ones; the result has ``tables`` as `tabulated`."""
        by_folder = {unit: record["samples"][0] for unit, record in results.units.items()}
        made = [
            tabulated(table, self.seeds, self.questions, by_folder, self.labels, self.second) for table in self.tables
        ]
        first, *others = map(ablation_table, made)
        return replace(first, more=others, result={**self.settings(), "rows": [], "refused": [], "tables": made})


# -- tables -------------------------------------------------------------------------------------------------


def difference(ours: Sequence[Sequence[bool]], base: Sequence[Sequence[bool]], clusters: Sequence[int]) -> Estimate:
    """Return the mean difference of two conditions, marks (S, Q) each, seeds and questions paired.

    The squared error is the sum of two: over training seeds, and over scenes, of the mean over seeds. One seed says
    nothing of what training's chance does: NaN.
    """
    gaps = np.asarray(ours, float) - np.asarray(base, float)  # (S, Q)
    over_scenes = clustered_mean(gaps.mean(0).tolist(), clusters)
    per_seed = gaps.mean(1)
    over_seeds = float(per_seed.var(ddof=1)) / len(per_seed) if len(per_seed) > 1 else math.nan
    return Estimate(over_scenes.mean, float(np.hypot(over_scenes.stderr, np.sqrt(over_seeds))))


def tabulated(
    table: AblationTable,
    seeds: int,
    questions: int,
    results: dict[str, dict[str, Any]],
    labels: Collection[str] | None = None,
    second: Path | None = None,
) -> dict[str, Any]:
    """Return a table's rows: accuracy at every retention and difference to the first row, from results by folder.

    With `labels` only the conditions of these have rows. Rows of another world or model differ from the first there.
    """
    count = table.count(seeds)
    rows: list[dict[str, Any]] = []
    first: dict[tuple[str, float], list[list[bool]]] = {}
    for condition in table.conditions:
        if labels is not None and condition.label not in labels:
            continue
        of = runs_of([replace(table, conditions=(condition,))], seeds, questions, second)
        trained = [results[run.result] for run in of]
        for view in _views(trained[0]["marks"], table):
            place = _place(view)
            clusters = trained[0]["clusters"][place]
            row: dict[str, Any] = {"label": condition.label + ("" if view == table.method else f" {_named(view)}")}
            for retention in RETENTIONS:
                marks = [[mark == "1" for mark in result["marks"][f"{view}/{retention:g}"]] for result in trained]
                base = first.setdefault((place, retention), marks)
                per_seed = [sum(line) / len(line) for line in marks]
                gap = difference(marks, base, clusters) if marks is not base else None
                row[f"{retention:g}"] = {
                    "accuracy": float(np.mean(per_seed)),
                    "seeds": per_seed,
                    "difference": gap.mean if gap else None,
                    "stderr": gap.stderr if gap and not math.isnan(gap.stderr) else None,
                }
            row["minutes"] = float(np.mean([result["minutes"] for result in trained]))
            row["settings"] = condition.settings | {"variant": condition.variant}
            rows.append(row)
    about = {"name": table.name, "method": table.method, "paper": table.paper}
    return {**about, "seeds": count, "questions": questions, "rows": rows}


def _views(marks: dict[str, Any], table: AblationTable) -> list[str]:
    """Return the views that a table shows: the method itself, its probes, the same in other places."""
    views = dict.fromkeys(key.rsplit("/", 1)[0] for key in marks)
    shown = {view: table.transfer if _place(view) else table.probes for view in views}
    return [view for view in views if view == table.method or shown[view]]


def _place(view: str) -> str:
    """Return the world or model that a view is measured in, where it is not the one of training."""
    inside = view.partition("[")[2].rstrip("]")
    return inside if inside.endswith("-b") or inside == SECOND else ""


def _named(view: str) -> str:
    if place := _place(view):
        return f"— with the {SECOND}" if place == SECOND else f"— in {place}"
    return {
        "other question": "— given another question",
        "frame_avg": "— same budget for every frame",
        "frame_ada": "— budget by frame scores",
        "frame_ada_st": "— half by score, half uniform",
        "global": "— one budget for the video",
    }[view.partition("[")[2].rstrip("]")]


def ablation_table(table: Mapping[str, Any]) -> Table:
    """Return a table from its rows; a difference within two standard errors is "no difference"."""
    heads = [head for ratio in RETENTIONS for head in (f"{100 * ratio:g} %", "difference")]
    rows = []
    for row in table["rows"]:
        at = [row[f"{ratio:g}"] for ratio in RETENTIONS]
        cells = [cell for value in at for cell in (f"{value['accuracy']:.3f}", _difference(value))]
        rows.append([row["label"], *cells, f"{row['minutes']:.1f}"])
    seeds = "one seed" if table["seeds"] == 1 else f"{table['seeds']} seeds"
    title = f"{table['name']} ({table['method']}, {seeds}, {table['questions']:,} questions)"
    return Table(title, ("", *heads, "minutes"), rows, notes=[table["paper"]])


def _difference(cell: dict[str, Any]) -> str:
    if cell["difference"] is None:
        return NONE
    if cell["stderr"] is None:
        return f"{cell['difference']:+.3f} (one seed)"
    if abs(cell["difference"]) <= 2 * cell["stderr"]:
        return f"no difference ({cell['difference']:+.3f} ± {cell['stderr']:.3f})"
    return f"{cell['difference']:+.3f} ± {cell['stderr']:.3f}"


def chosen_tables(names: Sequence[str]) -> list[AblationTable]:
    """Return tables by name, all for no names.

    Raises
    ------
    UnknownNameError
    """
    known = {table.name: table for table in TABLES}
    for name in names:
        if name not in known:
            raise UnknownNameError("table", name, known)
    return [known[name] for name in names] if names else list(TABLES)
