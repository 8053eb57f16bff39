"""vidsieve report: the page of a run that is finished."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vidsieve.cli.shared import PAGE, Figures, check_output, write_report

if TYPE_CHECKING:
    from vidsieve.report.page import Section


def report(
    folder: Annotated[Path, typer.Argument(help="Folder of a run of `eval` or `train`.")],
    page: Annotated[Path, typer.Argument(help="The page to write (HTML, one file).")],
    videos: Annotated[
        int, typer.Option(help="Also show kept tokens on the first so many videos, of a run with --indices.", min=0)
    ] = 0,
    figures: Figures = None,
) -> None:
    """Write the page of a finished run from its folder; nothing is measured again."""
    check_output(page, PAGE)
    title, sections = _of(folder, videos)
    write_report(page, title, lambda: sections, str(folder), figures)


def _of(folder: Path, videos: int) -> tuple[str, list[Section]]:
    """Return the title and the sections of the run in a folder."""
    from vidsieve.evaluation.accuracy import accuracy_table
    from vidsieve.report.runs import finished, kept_sections
    from vidsieve.report.sections import result_sections, training_sections

    if os.path.isfile(folder / "metrics.jsonl"):
        return "Training", training_sections(folder / "metrics.jsonl")
    result = finished(folder)
    kept = kept_sections(folder, result, videos) if videos else []
    return result.get("benchmark", "Accuracy on the testbed"), [*result_sections(accuracy_table(result)), *kept]
