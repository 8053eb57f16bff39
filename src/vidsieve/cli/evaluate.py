"""`vidsieve eval`: accuracy of methods side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vidsieve import registry
from vidsieve.cli import options, output, shared
from vidsieve.errors import EvaluationError, RetentionError, UnknownNameError
from vidsieve.io.journal import shard_path
from vidsieve.io.limits import Limits
from vidsieve.retention import parse_budget, parse_frames, parse_retentions

if TYPE_CHECKING:
    from vidsieve.evaluation.conditions import Condition
    from vidsieve.evaluation.experiment import Task

TESTBED = {"methods": "all", "retention": "0.25,0.1,0.05", "seed": 9001, "subset": 2000, "model": "testbed"}
BENCHMARK = {"methods": "", "retention": "0.25,0.1", "seed": 0}
"""Defaults of options that differ between tasks."""
SETS, SCENES = "Not for testbed", "For testbed only"
ONLY_TESTBED = ("world", "probes")
ONLY_BENCHMARKS = (
    "frames",
    "max_row",
    "fps",
    "tokens_per_frame",
    "protocol",
    "answer",
    "max_new_tokens",
    "allow_missing",
    "indices",
    "layout",
    "positions",
    "device",
    "dtype",
)


def evaluate(
    context: typer.Context,
    task: Annotated[str, typer.Argument(help=f"testbed, {', '.join(registry.benchmarks)}.", metavar="TASK")],
    data: Annotated[
        Path | None,
        typer.Argument(help="A benchmark's folder as published; of 'questions' a file.", show_default=False),
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Folder or hub id of a model; a protocol names its own.", show_default=False)
    ] = None,
    methods: Annotated[
        str | None,
        typer.Option(help="Names, name:variant, policies, or 'all'.", show_default="all for testbed"),
    ] = None,
    retention: Annotated[
        str | None,
        typer.Option(
            help="Fractions of video tokens kept, or counts as 512t.", show_default="0.25,0.1; testbed: also 0.05"
        ),
    ] = None,
    tokens: options.TokensKept = None,
    frames: Annotated[
        str | None,
        typer.Option(
            help="Frames taken evenly, or several numbers of them; '16,auto': also as many as each method's rule reads "
            "for --tokens.",
            show_default="32",
            rich_help_panel=SETS,
        ),
    ] = None,
    fps: Annotated[
        float | None,
        typer.Option(help="Frames a second; --frames is then the most.", show_default=False, rich_help_panel=SETS),
    ] = None,
    tokens_per_frame: Annotated[
        int | None,
        typer.Option(
            help="Most tokens per frame, for models with a variable resolution.",
            min=1,
            show_default=False,
            rich_help_panel=SETS,
        ),
    ] = None,
    protocol: Annotated[
        str | None,
        typer.Option(
            help="A paper's model, frames and tokens a frame, as cacovid:qwen2.5-vl.",
            show_default=False,
            rich_help_panel=SETS,
        ),
    ] = None,
    answer: Annotated[
        str,
        typer.Option(
            help="'generate' text and read its letter, or 'choice': the likeliest letter.", rich_help_panel=SETS
        ),
    ] = "generate",
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer in tokens.", min=1, rich_help_panel=SETS)] = 16,
    subset: Annotated[
        int | None,
        typer.Option(
            "--subset",
            "--questions",
            help="Number of questions, drawn by --seed.",
            min=1,
            show_default="all; testbed: 2000",
        ),
    ] = None,
    allow_missing: Annotated[
        bool,
        typer.Option("--allow-missing", help="Count questions about missing videos as failures.", rich_help_panel=SETS),
    ] = False,
    indices: Annotated[
        bool, typer.Option("--indices", help="Store which tokens each method kept.", rich_help_panel=SETS)
    ] = False,
    world: Annotated[
        str,
        typer.Option(help="dense or sparse; dense-b or sparse-b, on which nothing is trained.", rich_help_panel=SCENES),
    ] = "dense",
    probes: Annotated[
        bool,
        typer.Option("--probes", help="Also ask question-aware methods another question.", rich_help_panel=SCENES),
    ] = False,
    earliest: options.Earliest = False,
    folder: Annotated[
        Path | None,
        typer.Option(
            "--out",
            help="Folder of the run; the same command resumes it.",
            show_default="runs/eval/TASK; testbed: none",
        ),
    ] = None,
    share: options.Share = None,
    layout: Annotated[str | None, options.layout_option(SETS)] = None,
    positions: options.Positions = None,
    device: Annotated[str, options.device_option(SETS)] = "auto",
    dtype: Annotated[str | None, options.dtype_option(SETS)] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of what is drawn.", show_default="0; testbed: 9001")] = None,
    max_pixels: options.MaxPixels = Limits.pixels,
    threads: options.Threads = 0,
    max_row: options.MaxRow = Limits.row,
    report: options.Report = None,
    json: options.Json = None,
) -> None:
    """Measure methods side by side, beside the model with all tokens: accuracy with errors clustered by video."""
    if task != "testbed" and task not in registry.benchmarks:
        raise UnknownNameError("task", task, ["testbed", *registry.benchmarks])
    for name in ONLY_BENCHMARKS if task == "testbed" else ONLY_TESTBED:
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            raise EvaluationError(f"--{name.replace('_', '-')} means nothing for {task}: leave it out")
    retention = options.budget_asked(retention, tokens)
    asked = {"methods": methods, "retention": retention, "seed": seed, "subset": subset, "model": model}
    given: dict[str, Any] = (TESTBED if task == "testbed" else BENCHMARK) | {
        name: value for name, value in asked.items() if value is not None
    }
    for name in options.words(given["methods"]):
        registry.check_known(name)
    output.check_output(json, reads=[data])
    output.check_output(report, output.PAGE, [data])
    if task == "testbed":
        if data is not None:
            raise EvaluationError(f"testbed makes its own scenes: leave {data} out")
        shard = options.parse_share(share, folder is not None)
    else:
        if data is None:
            raise EvaluationError(f"DATA is missing: give the folder of {task}, or a file of questions")
        shard, folder = options.parse_share(share), folder or Path("runs/eval", task)
        output.check_output(folder / "run.json")
    if folder is not None:
        output.check_free(shard_path(folder, shard))
    shared.set_threads(threads)
    if data is None:
        what, conditions = _testbed(given, world, probes, earliest)
    else:
        if protocol is not None and (frames, tokens_per_frame, fps) != (None, None, None):
            raise EvaluationError("--protocol says how many frames and tokens there are: leave those options out")
        what, conditions = _questions(
            task,
            data,
            given,
            frames=frames or "32",
            fps=fps,
            tokens_per_frame=tokens_per_frame,
            protocol=protocol,
            answer=answer,
            max_new_tokens=max_new_tokens,
            allow_missing=allow_missing,
            indices=indices,
            earliest=earliest,
            layout=layout,
            positions=positions,
            device=device,
            dtype=dtype,
        )
    units, lead = "scenes" if data is None else "videos", f"model {given.get('model') or protocol}"
    shared.run_task(what, conditions, units, folder=folder, share=shard, report=report, lead=lead, json=json)


def _testbed(given: Mapping[str, Any], world: str, probes: bool, earliest: bool) -> tuple[Task, Sequence[Condition]]:
    """Return the testbed's questions, and every method at every retention; `full` and `random` are always there."""
    if given["subset"] < 2:
        raise EvaluationError("on the testbed, --questions is a whole number from 2 on")
    ratios, names = parse_retentions(given["retention"]), options.words(given["methods"])
    from vidsieve.adapters.pruning import adapter_for
    from vidsieve.evaluation.conditions import check_prefill, named_methods
    from vidsieve.evaluation.tasks.testbed import ScenesTask, scene_conditions
    from vidsieve.loading import is_testbed
    from vidsieve.testbed.world import world_of

    world_of(world)
    if "all" not in names and "random" not in names:
        names = ["random", *names]
    shared.quiet()
    name = given["model"] if is_testbed(given["model"]) else "testbed"
    methods = named_methods(names, name, earliest=earliest, prefill=True)
    check_prefill(methods)
    model, processor = shared.load_model(given["model"], device="cpu")
    task = ScenesTask(adapter_for(model), processor, world, given["seed"], given["subset"], given["model"])
    return task, scene_conditions(methods, ratios, probes)


def _questions(
    name: str,
    data: Path,
    given: Mapping[str, Any],
    *,
    frames: str,
    fps: float | None,
    tokens_per_frame: int | None,
    protocol: str | None,
    answer: str,
    max_new_tokens: int,
    allow_missing: bool,
    indices: bool,
    earliest: bool,
    layout: str | None,
    positions: str | None,
    device: str,
    dtype: str | None,
) -> tuple[Task, Sequence[Condition]]:
    """Return a published set of questions, and every method at every retention and number of frames."""
    asked = [parse_frames(word) for word in options.words(frames)]
    counts = [count for count in asked if isinstance(count, int)]
    rules = [rule for rule in asked if not isinstance(rule, int)]
    amounts = [parse_budget(word) for word in options.words(given["retention"])]
    if not amounts or not counts:
        raise RetentionError("give at least one retention, as 0.25,0.1, and one number of frames, as 16 or 16,auto")
    from vidsieve.adapters.fingerprint import model_digest
    from vidsieve.adapters.pruning import adapter_for
    from vidsieve.compressors.calibrated import frames_for
    from vidsieve.evaluation.conditions import BASELINES, Condition, conditions_of, label_of, named_methods
    from vidsieve.evaluation.protocols import protocol as protocol_of
    from vidsieve.evaluation.tasks.questions import QuestionsTask, items_of

    model, names = given.get("model"), options.words(given["methods"])
    if protocol is not None:
        fixed = protocol_of(protocol)
        counts, tokens_per_frame, model = [fixed.frames], fixed.tokens_per_frame, model or fixed.model
        layout = layout or fixed.layout
    model = options.named_model(model)
    benchmark = registry.benchmarks.get(name)
    items = items_of(
        benchmark,
        data,
        subset=given.get("subset"),
        seed=given["seed"],
        allow_missing=allow_missing,
        note=output.note,
    )
    shared.quiet()
    listed = [*(base for base in BASELINES if base not in names and "all" not in names), *names]
    methods = named_methods(listed, model, earliest=earliest)
    network, processor = shared.load_model(model, layout, dtype, device, positions)
    adapter = adapter_for(network)
    if tokens_per_frame is not None:
        adapter.limit_frames(processor, tokens_per_frame)
    about = {
        "data": data.name,
        "subset": given.get("subset"),
        "protocol": protocol,
        "tokens_per_frame": tokens_per_frame,
        "earliest": earliest,
        "layout": layout,
        **({} if positions is None else {"positions": positions}),
    }
    task = QuestionsTask(
        benchmark, items, adapter, processor, model, answer, fps, max_new_tokens, given["seed"], indices, about
    )
    conditions = conditions_of(methods, amounts, counts)
    digest = model_digest(adapter.model)
    for rule in rules:
        for amount in amounts:
            for word in names:
                method = methods[word].with_retention(amount)
                planned = Condition(method, frames_for(method, rule, digest), label_of(word))
                if planned not in conditions:
                    conditions.append(planned)
    return task, conditions
