"""What commands print and write: consoles, tables, JSON, pages, and early checks of output paths."""

from __future__ import annotations

import json
import os
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment

from vidsieve.errors import OutputError
from vidsieve.io.files import locked, writing
from vidsieve.io.texts import printable

if TYPE_CHECKING:
    from rich.table import Table as RichTable

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
STDOUT = Path("-")
PAGE, MOVIE, PICTURES = (".html", ".htm"), (".mp4",), (".png", ".svg", ".pdf", ".jpg", ".jpeg")
"""Endings of the files that commands write."""


def note(text: object) -> None:
    """Print a note for people on stderr, whatever the names in it hold."""
    err.print(f"note: {text}", markup=False, highlight=False, soft_wrap=True)


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
    from vidsieve.report.pictures import kept_figure, overlay_video, save

    if picture is not None:
        save(kept_figure(video.pixels, grid, kept, title), picture, dpi=110)
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
    program = Path(sys.argv[0])
    module = f"python -m {program.parent.name} " if program.name == "__main__.py" else "vidsieve "
    return module + shlex.join(kept)


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
