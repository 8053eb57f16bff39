"""The console script."""

from __future__ import annotations

import io
import sys
from typing import Annotated, Any

import typer
from rich.markup import escape

from vidsieve import registry
from vidsieve._version import __version__
from vidsieve.cli import ask as ask_command
from vidsieve.cli import batch as batch_command
from vidsieve.cli import bench, data, evaluate, testbed, train
from vidsieve.cli import calibrate as calibrate_command
from vidsieve.cli import demo as demo_command
from vidsieve.cli import doctor as doctor_command
from vidsieve.cli import plan as plan_command
from vidsieve.cli import report as report_command
from vidsieve.cli import serve as serve_command
from vidsieve.cli import stream as stream_command
from vidsieve.cli import ui as ui_command
from vidsieve.cli.shared import Json, check_output, err, moved, out, table, write_json
from vidsieve.errors import PluginError, VidsieveError
from vidsieve.io import faults

app = typer.Typer(
    name="vidsieve",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Make video language models fast: keep the video tokens that an answer depends on.",
)


def _debug(value: bool) -> None:
    faults.debug = value


def _version(value: bool) -> None:
    if value:
        out.print(f"vidsieve {__version__}")
        raise typer.Exit


@app.callback()
def root(
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
app.command("stream")(stream_command.stream)
app.command("report")(report_command.report)
app.add_typer(train.app, name="train")
app.command("eval")(evaluate.evaluate)
app.command("calibrate")(calibrate_command.calibrate)
app.command("bench", context_settings=bench.EXTRA)(bench.bench)
app.add_typer(data.app, name="data")
app.add_typer(testbed.app, name="testbed")
app.command("batch")(batch_command.batch)
app.command("plan")(plan_command.plan)
app.command("doctor")(doctor_command.doctor)
app.command("ui")(ui_command.ui)
app.command("serve", context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(serve_command.serve)


COMPARED = "compare is part of `ask` now: run `vidsieve ask VIDEO QUESTION --methods a,b,c`, with the same options"
moved(app, "compare", error=VidsieveError(COMPARED))
moved(app, "reproduce")
moved(app, "oracles", "pytest tests/oracles --oracles DIR")


def method_rows() -> list[dict[str, Any]]:
    """Return the properties of every registered method."""
    from vidsieve.types import READS_QUESTION

    rows = []
    for name in registry.compressors:
        try:
            method = registry.compressors.get(name)
        except PluginError as error:
            err.print(f"note: {escape(str(error))}")
            continue
        rows.append(
            {
                "name": name,
                "stage": method.stage.value,
                "question": bool(READS_QUESTION & method.needs),
                "trained": method.trained,
                "variants": list(method.variants),
                "paper": method.paper,
            }
        )
    return rows


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    question, trained = ("yes" if row[name] else "–" for name in ("question", "trained"))
    return row["name"], row["stage"], question, trained, ", ".join(row["variants"]), row["paper"]


def method_markdown() -> str:
    """Return the method table of docs/methods/README.md, without its links."""
    lines = ["| method | acts | reads the question | trained | variants | paper |", "|---|---|---|---|---|---|"]
    for name, *cells in map(_cells, method_rows()):
        lines.append(f"| {' | '.join([f'`{name}`', *cells])} |")
    return "\n".join(lines)


@app.command("list")
def list_methods(
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the table in Markdown.")] = False,
    json: Json = None,
) -> None:
    """List the methods and model families."""
    check_output(json)
    rows = method_rows()
    if markdown:
        print(method_markdown())
    else:
        columns = ("method", "acts", "question", "trained", "variants", "paper")
        out.print(table("methods", columns, map(_cells, rows)))
        out.print(f"model families: {', '.join(registry.families)}")
    write_json(json, {"methods": rows, "families": registry.families.names()})


def main(app: typer.Typer = app) -> None:
    """Run a command line; a `VidsieveError` ends it with its text and exit code 2, without a traceback.

    Exit code 1: some part of the command failed, such as one method among several, or an error was not expected; its
    traceback is shown with ``--debug``.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # of a terminal whose encoding lacks a character
    try:
        app()
    except SystemExit as end:
        sys.exit(1 if faults.seen and not end.code else end.code)
    except VidsieveError as error:
        if faults.debug:
            raise
        # A name in the text may hold newlines, and could write lines of its own.
        err.print(f"[bold red]error:[/] {escape(' '.join(str(error).splitlines()))}", soft_wrap=True)
        sys.exit(2)
    except KeyboardInterrupt:
        err.print("interrupted")
        sys.exit(130)
    except BrokenPipeError:
        sys.exit(1)
    except Exception as error:
        if faults.debug:
            raise
        err.print(f"[bold red]error:[/] {escape(faults.described(error))}", soft_wrap=True)
        sys.exit(1)
