"""`vidsieve eval`: accuracy of methods side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from vidsieve import registry
from vidsieve.cli.benchmark import run_benchmark
from vidsieve.cli.progress import Bar
from vidsieve.cli.shared import (
    PAGE,
    Earliest,
    Figures,
    Json,
    Layout,
    Report,
    Share,
    Threads,
    check_output,
    check_world,
    command_line,
    gone_error,
    note_few,
    out,
    parse_share,
    quiet,
    set_threads,
    stoppable,
    store_in,
    table,
    with_error,
    words,
    write_json,
    write_report,
)
from vidsieve.errors import EvaluationError, UnknownNameError
from vidsieve.retention import parse_retentions

TESTBED = {"methods": "all", "retention": "0.25,0.1,0.05", "seed": 9001, "subset": 2000, "model": "testbed"}
BENCHMARK = {"methods": "", "retention": "0.25,0.1", "seed": 0}
"""What options are where they are not given."""
ONLY_TESTBED = ("world", "probes", "answers")
ONLY_BENCHMARKS = (
    "frames",
    "fps",
    "tokens_per_frame",
    "protocol",
    "answer",
    "max_new_tokens",
    "allow_missing",
    "indices",
    "layout",
    "device",
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
        typer.Option(help="Names, name:variant, policy folders, or 'all'.", show_default="all for testbed"),
    ] = None,
    retention: Annotated[
        str | None,
        typer.Option(
            help="Fractions of video tokens kept, or counts as 512t.", show_default="0.25,0.1; testbed: also 0.05"
        ),
    ] = None,
    frames: Annotated[
        str | None, typer.Option(help="Frames taken evenly, or several numbers of them.", show_default="32")
    ] = None,
    fps: Annotated[
        float | None, typer.Option(help="Frames a second; --frames is then the most.", show_default=False)
    ] = None,
    tokens_per_frame: Annotated[
        int | None, typer.Option(help="At most so many, where the model lets one choose.", min=1, show_default=False)
    ] = None,
    protocol: Annotated[
        str | None,
        typer.Option(help="A paper's model, frames and tokens a frame, as cacovid:qwen2.5-vl.", show_default=False),
    ] = None,
    answer: Annotated[
        str, typer.Option(help="'generate' text and read its letter, or 'choice': the likeliest letter.")
    ] = "generate",
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer in tokens.", min=1)] = 16,
    subset: Annotated[
        int | None,
        typer.Option(
            "--subset",
            "--questions",
            help="So many questions, drawn by the seed.",
            min=1,
            show_default="all; testbed: 2000",
        ),
    ] = None,
    allow_missing: Annotated[
        bool, typer.Option("--allow-missing", help="Count questions about missing videos as failures.")
    ] = False,
    indices: Annotated[bool, typer.Option("--indices", help="Store which tokens each method kept.")] = False,
    world: Annotated[str, typer.Option(help="Of testbed: A (trained on) or B (never trained on).")] = "A",
    probes: Annotated[
        bool,
        typer.Option("--probes", help="Of testbed: also ask question-aware methods another question."),
    ] = False,
    answers: Annotated[
        bool, typer.Option("--answers", help="Of testbed: keep every single mark in the JSON file.")
    ] = False,
    earliest: Earliest = False,
    folder: Annotated[
        Path | None,
        typer.Option(
            "--out", help="Folder of the run, to be gone on with.", show_default="runs/eval/TASK; testbed: none"
        ),
    ] = None,
    share: Share = None,
    layout: Layout = None,
    device: Annotated[str, typer.Option(help="A device of torch; 'auto': a GPU where there is one.")] = "auto",
    seed: Annotated[int | None, typer.Option(help="Seed of what is drawn.", show_default="0; testbed: 9001")] = None,
    threads: Threads = 0,
    report: Report = None,
    figures: Figures = None,
    json: Json = None,
) -> None:
    """Measure methods side by side, beside the model with all tokens: accuracy with errors clustered by video."""
    if task == "open":
        raise gone_error("open")
    if task != "testbed" and task not in registry.benchmarks:
        raise UnknownNameError("task", task, ["testbed", *registry.benchmarks])
    for name in ONLY_BENCHMARKS if task == "testbed" else ONLY_TESTBED:
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            raise EvaluationError(f"--{name.replace('_', '-')} means nothing for {task}: leave it out")
    given = {"methods": methods, "retention": retention, "seed": seed, "subset": subset, "model": model}
    asked: dict[str, Any] = {
        **(TESTBED if task == "testbed" else BENCHMARK),
        **{name: value for name, value in given.items() if value is not None},
    }
    check_output(json, reads=[data])
    check_output(report, PAGE, [data])
    common: dict[str, Any] = {
        "earliest": earliest,
        "threads": threads,
        "report": report,
        "figures": figures,
        "json": json,
        "seed": asked["seed"],
    }
    if task == "testbed":
        if asked["subset"] < 2:
            raise EvaluationError("on the testbed, --questions is a whole number from 2 on")
        if data is not None:
            raise EvaluationError(f"testbed makes its own scenes: leave {data} out")
        run_testbed(
            words(asked["methods"]),
            asked["retention"],
            questions=asked["subset"],
            world=world,
            model=asked["model"],
            probes=probes,
            answers=answers,
            folder=folder,
            share=parse_share(share, folder is not None),
            **common,
        )
        return
    if data is None:
        raise EvaluationError(f"where is {task}? Give its folder as published, or the file of questions")
    run_benchmark(
        task,
        data,
        words(asked["methods"]),
        words(asked["retention"]),
        folder=folder or Path("runs/eval", task),
        share=parse_share(share),
        model=model,
        frames=frames,
        fps=fps,
        tokens_per_frame=tokens_per_frame,
        protocol=protocol,
        answer=answer,
        max_new_tokens=max_new_tokens,
        subset=subset,
        allow_missing=allow_missing,
        indices=indices,
        layout=layout,
        device=device,
        **common,
    )


def run_testbed(
    names: list[str],
    retention: str,
    *,
    seed: int,
    questions: int,
    world: str,
    model: str,
    probes: bool,
    earliest: bool,
    answers: bool,
    folder: Path | None,
    share: tuple[int, int],
    threads: int,
    report: Path | None,
    figures: Path | None,
    json: Path | None,
) -> None:
    """Answer fresh questions of the testbed under every method; `full` and `random` are always there."""
    ratios = parse_retentions(retention)
    check_world(world)
    set_threads(threads)
    from vidsieve.evaluation.methods import check_known, check_prefill, named_methods, rows_for
    from vidsieve.evaluation.testbed import MARKS, evaluate, run_config, write_run
    from vidsieve.loading import load_model
    from vidsieve.report.sections import evaluation_sections

    for name in names:
        check_known(name)
    if "all" not in names and "random" not in names:
        names = ["random", *names]
    quiet()
    chosen = named_methods(names, earliest=earliest, prefill=True)
    check_prefill(chosen)
    network, processor = load_model(model)
    rows = rows_for(chosen, ratios, probes)
    about = {"world": world, "seed": seed, "questions": questions, "model": model}
    kept = store_in(folder, lambda: run_config(network, rows, about), share)
    with stoppable(folder), kept as store, Bar("scenes", 1) as advance:
        result = evaluate(
            network, processor, rows, world=world, seed=seed, questions=questions, progress=advance, store=store
        )
    if result["n_questions"] < questions:
        out.print(f"this share is done; the table is made when the others are, in {folder}")
        return
    print_result(result)
    if folder is not None:
        write_run(folder, result, command_line())
        out.print(f"written: {folder}")
    write_report(report, "Accuracy on the testbed", lambda: evaluation_sections(result), model, figures)
    if not answers:
        result = {k: v for k, v in result.items() if k not in MARKS}
    write_json(json, result)


def print_result(result: dict[str, Any]) -> None:
    """Print the table of a testbed result: what layers see on average, and what the last of them is left with."""
    from vidsieve.report.sections import named

    lines = []
    for row in result["rows"]:
        against = row["vs_random"]
        versus = with_error(f"{against['diff']:+.3f}", 1.96 * against["stderr"]) if against else "–"
        lines.append(
            (
                escape(named(row)),
                f"{row['retention']:g}",
                f"{row['layer_retention']:.4f}",
                f"{row['real_retention']:.4f}",
                with_error(f"{row['accuracy']:.3f}", row["stderr"]),
                versus,
                f"{row['select_ms']['median']:.1f}",
            )
        )
    for row in result["refused"]:
        lines.append((escape(named(row)), f"{row['retention']:g}", *"–––––"))
    columns = ("method", "retention", "of layers", "left", "accuracy ± s.e.", "− random, 95 %", "select ms")
    size = f"{result['n_questions']} questions on {result['n_scenes']} scenes"
    title = f"world {result['world']}, seed {result['seed']}: {size}"
    out.print(table(title, columns, lines, right=(1, 2, 3, 4, 5, 6)))
    note_few(result["n_scenes"])
    for row in result["refused"]:
        out.print(f"{named(row)}: {row['reason']}", markup=False, highlight=False)
