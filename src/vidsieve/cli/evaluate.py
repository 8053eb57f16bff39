"""vidsieve eval: accuracy of methods side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from vidsieve import registry
from vidsieve.cli import benchmark
from vidsieve.cli.open_ended import eval_open
from vidsieve.cli.progress import Bar
from vidsieve.cli.shared import (
    PAGE,
    Earliest,
    Figures,
    Json,
    Report,
    Share,
    Threads,
    check_output,
    check_world,
    command_line,
    note_few,
    out,
    parse_retentions,
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

app = typer.Typer(no_args_is_help=True, help="Measure methods: accuracy with errors clustered by video.")
for name in registry.benchmarks:
    app.command(name, help=f"Accuracy on {name}, every method in one run that can be gone on with.")(
        benchmark.command(name)
    )
app.command("open")(eval_open)


@app.command("testbed")
def eval_testbed(
    methods: Annotated[str, typer.Option(help="Names, name:variant, policy folders, or 'all'.")] = "all",
    retention: Annotated[str, typer.Option(help="Retention ratios, comma-separated.")] = "0.25,0.1,0.05",
    seed: Annotated[int, typer.Option(help="Seed of the scenes.")] = 9001,
    questions: Annotated[int, typer.Option(help="Questions, about 24 a scene.", min=2)] = 2000,
    world: Annotated[str, typer.Option(help="A (trained on) or B (never trained on).")] = "A",
    model: Annotated[str, typer.Option(help="Folder of a testbed model, or 'testbed'.")] = "testbed",
    probes: Annotated[
        bool, typer.Option("--probes", help="Also give question-aware methods another question, and other budgets.")
    ] = False,
    earliest: Earliest = False,
    answers: Annotated[bool, typer.Option("--answers", help="Keep every single mark in the JSON file.")] = False,
    folder: Annotated[
        Path | None,
        typer.Option("--out", help="Folder of a run that can be stopped and gone on with.", show_default=False),
    ] = None,
    share: Share = None,
    threads: Threads = 0,
    report: Report = None,
    figures: Figures = None,
    json: Json = None,
) -> None:
    """Answer fresh questions of the testbed under every method; `full` and `random` are always there."""
    ratios = parse_retentions(retention)
    check_output(json)
    check_output(report, PAGE)
    check_world(world)
    mine = parse_share(share, folder is not None)
    set_threads(threads)
    from vidsieve.eval.methods import check_known, check_prefill, named_methods, rows_for
    from vidsieve.eval.testbed import MARKS, evaluate, run_config, write_run
    from vidsieve.pipeline import load_model
    from vidsieve.report.sections import evaluation_sections

    names = words(methods)
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
    kept = store_in(folder, lambda: run_config(network, rows, about), mine)
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
        lines.append((
            escape(named(row)), f"{row['retention']:g}", f"{row['layer_retention']:.4f}",
            f"{row['real_retention']:.4f}", with_error(f"{row['accuracy']:.3f}", row["stderr"]), versus,
            f"{row['select_ms']['median']:.1f}",
        ))  # fmt: skip
    for row in result["refused"]:
        lines.append((escape(named(row)), f"{row['retention']:g}", *"–––––"))
    columns = ("method", "retention", "of layers", "left", "accuracy ± s.e.", "− random, 95 %", "select ms")
    size = f"{result['n_questions']} questions on {result['n_scenes']} scenes"
    title = f"world {result['world']}, seed {result['seed']}: {size}"
    out.print(table(title, columns, lines, right=(1, 2, 3, 4, 5, 6)))
    note_few(result["n_scenes"])
    for row in result["refused"]:
        out.print(f"{named(row)}: {row['reason']}", markup=False, highlight=False)
