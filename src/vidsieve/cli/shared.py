"""Parts that commands share: options, early checks of output paths, running a task, writing files."""

from __future__ import annotations

import json
import math
import os
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console, ConsoleOptions, RenderableType
from rich.markup import escape
from rich.segment import Segment

from vidsieve.errors import (
    EvaluationError,
    ModelError,
    OutputError,
    PromptError,
    RetentionError,
    UnknownNameError,
    VidsieveError,
)
from vidsieve.io.files import locked, writing
from vidsieve.io.limits import limits
from vidsieve.io.texts import printable
from vidsieve.retention import parse_frames

if TYPE_CHECKING:
    from rich.table import Table as RichTable

    from vidsieve.compressors.base import Compressor
    from vidsieve.evaluation.conditions import Condition
    from vidsieve.evaluation.experiment import Task
    from vidsieve.evaluation.table import Table
    from vidsieve.report.page import Section
    from vidsieve.types import TokenGrid
    from vidsieve.video.reading import Video


class PlainConsole(Console):
    """A console whose texts cannot command the terminal: they may come from files and servers of strangers."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Yield the segments of something to print, each text `printable`."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(printable(segment.text), segment.style)


# Files and pipes have no width of their own; rich would cut tables at 80.
out = PlainConsole(width=None if sys.stdout.isatty() else 120)
err = PlainConsole(stderr=True)


def _json_place(path: Path | None) -> Path | None:
    """Print for people on stderr where the JSON goes to stdout."""
    out.stderr, out.quiet = path == STDOUT, path == STDOUT and err.quiet
    return path


STDOUT = Path("-")
Json = Annotated[
    Path | None,
    typer.Option(
        "--json",
        help="Write the result as JSON to this file; '-': to stdout, and the text to stderr.",
        show_default=False,
        callback=_json_place,
    ),
]
Share = Annotated[
    str | None,
    typer.Option("--share", help="2/4: shard 2 of 4 processes; torchrun's ranks by default.", show_default=False),
]
Report = Annotated[
    Path | None, typer.Option("--report", help="Write a self-contained HTML report.", show_default=False)
]
Figures = Annotated[
    Path | None,
    typer.Option("--figures", help="Write the report's charts as PNG and SVG into this folder.", show_default=False),
]
Threads = Annotated[int, typer.Option("--threads", help="CPU threads; 0 = torch's default.", min=0)]
MODEL = "Folder or hub id of a model of a supported family; 'testbed': a toy for its own scenes."
Model = Annotated[str | None, typer.Option("--model", help=MODEL, show_default=False)]
DTYPES = ("float32", "bfloat16", "float16")


def known_dtype(value: str | None) -> str | None:
    """Return the value of an option ``--dtype``.

    Raises
    ------
    UnknownNameError
    """
    if value is not None and value not in DTYPES:
        raise UnknownNameError("dtype", value, DTYPES)
    return value


def device_option(panel: str | None = None) -> Any:
    """Return the option ``--device``, in a panel of the help."""
    about = "Where the model runs: cpu, cuda, cuda:1; auto: a GPU if there is one."
    return typer.Option("--device", help=about, rich_help_panel=panel)


def dtype_option(panel: str | None = None, default: str = "as in the model's files") -> Any:
    """Return the option ``--dtype``, in a panel of the help."""
    about = f"Number type of the model: {', '.join(DTYPES)}."
    return typer.Option("--dtype", help=about, show_default=default, callback=known_dtype, rich_help_panel=panel)


Device = Annotated[str, device_option()]
Dtype = Annotated[str | None, dtype_option()]
Frames = Annotated[
    str | None,
    typer.Option(
        "--frames",
        help="Frames taken evenly; with --fps at most this many; 'auto[:FILE]': by `calibrate --tokens`.",
        show_default="16",
    ),
]


def positive(param: typer.CallbackParam, value: float | None) -> float | None:
    """Return an option's value if it is a finite number above 0, or None where it was not given.

    Raises
    ------
    EvaluationError
    """
    if value is not None and not (math.isfinite(value) and value > 0):
        raise EvaluationError(f"{param.opts[0]} must be a finite number above 0, got {value:g}")
    return value


def set_limit(param: typer.CallbackParam, value: int) -> int:
    """Set the limit that an option ``--max-NAME`` is of, for this process."""
    setattr(limits, str(param.name).removeprefix("max_"), value)
    return value


MaxRow = Annotated[
    int,
    typer.Option(
        "--max-row", help="Longest row of a file, in bytes; longer ones are bad rows.", min=1, callback=set_limit
    ),
]
MaxPixels = Annotated[
    int,
    typer.Option("--max-pixels", help="Most frames × height × width read from a video.", min=1, callback=set_limit),
]
Fps = Annotated[float | None, typer.Option("--fps", help="Frames per second.", show_default=False, callback=positive)]


def layout_option(panel: str | None = None) -> Any:
    """Return the option ``--layout``, in a panel of the help."""
    about = "Token layout; use 'grid' for LLaVA-Video checkpoints."
    return typer.Option("--layout", help=about, show_default=False, rich_help_panel=panel)


Layout = Annotated[str | None, layout_option()]
Positions = Annotated[
    str | None,
    typer.Option(
        "--positions",
        help="'compact': counted over the kept tokens, for videos longer than in training.",
        show_default=False,
    ),
]
Earliest = Annotated[
    bool,
    typer.Option("--earliest", help="Move methods inside the LLM to earlier layers if the retention needs it."),
]


def retention_option(default: str | bool = True) -> Any:
    """Return the option ``--retention``; `default` is shown where the command sets it itself."""
    about = "Fraction of video tokens kept, or a count such as 512t."
    return typer.Option("--retention", help=about, show_default=default)


Retention = Annotated[str, retention_option()]
TokensKept = Annotated[
    int | None,
    typer.Option(
        "--tokens", help="Video tokens kept, in place of --retention: 512 is 512t.", min=1, show_default=False
    ),
]
Seed = Annotated[int, typer.Option("--seed", help="Random seed.")]
NewTokens = Annotated[int, typer.Option("--max-new-tokens", help="Longest answer in tokens.", min=1)]


PAGE, MOVIE, PICTURES = (".html", ".htm"), (".mp4",), (".png", ".svg", ".pdf", ".jpg", ".jpeg")
"""Endings of the files that commands write."""


def gone_error(name: str, now: str = "python -m workbench {name}") -> VidsieveError:
    """Return the error that says what to run instead of a command, in a checkout."""
    return VidsieveError(f"{name} is not in the package any more: run `{now.format(name=name)}` in a checkout")


def moved(
    app: typer.Typer, name: str, now: str = "python -m workbench {name}", error: VidsieveError | None = None
) -> None:
    """Give an app a command that says what to run instead: `now` in a checkout, unless there is an `error`."""

    def gone() -> None:
        raise error or gone_error(name, now)

    anything = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}
    app.command(name, hidden=True, context_settings=anything)(gone)


def check_output(path: Path | None, kinds: Sequence[str] = (), reads: Sequence[Path | None] = ()) -> None:
    """Refuse an output file that could not be written, before any work is done.

    Parameters
    ----------
    kinds : endings that its name may have; none: any
    reads : files that the command reads, which it must not replace

    Raises
    ------
    OutputError
    """
    if path is None or (path == STDOUT and not kinds):
        return
    if any(other is not None and os.path.exists(other) and path.resolve() == other.resolve() for other in reads):
        raise OutputError(f"{path} would overwrite the file that is read: name another one")
    if kinds and path.suffix.lower() not in kinds:
        raise OutputError(f"cannot write {path}: its name must end in {' or '.join(kinds)}")
    if os.path.isdir(path):
        raise OutputError(f"cannot write {path}: it is a folder; name a file")
    folder = path.parent
    while not os.path.exists(folder) and folder != folder.parent:
        folder = folder.parent
    if not os.path.isdir(folder):
        raise OutputError(f"cannot write {path}: {folder} is a file; choose another path")
    try:
        tempfile.TemporaryFile(dir=folder).close()  # permissions do not tell of /proc, or of a disk mounted for reading
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror} in {folder}; choose another path") from None


def check_free(path: Path) -> None:
    """Refuse an output that another process is writing, before any work is done.

    Raises
    ------
    OutputError
    """
    if os.path.isdir(path.parent):
        with locked(path):
            pass


@contextmanager
def stoppable(kept: Path | None) -> Iterator[None]:
    """On Ctrl-C, print where the results so far are kept, and end the command with exit code 130."""
    try:
        yield
    except KeyboardInterrupt:
        results = f"the results so far are in {kept}: the same command resumes"
        err.print(f"stopped; {results if kept is not None else 'nothing is kept without --out'}", soft_wrap=True)
        raise typer.Exit(130) from None


def run_task(
    task: Task,
    conditions: Sequence[Condition],
    units: str,
    *,
    folder: Path | None = None,
    share: tuple[int, int] = (0, 1),
    report: Path | None = None,
    lead: str = "",
    json: Path | None = None,
) -> Table:
    """Measure a task behind a progress bar, print its table, write its page and its JSON, and return it.

    The command ends here while other shards are unfinished.

    Parameters
    ----------
    units : str
        Name of the units, for the bar.
    lead : str
        First line of the page.
    """
    from vidsieve.cli.progress import Bar
    from vidsieve.evaluation.experiment import run

    with stoppable(folder), Bar(units, len(task.units())) as advance:
        table = run(task, conditions, folder, share=share, command=command_line(), progress=advance)
    if table is None:
        out.print(f"shard finished; the table is written to {folder} once all shards are done")
        raise typer.Exit
    print_table(table)
    if folder is not None:
        out.print(f"written: {folder}")
    if report is not None:
        from vidsieve.report.runs import run_page
        from vidsieve.report.sections import result_sections

        with_answers = None if "benchmark" not in table.result else folder
        sections = result_sections(table) if with_answers is None else run_page(with_answers)[1]
        write_report(report, table.title, lambda: sections, lead)
    write_json(json, table.to_json())
    return table


def print_table(table: Table) -> None:
    """Print a table with its notes."""
    out.print(table.to_rich())
    for note in table.notes:
        out.print(note, markup=False, highlight=False)


def write_pictures(
    video: Video,
    grid: TokenGrid,
    kept: Mapping[str, Sequence[int]],
    title: str,
    picture: Path | None,
    overlay: Path | None,
) -> None:
    """Write what methods keep of a video as a picture, as a video, or both, where these are given."""
    from vidsieve.report.pictures import kept_picture, overlay_video

    if picture is not None:
        kept_picture(picture, video.pixels, grid, kept, title=title)
        out.print(f"picture: {picture}")
    if overlay is not None:
        overlay_video(overlay, video.pixels, video.duration, grid, kept)
        out.print(f"overlay: {overlay}")


def write_json(path: Path | None, value: Any) -> None:
    """Write `value` to `path`, if one was given, or to stdout for ``-``; NaN and infinities become null."""
    if path is None:
        return
    from vidsieve.evaluation.table import finite

    text = json.dumps(finite(value), indent=2, allow_nan=False) + "\n"
    if path == STDOUT:
        sys.stdout.write(text)
        return
    with writing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_report(
    path: Path | None, title: str, sections: Callable[[], list[Section]], lead: str = "", figures: Path | None = None
) -> None:
    """Write a page of what `sections` returns to `path`, and its charts into `figures`, where these are given."""
    if path is None and figures is None:
        return
    from vidsieve.evaluation.experiment import versions
    from vidsieve.io.machine import machine
    from vidsieve.report.page import write_page
    from vidsieve.report.pictures import save

    parts = sections()
    if path is not None:
        here = machine()
        about = {"written": time.strftime("%Y-%m-%d %H:%M %Z"), "on": here["gpu"] or here["processor"], **versions()}
        write_page(path, title, parts, lead=lead, command=command_line(), about=about)
        out.print(f"report: {path}")
    if figures is not None:
        drawn = [part for part in parts if part.figure is not None]
        for part in drawn:
            name = "-".join("".join(c if c.isalnum() else " " for c in part.title.lower()).split())
            for kind in ("png", "svg"):
                save(part.figure, figures / f"{name}.{kind}")
        out.print(f"figures: {len(drawn)} in {figures}" if drawn else "figures: none, as this report holds no chart")


def command_line() -> str:
    """Return the command as it was given, without the share that this process has of it."""
    given, kept = sys.argv[1:], []
    while given:
        word = given.pop(0)
        if word == "--share":
            del given[:1]
        elif not word.startswith("--share="):
            kept.append(word)
    return shlex.join(["vidsieve", *kept])


def check_question(question: str) -> None:
    """Refuse an empty question.

    Raises
    ------
    PromptError
    """
    if not question.strip():
        raise PromptError("the question is empty: write what you want to know")


def budget_asked(retention: str | None, tokens: int | None) -> str | None:
    """Return the retention asked for as a text, be it as a number of tokens.

    Raises
    ------
    EvaluationError
        If both were given.
    """
    if tokens is None:
        return retention
    if retention is not None:
        raise EvaluationError(f"--tokens {tokens} and --retention {retention} are two budgets: leave one of them out")
    return f"{tokens}t"


def named_model(model: str | None) -> str:
    """Return the model of ``--model``, which has no default for videos and questions of one's own.

    Raises
    ------
    ModelError
    """
    if model is None:
        raise ModelError(
            "which model? Give --model: a folder, a hub id as OWNER/NAME, or 'testbed', a toy that knows only the "
            "scenes of `vidsieve testbed render`"
        )
    return model


def load_model(
    name: str, layout: str | None = None, dtype: Any = None, device: str = "auto", positions: str | None = None
) -> tuple[Any, Any]:
    """Return `loading.load_model` of the arguments, and say on stderr that it takes its time."""
    from vidsieve import loading

    loading.check_model(name)
    if not err.is_terminal and not loading.is_testbed(name):
        err.print(f"loading {name}", markup=False, highlight=False, soft_wrap=True)
    with err.status(f"loading {escape(name)}"):  # nothing where there is no terminal
        return loading.load_model(name, layout, dtype, device, positions)


def frames_asked(frames: str | None, fps: float | None) -> dict[str, Any] | None:
    """Return what `answering.read` takes; None where a rule decides.

    By default these are 16 frames; with a rate, `frames` is the most.
    """
    count = None if frames is None else parse_frames(frames)
    if count is not None and not isinstance(count, int):
        return None
    if fps is None:
        return {"frames": 16 if count is None else count, "fps": None, "max_frames": None}
    return {"frames": None, "fps": fps, "max_frames": count}


def frames_by_rule(frames: str, fps: float | None, methods: Sequence[Compressor]) -> dict[str, Any]:
    """Return what `answering.read` takes where the rule of the one method decides, and print how many frames it reads.

    Raises
    ------
    RetentionError
        If there is no rule, not exactly one method, or a rate too.
    """
    rule = parse_frames(frames)
    assert not isinstance(rule, int)
    if len(methods) != 1:
        raise RetentionError(f"--frames {frames} is for one method that keeps --tokens: name one with --method")
    if fps is not None:
        raise RetentionError(f"--frames {frames} chooses the frames: leave --fps out")
    from vidsieve.compressors.calibrated import frames_for

    count = frames_for(methods[0], rule)
    out.print(
        f"frames: {count}, by the rule of {methods[0].describe()}; the vision encoder's cost grows with them",
        markup=False,
        soft_wrap=True,
    )
    return {"frames": count, "fps": None, "max_frames": None}


def parse_share(text: str | None, in_folder: bool = True) -> tuple[int, int]:
    """Return this process's shard, counted from 0, and the number of shards: from ``2/4``, or torchrun's environment.

    Raises
    ------
    EvaluationError
    """
    if text is None:
        return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    first, slash, second = text.partition("/")
    if not (slash and first.isdigit() and second.isdigit() and 1 <= int(first) <= int(second)):
        raise EvaluationError(f"--share is the number of a process and how many there are, as 2/4; got {text!r}")
    if not in_folder:  # nothing could put the shares together
        raise EvaluationError("--share is of a run in a folder that all processes write to: give --out FOLDER too")
    return int(first) - 1, int(second)


def words(text: str) -> list[str]:
    """Return the parts of a comma-separated list."""
    return [word.strip() for word in text.split(",") if word.strip()]


def set_threads(count: int) -> None:
    """Limit torch's CPU threads."""
    if count:
        import torch

        torch.set_num_threads(count)


def quiet() -> None:
    """Keep transformers' progress bars and notes out of a command's output."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()


def table(title: str, columns: Iterable[str], rows: Iterable[Iterable[Any]], right: Iterable[int] = ()) -> RichTable:
    """Return a table for the terminal; `right` are the numbers of the columns set flush right."""
    from rich.table import Table as RichTable

    shown = RichTable(title=title, title_justify="left", header_style="bold")
    flush = set(right)
    for number, name in enumerate(columns):
        shown.add_column(name, justify="right" if number in flush else "left")
    for row in rows:
        shown.add_row(*(str(value) for value in row))
    return shown
