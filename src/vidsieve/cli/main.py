"""The console script."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from vidsieve import faults, registry
from vidsieve._version import __version__
from vidsieve.cli import ask as ask_command
from vidsieve.cli import batch as batch_command
from vidsieve.cli import bench, data, evaluate, testbed, train
from vidsieve.cli import compare as compare_command
from vidsieve.cli import demo as demo_command
from vidsieve.cli import doctor as doctor_command
from vidsieve.cli import plan as plan_command
from vidsieve.cli import report as report_command
from vidsieve.cli import reproduce as reproduce_command
from vidsieve.cli import serve as serve_command
from vidsieve.cli import ui as ui_command
from vidsieve.cli.shared import Json, check_output, err, out, table, write_json
from vidsieve.errors import PluginError, VidsieveError

app = typer.Typer(
    name="vidsieve", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
    help="Make video language models fast: keep the video tokens that an answer depends on.",
)  # fmt: skip


def _debug(value: bool) -> None:
    faults.debug = value


def _version(value: bool) -> None:
    if value:
        out.print(f"vidsieve {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", callback=_debug, is_eager=True, help="Show the traceback of unexpected errors.")
    ] = False,
) -> None:
    """Make video language models fast: keep the video tokens that an answer depends on."""


app.command("demo")(demo_command.demo)
app.command("ask")(ask_command.ask)
app.command("compare")(compare_command.compare)
app.command("report")(report_command.report)
app.command("reproduce")(reproduce_command.reproduce)
app.add_typer(train.app, name="train")
app.add_typer(evaluate.app, name="eval")
app.add_typer(bench.app, name="bench")
app.add_typer(data.app, name="data")
app.add_typer(testbed.app, name="testbed")
app.command("batch")(batch_command.batch)
app.command("plan")(plan_command.plan)
app.command("doctor")(doctor_command.doctor)
app.command("ui")(ui_command.ui)
app.command("serve", context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(serve_command.serve)


def method_rows() -> list[dict[str, Any]]:
    """Return what the method table says of every registered compressor."""
    from vidsieve.types import READS_QUESTION

    rows = []
    for name in registry.compressors:
        try:
            method = registry.compressors.get(name)
        except PluginError as error:
            err.print(f"note: {escape(str(error))}")
            continue
        rows.append({
            "name": name, "stage": method.stage.value, "question": bool(READS_QUESTION & method.needs),
            "trained": method.trained, "variants": list(method.variants), "paper": method.paper,
        })  # fmt: skip
    return rows


def method_markdown() -> str:
    """Return the method table as Markdown, as the README has it."""
    lines = ["| method | acts | reads the question | trained | variants | paper |", "|---|---|---|---|---|---|"]
    for row in method_rows():
        lines.append(
            f"| `{row['name']}` | {row['stage']} | {'yes' if row['question'] else '–'} | "
            f"{'yes' if row['trained'] else '–'} | {', '.join(row['variants'])} | {row['paper']} |"
        )
    return "\n".join(lines)


@app.command("list")
def list_methods(
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the table as the README has it.")] = False,
    json: Json = None,
) -> None:
    """List the methods and model families."""
    check_output(json)
    rows = method_rows()
    if markdown:
        print(method_markdown())
    else:
        words = ("method", "acts", "question", "trained", "variants", "paper")
        lines = [
            (r["name"], r["stage"], "yes" if r["question"] else "–", "yes" if r["trained"] else "–",
             ", ".join(r["variants"]), r["paper"])
            for r in rows
        ]  # fmt: skip
        out.print(table("methods", words, lines))
        out.print(f"model families: {', '.join(registry.families)}")
    write_json(json, {"methods": rows, "families": registry.families.names()})


@app.command()
def oracles(
    folder: Annotated[Path, typer.Argument(help="Folder of recorded cases, one <method>.npz each.")],
    json: Json = None,
) -> None:
    """Compare our methods with what the official implementations returned; exit 1 if a case fails."""
    from vidsieve.testing.oracles import run_folder

    check_output(json)
    cases = list(run_folder(folder))
    missing = "no such method yet"
    lines = [
        (f"{c.method}/{c.case}", c.compared, "–" if c.difference != c.difference else f"{c.difference:.1e}",
         c.status + (f" ({c.note})" if c.note else ""))
        for c in cases if c.status != missing
    ]  # fmt: skip
    without = Counter((c.method, c.note or missing) for c in cases if c.status == missing)
    lines += [(name, f"{count} case{'s' * (count > 1)}", "–", note) for (name, note), count in without.items()]
    out.print(table(f"{folder}", ("case", "compared", "largest difference", "verdict"), lines, right=(2,)))
    count = {s: sum(c.status == s for c in cases) for s in ("pass", "fail", "no such method yet")}
    out.print(", ".join(f"{n} {s}" for s, n in count.items()))
    write_json(json, {"cases": [vars(c) | {"difference": _plain(c.difference)} for c in cases], "count": count})
    if count["fail"]:
        raise typer.Exit(1)


def _plain(value: float) -> float | None:
    """Return a number that JSON knows: None for NaN, a huge one for infinity."""
    return None if value != value else min(value, 1e308)


def main() -> None:
    """Run the command line; errors on purpose end with their text and exit code 2, never with a traceback.

    Exit code 1: something ran that not all of went well, as a method among several that broke.
    """
    try:
        app()
    except SystemExit as end:
        sys.exit(1 if faults.seen and not end.code else end.code)
    except VidsieveError as error:
        if faults.debug:
            raise
        err.print(f"[bold red]error:[/] {escape(str(error))}", soft_wrap=True)
        sys.exit(2)
    except KeyboardInterrupt:
        err.print("interrupted")
        sys.exit(130)
    except BrokenPipeError:
        sys.exit(1)
