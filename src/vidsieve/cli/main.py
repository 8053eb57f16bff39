"""The console script."""

from __future__ import annotations

import inspect
import io
import re
import sys
import warnings
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
from vidsieve.cli.options import Json
from vidsieve.cli.output import check_output, err, note, out, table, write_json
from vidsieve.errors import PluginError, VidsieveError
from vidsieve.io import faults

app = typer.Typer(
    name="vidsieve",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
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
    quiet: Annotated[bool, typer.Option("--quiet", help="Print results and errors, no notes and no progress.")] = False,
) -> None:
    """Make video language models fast: keep the video tokens that an answer depends on."""
    out.stderr, out.quiet, err.quiet = False, False, quiet


app.command("demo")(demo_command.demo)
app.command("ask")(ask_command.ask)
app.command("stream")(stream_command.stream)
app.command("report")(report_command.report)
app.add_typer(train.app, name="train")
app.command("eval")(evaluate.evaluate)
app.command("calibrate")(calibrate_command.calibrate)
app.command("bench")(bench.bench)
app.add_typer(data.app, name="data")
app.add_typer(testbed.app, name="testbed")
app.command("batch")(batch_command.batch)
app.command("plan")(plan_command.plan)
app.command("doctor")(doctor_command.doctor)
app.command("ui")(ui_command.ui)
app.command("serve", context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(serve_command.serve)


def method_rows() -> list[dict[str, Any]]:
    """Return the properties of every registered method."""
    from vidsieve.types import READS_QUESTION

    rows = []
    for name in registry.compressors:
        try:
            method = registry.compressors.get(name)
        except PluginError as error:
            note(error)
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


def front_rows() -> list[dict[str, Any]]:
    """Return the properties of every registered front, which acts before or inside the vision encoder."""
    fronts = {name: registry.fronts.get(name) for name in registry.fronts}
    return [
        {"name": name, "stage": front.stage.value, "about": (inspect.getdoc(front) or "").partition("\n")[0]}
        for name, front in fronts.items()
    ]


def family_title(name: str) -> str:
    """Return a registered family's name as its authors write it: "Qwen2_5_VLForConditional…" is "Qwen2.5-VL"."""
    model, _, layout = name.partition(":")
    title = re.sub(r"(?<=\d)_(?=\d)", ".", model.removesuffix("ForConditionalGeneration")).strip("_").replace("_", "-")
    title = re.sub(r"(?<=\d)(?=VL)", "-", title)
    return f"{title} ({layout})" if layout else title


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
    """List the methods, fronts and model families."""
    check_output(json)
    rows = method_rows()
    if markdown:
        out.print(method_markdown(), markup=False, highlight=False, soft_wrap=True)
    else:
        fronts = [tuple(row.values()) for row in front_rows()]
        columns = ("method", "acts", "question", "trained", "variants", "paper")
        out.print(table("methods", columns, map(_cells, rows)))
        out.print(table("fronts: alone, or before a method as FRONT+METHOD", ("front", "acts", "what it does"), fronts))
        out.print(f"model families: {', '.join(map(family_title, registry.families))}", highlight=False)
    write_json(json, {"methods": rows, "fronts": front_rows(), "families": registry.families.names()})


UsageError: Any = typer.BadParameter.__base__
"""click's, of which typer has a copy of its own."""


def usage_text(error: Any) -> str:
    """Return an error of the option parser in one line, with what to run next."""
    text, context = " ".join(error.format_message().split()).rstrip("."), error.ctx
    if context is None:
        return text
    option, root = getattr(error, "option_name", None), context.find_root()
    if option is not None and context is root:
        command = next((word for word in sys.argv[1:] if word in context.command.commands), "COMMAND")
        return f"{text}: options of a command stand after it, as in `{root.info_name} {command} {option} …`"
    if any(option in param.opts for param in root.command.params):
        return f"{text}: it stands before the command, as in `{root.info_name} {option} {context.info_name} …`"
    return f"{text}{'' if text.endswith('?') else ';'} see `{context.command_path} --help`"


def print_error(text: str) -> None:
    """Print an error in one line, whatever the names in it hold."""
    err.quiet = False
    err.print(f"[bold red]error:[/] {escape(' '.join(text.splitlines()))}", soft_wrap=True, highlight=False)


def _note(message: Warning | str, *_: Any) -> None:
    """Print a warning as commands print their notes, without the line of code that it comes from."""
    note(message)


def main(app: typer.Typer = app) -> None:
    """Run a command line, and end with its exit code.

    0: done. 1: part of it failed, such as one method among several or rows of a batch, or an error was not expected;
    its traceback is shown with ``--debug``. 2: a `VidsieveError`, or a mistake in the command, printed in one line.
    130: interrupted.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # of a terminal whose encoding lacks a character
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _note  # type: ignore[assignment]
            code = app(prog_name=app.info.name, standalone_mode=False)
        sys.exit(code or int(faults.seen))
    except UsageError as error:
        if type(error).__name__ == "NoArgsIsHelpError":
            error.show()
        else:
            print_error(usage_text(error))
        sys.exit(2)
    except VidsieveError as error:
        if faults.debug:
            raise
        print_error(str(error))
        sys.exit(2)
    except (KeyboardInterrupt, typer.Abort):
        err.print("interrupted")
        sys.exit(130)
    except BrokenPipeError:
        sys.exit(1)
    except Exception as error:
        if faults.debug:
            raise
        print_error(faults.described(error))
        sys.exit(1)
