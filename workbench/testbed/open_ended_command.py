"""python -m workbench open: what pruning costs beyond one word of four."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from vidsieve.cli.progress import Bar
from vidsieve.cli.shared import (
    PAGE,
    Earliest,
    Json,
    Report,
    Share,
    Threads,
    check_output,
    check_world,
    command_line,
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
from vidsieve.loading import load_model
from vidsieve.retention import parse_retentions

TALKER = Path(__file__).with_name("talker")
"""The testbed's model, taught to count and to say what is not there."""


def eval_open(
    methods: Annotated[str, typer.Option(help="Names, name:variant, policy folders, or 'all'.")] = "all",
    retention: Annotated[str, typer.Option(help="Retention ratios, comma-separated.")] = "0.25,0.1",
    seed: Annotated[int, typer.Option(help="Seed of the scenes.")] = 9001,
    scenes: Annotated[int, typer.Option(help="Scenes, some 35 questions and a caption each.", min=2)] = 60,
    world: Annotated[str, typer.Option(help="A (trained on) or B (never trained on).")] = "A",
    model: Annotated[str, typer.Option(help="'talker', or the folder of one built anew.")] = "talker",
    earliest: Earliest = False,
    folder: Annotated[
        Path | None,
        typer.Option("--out", help="Folder of a run that can be stopped and gone on with.", show_default=False),
    ] = None,
    share: Share = None,
    threads: Threads = 0,
    report: Report = None,
    json: Json = None,
) -> None:
    """Beyond multiple choice, on the testbed: captions, counting, order, what is not there, a second turn."""
    ratios = parse_retentions(retention)
    check_output(json)
    check_output(report, PAGE)
    check_world(world)
    mine = parse_share(share, folder is not None)
    set_threads(threads)
    from vidsieve.adapters.fingerprint import model_digest
    from vidsieve.evaluation.measuring import conditions_of
    from vidsieve.evaluation.methods import check_known, check_prefill, named_methods
    from vidsieve.evaluation.runs import RESULT, policy_digest, versions
    from vidsieve.testbed.world import FRAMES
    from workbench.testbed.open_ended import evaluate_open
    from workbench.testbed.open_report import open_sections

    names = words(methods)
    for name in names:
        check_known(name)
    if "all" not in names and "random" not in names:
        names = ["random", *names]
    quiet()
    found = named_methods(names, earliest=earliest, prefill=True)
    check_prefill(found)
    network, processor = load_model(str(TALKER) if model == "talker" else model)
    network = network.float()
    by_key = {condition.key: condition for condition in conditions_of([FRAMES], found, ratios)}
    about = {"task": "open", "world": world, "seed": seed, "scenes": scenes, "model": model}
    kept = store_in(
        folder,
        lambda: {
            **about,
            "model_digest": model_digest(network),
            "versions": versions(),
            "conditions": {key: policy_digest(c.compressor) if c.compressor else "" for key, c in by_key.items()},
        },
        mine,
    )
    with stoppable(folder), kept as store, Bar("scenes", scenes) as advance:
        result = evaluate_open(
            network, processor, by_key, world=world, seed=seed, scenes=scenes, progress=advance, store=store
        )
    if result["scenes"] < scenes:
        out.print(f"this share is done; the table is made when the others are, in {folder}")
        return
    result = {"command": command_line(), "versions": versions(), **result}
    print_open(result)
    if folder is not None:
        write_json(folder / RESULT, result)
        out.print(f"written: {folder}")
    write_report(report, "Beyond multiple choice", lambda: open_sections(result), model)
    write_json(json, result)


def print_open(result: dict[str, Any]) -> None:
    """Print what every condition is worth at every task."""
    from vidsieve.report.sections import named
    from workbench.testbed.open_ended import TASKS

    lines = []
    for row in result["rows"]:
        shown = (row["tasks"][task] for task in TASKS)
        cells = [with_error(f"{100 * t['mean']:.1f}", 100 * t["stderr"], 1) if t["asked"] else "–" for t in shown]
        lines.append((escape(named(row)), row["retention"], *cells))
    for row in result["refused"]:
        lines.append((escape(named(row)), row["retention"], *("–" for _ in TASKS)))
    title = f"world {result['world']}, seed {result['seed']}: {result['scenes']} scenes, % ± s.e."
    out.print(table(title, ("method", "kept", *TASKS), lines, right=range(1, 2 + len(TASKS))))
    note_few(result["scenes"])
    for name, said in TASKS.items():
        out.print(f"{name}: {said}", highlight=False)
    for row in result["refused"]:
        out.print(f"{named(row)}: {row['reason']}", markup=False, highlight=False)
