"""Runs behind a table of a paper: benchmarks, the testbed, trainings, or timings."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vidsieve import registry
from vidsieve.cli.bench import made_clip
from vidsieve.cli.output import command_line, out
from vidsieve.cli.progress import Bar
from vidsieve.compressors.base import Compressor
from vidsieve.errors import EvaluationError, PolicyError, VidsieveError
from vidsieve.evaluation.conditions import Condition
from vidsieve.evaluation.experiment import Task, run
from workbench.papers.paper_tables import PaperTable
from workbench.papers.published import published


@dataclass
class Part:
    """Rows of a table that are run for one model; runs add to `missing` and `settings`."""

    table: str
    spec: PaperTable
    family: str
    rows: list[tuple[str, list[float]]]
    folder: Path
    device: str
    seed: int
    plan: bool
    missing: list[str]
    settings: dict[str, Any] = field(default_factory=dict)


def evaluated(
    part: Part, data: Path | None, model: str | None, policies: Mapping[str, str], subset: int | None, protocol: str
) -> dict[Any, Any]:
    """Evaluate one model on the benchmarks that are there."""
    from vidsieve.adapters.pruning import adapter_for
    from vidsieve.evaluation.protocols import protocol as protocol_of
    from vidsieve.evaluation.tasks.questions import QuestionsTask, items_of
    from vidsieve.loading import load, load_model
    from workbench.papers.reproducing import accuracy_cells, folder_of, method_of

    fixed = protocol_of(protocol)
    kept = sorted({at for _, ratios in part.rows for at in ratios}, reverse=True)
    methods: list[tuple[Compressor | None, str]] = [(None, ""), *((load("random", retention=at), "") for at in kept)]
    for row, ratios in part.rows:
        try:
            method = method_of(part.spec, part.family, row, policies)
        except PolicyError as error:
            part.missing.append(str(error))
            continue
        methods += [(method.with_retention(at), row) for at in ratios]
    conditions = [Condition(method, fixed.frames, row) for method, row in methods]
    asked = {}
    for benchmark in part.spec.benchmarks:
        there = folder_of(data, benchmark)
        known = registry.benchmarks.get(benchmark)
        if there is None:
            part.missing.append(
                f"{known.title}: give --data FOLDER with {benchmark} in it, as published (docs/evaluation.md)"
            )
            continue
        try:
            asked[benchmark] = items_of(known, there, subset=subset, seed=part.seed), there
        except EvaluationError as error:
            part.missing.append(f"{known.title}: {error}")
    name = model or fixed.model
    if part.plan or not asked:
        if part.plan:
            out.print(f"{part.family}: {len(asked)} benchmarks, {len(conditions)} conditions, {name}", markup=False)
        return {}
    try:
        network, processor = load_model(name, fixed.layout, device=part.device)
    except VidsieveError as error:
        part.missing.append(f"{part.family}: {error}; or give --model {part.family}=FOLDER")
        return {}
    adapter = adapter_for(network)
    if fixed.tokens_per_frame is not None:
        adapter.limit_frames(processor, fixed.tokens_per_frame)
    results = {}
    for benchmark, (items, there) in asked.items():
        about = {"data": there.name, "subset": subset, "protocol": protocol, "layout": fixed.layout}
        about["tokens_per_frame"] = fixed.tokens_per_frame
        known = registry.benchmarks.get(benchmark)
        task = QuestionsTask(known, items, adapter, processor, name, seed=part.seed, about=about)
        results[benchmark] = _run(task, conditions, f"videos of {benchmark}", part.folder / benchmark)
        part.missing += [f"{row['policy'] or row['method']}: {row['reason']}" for row in results[benchmark]["refused"]]
    part.settings |= {benchmark: result["settings"] for benchmark, result in results.items()}
    return accuracy_cells(part.family, results, fixed.benchmarks)


def _run(task: Task, conditions: Sequence[Condition], units: str, folder: Path | None = None) -> dict[str, Any]:
    """Return the result of a task."""
    with Bar(units, len(task.units())) as advance:
        table = run(task, conditions, folder, command=command_line(), progress=advance)
    if table is None:
        raise EvaluationError(f"{folder} is not finished: give the command again")
    return dict(table.result)


def on_testbed(part: Part, subset: int) -> dict[Any, Any]:
    """Evaluate the methods of a table on the testbed's two worlds."""
    from vidsieve.adapters.pruning import adapter_for
    from vidsieve.evaluation.tasks.testbed import FULL, SceneCondition, ScenesTask
    from vidsieve.loading import load, load_model
    from workbench.papers.reproducing import method_of, testbed_cells

    if part.plan:
        out.print(f"{part.family}: {len(part.rows)} methods on the testbed, {subset} questions a world", markup=False)
        return {}
    model, processor = load_model("testbed")
    conditions = [FULL]
    for row, ratios in part.rows:
        trained = registry.compressors.get(row).trained
        method = load(row, "testbed") if trained else method_of(part.spec, part.family, row, {}, earliest=True)
        conditions += [SceneCondition(method.with_retention(at), label=row) for at in ratios]
    kept = sorted({at for _, ratios in part.rows for at in ratios}, reverse=True)
    conditions += [SceneCondition(load("random", retention=at)) for at in kept]
    cells: dict[Any, Any] = {}
    for world in ("dense", "dense-b"):
        task = ScenesTask(adapter_for(model), processor, world, 9001 + part.seed, subset)
        result = _run(task, conditions, "scenes", part.folder / f"testbed-{world}")
        part.settings[world] = result["settings"]
        cells |= testbed_cells(part.family, result)
        part.missing += [f"{row['method']} at {row['retention']:g}: {row['reason']}" for row in result["refused"]]
    return cells


def trained(part: Part, seeds: int) -> dict[Any, Any]:
    """Train and measure the testbed's counterparts of a table's trainings."""
    from workbench.papers.reproducing import training_cells
    from workbench.testbed.ablating import AblationTask, chosen_tables

    wanted = dict.fromkeys(own.ablation for own in part.spec.trained.values())
    labels = {own.label for own in part.spec.trained.values()}
    task = AblationTask(chosen_tables(list(wanted)), seeds, 480, part.folder / "trainings", labels=labels)
    if part.plan:
        out.print(f"{part.family}: {len(task.runs)} trainings on the testbed, some ten minutes each", markup=False)
        return {}
    result = _run(task, [], "trainings")
    part.settings |= {"model": "testbed", "questions": 480, "seeds": seeds, "versions": result["versions"]}
    kept = {row: [c.retention for c in published(part.table) if c.row == row] for row, _ in part.rows}
    return training_cells(part.family, part.spec, result["tables"], kept)


def timed(part: Part, testbed: bool, dtype: str, repeats: int) -> dict[Any, Any]:
    """Time a model of the table's size, or a small one of its family, with random weights."""
    import torch

    from vidsieve.adapters.pruning import adapter_for
    from vidsieve.cli.bench import timed_model
    from vidsieve.cli.options import known_dtype
    from vidsieve.evaluation.tasks.timing import TimingTask
    from vidsieve.loading import load
    from workbench.papers.reproducing import time_cells

    known_dtype(dtype)
    size, lengths = (part.spec.small, (16,)) if testbed else (part.spec.blueprint, part.spec.lengths)
    if part.plan:
        out.print(f"{part.family}: {size} with random weights, {', '.join(map(str, lengths))} frames", markup=False)
        return {}
    network, prompts = timed_model(size, getattr(torch, dtype), part.device, part.seed)
    conditions = [Condition()]
    for row, ratios in part.rows:
        kind = registry.compressors.get(row)
        width = network.config.get_text_config().hidden_size
        method: Any = kind.untrained(width) if kind.trained else load(row)
        conditions += [Condition(method.with_retention(at), label=row) for at in ratios]
    with tempfile.TemporaryDirectory() as there:
        task = TimingTask(
            adapter=adapter_for(network),
            source=made_clip(Path(there) / "clip.mp4", 640, 360, 10),
            lengths=lengths,
            prompts=prompts,
            repeats=repeats,
            new_tokens=2,
            seed=part.seed,
        )
        result = _run(task, conditions, "rounds")
    part.settings |= {
        "model": size,
        "weights": "random",
        "dtype": dtype,
        "device": str(network.device),
        "lengths": list(lengths),
        "video": "640x360, 10 s, made for it",
    }
    part.missing += [f"{row['policy']}: {row['reason']}" for row in result["refused"]]
    part.missing.append("accuracies of this table: they are those of table1, run apart")
    return time_cells(part.family, result, {cell.column for cell in published(part.table)})
