"""Running the ablation tables: every training once per seed, in any order, on any number of processes, resumable.

A run's folder is named after its settings, so that tables share runs and a stopped command goes on where it was.
"""

from __future__ import annotations

import hashlib
import json
import math
import multiprocessing
import os
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vidsieve.adapters.pruning import adapter_for
from vidsieve.errors import UnknownNameError
from vidsieve.evaluation.methods import named_method, rows_for
from vidsieve.evaluation.stats import Estimate, clustered_mean
from vidsieve.evaluation.testbed import answers, scenes
from vidsieve.io.files import writing
from vidsieve.loading import shipped_model
from vidsieve.testbed.world import WORLD_VERSION
from vidsieve.training.recipes import train_policy
from vidsieve.training.run_folder import CHECKPOINT, read_metrics
from vidsieve.training.settings import SETTINGS, CaCoVIDConfig, ScoreConfig
from workbench.testbed.ablations import TABLES, AblationCondition, AblationTable

RETENTIONS = (0.1, 0.05)
EVAL_SEED = 9101
"""Scenes that neither training nor the published comparisons see."""
RESULT = "result.json"


@dataclass(frozen=True)
class Run:
    """One training and its evaluation."""

    method: str
    condition: AblationCondition
    seed: int
    questions: int

    @property
    def folder(self) -> str:
        """A name made of everything that the result depends on, but the code itself."""
        c = self.condition
        settings = SETTINGS[self.method, c.variant] | c.settings
        config = asdict((CaCoVIDConfig if self.method == "cacovid" else ScoreConfig)(**settings))
        parts = [self.method, c.variant, config, c.probes, self.seed, self.questions, EVAL_SEED, RETENTIONS]
        parts += [WORLD_VERSION, _model_digest()]
        digest = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:12]
        return f"{self.method}-{digest}-{self.seed}"


@cache
def _model_digest() -> str:
    return hashlib.sha256((shipped_model() / "model.safetensors").read_bytes()).hexdigest()


def runs_of(tables: Sequence[AblationTable], seeds: int, questions: int) -> list[Run]:
    """Return every run that tables need, each once; the first seed of all of them first."""
    found: dict[str, Run] = {}
    for seed in range(seeds):
        for table in tables:
            for condition in table.conditions:
                run = Run(table.method, condition, seed, questions)
                if seed < table.count(seeds):
                    found.setdefault(run.folder, run)
    return list(found.values())


def perform(run: Run, folder: Path) -> dict[str, Any]:
    """Return a run's marks and learning curve, from its folder if it has been performed before."""
    home = folder / run.folder
    if os.path.exists(home / RESULT):
        found: dict[str, Any] = json.loads((home / RESULT).read_text(encoding="utf-8"))
        return found
    from vidsieve.loading import load_model

    torch.set_num_threads(1)
    model, processor = load_model("testbed")
    settings = run.condition.settings | {"seed": run.seed, "eval_prompts": 0}
    record = train_policy(
        run.method,
        model,
        processor,
        home,
        settings,
        variant=run.condition.variant,
        model_name="testbed",
        resume=os.path.exists(home / CHECKPOINT),
    )
    rows = rows_for({str(home): named_method(str(home))}, RETENTIONS, probes=run.condition.probes)
    adapter = adapter_for(model)
    marks: dict[str, list[bool]] = {f"{row.method}/{row.retention:g}": [] for row in rows}
    clusters: list[int] = []
    for number, scene in enumerate(scenes(adapter, processor, "A", EVAL_SEED, run.questions)):
        for row in rows:
            marks[f"{row.method}/{row.retention:g}"] += answers(adapter, scene, row, EVAL_SEED + number)[0]
        clusters += [number] * len(scene.questions)
    result = {"marks": marks, "clusters": clusters, "curve": read_metrics(home), "minutes": record["minutes"]}
    with writing(home / RESULT) as temporary:
        temporary.write_text(json.dumps(result), encoding="utf-8")
    return result


def perform_all(
    runs: Sequence[Run], folder: Path, processes: int, report: Callable[[int, int, Run, float], None]
) -> dict[str, dict[str, Any]]:
    """Return the results of all runs by folder name; `report` hears (done, all, run, minutes of training)."""
    folder.mkdir(parents=True, exist_ok=True)
    results: dict[str, dict[str, Any]] = {}
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        waiting: dict[Future[dict[str, Any]], Run] = {pool.submit(perform, run, folder): run for run in runs}
        try:
            while waiting:
                finished, _ = wait(waiting, return_when=FIRST_COMPLETED)
                for future in finished:
                    run = waiting.pop(future)
                    results[run.folder] = future.result()
                    report(len(results), len(runs), run, results[run.folder]["minutes"])
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return results


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
) -> dict[str, Any]:
    """Return a table's rows: accuracy at every retention and difference to the first row, from results by folder.

    With `labels` only the conditions of these have rows.
    """
    count = table.count(seeds)
    rows: list[dict[str, Any]] = []
    first: dict[str, list[list[bool]]] = {}
    for condition in table.conditions:
        if labels is not None and condition.label not in labels:
            continue
        found = [results[Run(table.method, condition, seed, questions).folder] for seed in range(count)]
        clusters = found[0]["clusters"]
        for view in _views(found[0]["marks"], table.method) if table.probes else [table.method]:
            row: dict[str, Any] = {"label": condition.label + ("" if view == table.method else f" {_named(view)}")}
            for retention in RETENTIONS:
                marks = [result["marks"][f"{view}/{retention:g}"] for result in found]
                base = first.setdefault(f"{retention:g}", marks)
                per_seed = [sum(line) / len(line) for line in marks]
                gap = difference(marks, base, clusters) if marks is not base else None
                row[f"{retention:g}"] = {
                    "accuracy": float(np.mean(per_seed)),
                    "seeds": per_seed,
                    "difference": gap.mean if gap else None,
                    "stderr": gap.stderr if gap else None,
                }
            row["minutes"] = float(np.mean([result["minutes"] for result in found]))
            row["settings"] = condition.settings | {"variant": condition.variant}
            if table.curves and view == table.method:
                row["curve"] = _mean_curve([result["curve"] for result in found])
            rows.append(row)
    return {"name": table.name, "method": table.method, "paper": table.paper, "seeds": count, "rows": rows}


def _views(marks: dict[str, Any], method: str) -> Iterator[str]:
    yield from dict.fromkeys(key.rsplit("/", 1)[0] for key in marks if key.startswith(method))


def _named(view: str) -> str:
    return {
        "other question": "— given another question",
        "frame_avg": "— same budget for every frame",
        "frame_ada": "— budget by frame scores",
        "frame_ada_st": "— half by score, half uniform",
        "global": "— one budget for the video",
    }[view.partition("[")[2].rstrip("]")]


def _mean_curve(curves: list[list[dict[str, float]]]) -> list[dict[str, float]]:
    """Return the mean over seeds of what was logged at each step."""
    names = [name for name in ("step", "right", "reward", "dead_groups", "ratio") if name in curves[0][0]]
    return [
        {name: float(np.mean([line[name] for line in lines])) for name in names} for lines in zip(*curves, strict=True)
    ]


def markdown(tables: Sequence[dict[str, Any]]) -> str:
    """Return tables as Markdown; a difference within two standard errors is "no difference"."""
    lines = []
    for table in tables:
        heads = " | ".join(f"{100 * r:g} % | difference" for r in RETENTIONS)
        lines += [f"### {table['name']} ({table['method']}, {table['seeds']} seeds)", "", table["paper"], ""]
        lines += [f"| | {heads} | minutes |", "|---|" + "---|---|" * len(RETENTIONS) + "---|"]
        for row in table["rows"]:
            cells = [f"{row[f'{r:g}']['accuracy']:.3f} | {_difference(row[f'{r:g}'])}" for r in RETENTIONS]
            lines.append(f"| {row['label']} | {' | '.join(cells)} | {row['minutes']:.1f} |")
        lines.append("")
    return "\n".join(lines)


def _difference(cell: dict[str, Any]) -> str:
    if cell["difference"] is None:
        return "–"
    if math.isnan(cell["stderr"]):
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
