"""`vidsieve report`: the page of a run that is finished."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vidsieve.cli import options, output
from vidsieve.io.files import locked


def report(
    folder: Annotated[Path, typer.Argument(help="Folder of a run of `eval`, `bench` or `train`.")],
    page: Annotated[Path, typer.Argument(help="The self-contained HTML report to write.")],
    videos: Annotated[
        int, typer.Option(help="Also show kept tokens on the first N videos, of a run with --indices.", min=0)
    ] = 0,
    figures: options.Figures = None,
) -> None:
    """Write the page of a finished run from its folder; nothing is measured again."""
    output.check_output(page, output.PAGE)
    from vidsieve.report.runs import run_page

    with locked(page):
        title, sections = run_page(folder, videos)
        output.write_report(page, title, lambda: sections, f"Run: {folder}", figures)
