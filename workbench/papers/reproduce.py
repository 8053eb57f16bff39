"""python -m workbench reproduce: a table of either paper, published beside measured."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from vidsieve.cli import options, output, shared
from vidsieve.errors import EvaluationError, UnknownNameError
from vidsieve.evaluation.table import Table
from workbench.papers.bundles import bundled, read_bundle
from workbench.papers.paper_tables import PAPER_TABLES, PaperTable, paper_table
from workbench.papers.report import bundle_tables, missing_table
from workbench.papers.running import Part, evaluated, on_testbed, timed, trained


def reproduce(
    name: Annotated[
        str | None, typer.Argument(metavar="TABLE", help="cacovid:table1 … 5, score:table1 … 5.", show_default=False)
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(help="Folder with longvideobench, mlvu, mlvu-test, videomme and lvbench in it, as published."),
    ] = None,
    model: Annotated[
        list[str] | None,
        typer.Option("--model", help="MODEL=FOLDER, as qwen2.5-vl=…; default: the paper's, from the hub."),
    ] = None,
    policy: Annotated[
        list[str] | None, typer.Option("--policy", help="ROW=FOLDER or MODEL:ROW=FOLDER, for rows that are trained.")
    ] = None,
    only: Annotated[str, typer.Option(help="These rows only, comma-separated.")] = "",
    subset: Annotated[
        int | None, typer.Option(help="So many questions of each benchmark, drawn by the seed.", min=1)
    ] = None,
    testbed: Annotated[
        bool, typer.Option("--testbed", help="The whole table on the testbed: no download, minutes.")
    ] = False,
    plan: Annotated[bool, typer.Option("--plan", help="Only say what would run and what is missing.")] = False,
    check: Annotated[
        Path | None, typer.Option(help="Instead: check a result bundle, or all of a folder.", show_default=False)
    ] = None,
    folder: Annotated[
        Path | None, typer.Option("--out", help="Folder of the runs, to be gone on with.", show_default="in runs")
    ] = None,
    bundle: Annotated[
        Path | None, typer.Option(help="Result bundle to write.", show_default="bundle.json in that folder")
    ] = None,
    device: Annotated[str, typer.Option(help="A device of torch; 'auto': a GPU where there is one.")] = "auto",
    dtype: Annotated[str, typer.Option(help="Of timed models.")] = "float32",
    repeats: Annotated[int, typer.Option(help="Counted rounds of timed tables.", min=1)] = 3,
    seeds: Annotated[int, typer.Option(help="Training seeds of the testbed's trainings.", min=1)] = 2,
    seed: options.Seed = 0,
    threads: options.Threads = 0,
    report: options.Report = None,
) -> None:
    """Run what a table of either paper takes, and print published against measured, cell by cell."""
    if check is not None:
        _check(check)
        return
    if name is None:
        raise EvaluationError(f"which table? There are {', '.join(PAPER_TABLES)}")
    spec, folder = paper_table(name), folder or Path("runs/reproduce", name.replace(":", "-"))
    target = bundle or folder / "bundle.json"
    output.check_output(target)
    output.check_output(report, output.PAGE)
    models, policies = _pairs("--model", model), _pairs("--policy", policy)
    for known in models:
        if known not in spec.protocols:
            raise UnknownNameError("model of this table", known, spec.protocols)
    rows = _rows(name, spec, options.words(only))
    shared.set_threads(threads)
    shared.quiet()
    missing: list[str] = []
    settings: dict[str, Any] = {}
    cells: dict[Any, Any] = {}
    for family, protocol in spec.protocols.items():
        part = Part(name, spec, family, rows[family], folder / family, device, seed, plan, missing)
        if spec.kind == "time":
            cells |= timed(part, testbed, dtype, repeats)
        elif testbed and spec.kind == "training":
            cells |= trained(part, seeds)
        elif testbed:
            cells |= on_testbed(part, subset or 480)
        else:
            cells |= evaluated(part, data, models.get(family), policies, subset, protocol)
        settings |= {family: part.settings} if part.settings else {}
    for line in missing:
        output.err.print(f"missing: {line}", markup=False, highlight=False, soft_wrap=True)
    if plan:
        return
    if not any(cell.get("measured") is not None for cell in cells.values()):
        raise EvaluationError(f"nothing of {name} can be measured here: see what is missing above, or use --testbed")
    from vidsieve.evaluation.experiment import versions
    from vidsieve.io.machine import machine

    made = bundled(
        name,
        cells,
        testbed=testbed,
        command=output.command_line(),
        settings=settings,
        missing=missing,
        versions=versions(),
        machine=machine(),
    )
    for one in bundle_tables(made, measured_only=True):
        output.out.print(one.to_rich())
    if testbed and spec.kind == "accuracy":
        output.out.print(
            f"testbed: {subset or 480} questions of each world; “relative” is of world dense; trained rows are the "
            "policies that come with the package",
            soft_wrap=True,
        )
    output.write_json(target, made)
    read_bundle(target)
    output.out.print(f"written: {target}")
    from vidsieve.report.sections import table_section

    tables = [*bundle_tables(made), *missing_table(made)]
    output.write_report(report, f"{name}, published and measured", lambda: [table_section(one) for one in tables])


def _pairs(option: str, given: list[str] | None) -> dict[str, str]:
    found = {}
    for word in given or []:
        left, sign, right = word.partition("=")
        if not (left and sign and right):
            raise EvaluationError(f"{option} is a name and a folder, as NAME=FOLDER; got {word!r}")
        found[left] = right
    return found


def _rows(name: str, spec: PaperTable, only: list[str]) -> dict[str, list[tuple[str, list[float]]]]:
    from workbench.papers.reproducing import rows_of

    found = {family: rows_of(name, family) for family in spec.protocols}
    known = dict.fromkeys(row for rows in found.values() for row, _ in rows)
    for row in only:
        if row not in known:
            raise UnknownNameError("row", row, known)
    return {family: [(r, at) for r, at in rows if not only or r in only] for family, rows in found.items()}


def _check(path: Path) -> None:
    """Print what the bundles of a folder are, or one; the first unsound one is an error."""
    files = sorted(path.glob("*.json")) if os.path.isdir(path) else [path]
    if not files:
        raise EvaluationError(f"no bundles in {path}: they are files that end in .json")
    lines = []
    for file in files:
        made = read_bundle(file)
        told = sum(cell["measured"] is not None for cell in made["cells"])
        models = ", ".join(dict.fromkeys(cell["model"] for cell in made["cells"] if cell["measured"] is not None))
        where = "testbed" if made["testbed"] else models
        lines.append((file.name, made["table"], where, told, made["versions"].get("vidsieve", "–")))
    columns = ("file", "table", "of", "cells measured", "vidsieve")
    output.out.print(Table("sound result bundles", columns, lines, frozenset({0, 1, 2, 4})).to_rich())
