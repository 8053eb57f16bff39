"""Pages of finished runs, from the files in their folders."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from vidsieve.errors import EvaluationError, VidsieveError
from vidsieve.evaluation.accuracy import accuracy_table
from vidsieve.evaluation.table import named
from vidsieve.evaluation.tasks.questions import frames_of
from vidsieve.evaluation.tasks.timing import timing_table
from vidsieve.io.bounded import read_json
from vidsieve.io.journal import records_in
from vidsieve.report.page import Kept, Section
from vidsieve.report.sections import frames_section, result_sections, training_sections
from vidsieve.types import TokenGrid


def run_page(folder: Path, videos: int = 0) -> tuple[str, list[Section]]:
    """Return the title and the sections of the page of a finished run of ``eval``, ``bench`` or ``train``.

    Parameters
    ----------
    videos : int
        Number of videos to show with their kept tokens, of a run with ``--indices``.

    Raises
    ------
    EvaluationError
        If there is no finished run, its result is damaged, or it has no kept indices.
    VideoError
        If a video is no longer there.
    """
    if os.path.isfile(folder / "metrics.jsonl"):
        return "Training", training_sections(folder / "metrics.jsonl")
    path = folder / "result.json"
    if not os.path.isfile(path):
        raise EvaluationError(
            f"{folder} has no finished run: a page is made of result.json or metrics.jsonl; of a paper's table, by "
            "`python -m workbench reproduce … --report`"
        )
    advice = "give the command of the run again"
    result = read_json(path, EvaluationError, advice, dict)
    try:
        if "benchmark" in result or "n_questions" in result:
            table = accuracy_table(result)
        elif result.get("task") == "timing":
            table = timing_table(result)
        else:
            raise EvaluationError(f"{folder} is no run of `eval`, `bench` or `train`: {advice} with --report")
        return table.title, [*result_sections(table), *(_kept_sections(folder, result, videos) if videos else [])]
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, OverflowError) as error:
        if isinstance(error, VidsieveError):
            raise
        raise EvaluationError(f"{path} is damaged ({type(error).__name__}: {error!s:.200}): {advice}") from None


def _kept_sections(folder: Path, result: dict[str, Any], videos: int) -> list[Section]:
    """Return frames of a run's first `videos` videos, with the tokens kept for the first question of each."""
    if "benchmark" not in result:
        raise EvaluationError(
            f"{folder} is a run of the testbed, which keeps no indices: see `vidsieve ask … --report`"
        )
    settings = result["settings"]
    if not settings["indices_kept"]:
        raise EvaluationError(
            f"{folder} has no kept indices: run its command again with --indices, into another folder"
        )
    records = {unit: record for unit, record in records_in(folder).items() if record["samples"]}
    conditions = settings["conditions"]
    most = max(condition["frames"] for condition in conditions.values())
    sections = []
    for unit, record in sorted(records.items())[:videos]:
        item = record["samples"][0]["item"]
        samples = [s for s in record["samples"] if s["item"] == item and s["indices"]]
        shown = [(conditions[s["condition"]], s) for s in samples if conditions[s["condition"]]["frames"] == most]
        if not shown:
            continue
        kept = [Kept(f"{named(row)}, {row['retention']}", sample["indices"][0]) for row, sample in shown]
        grid, video = TokenGrid(*shown[0][1]["grid"]), frames_of(unit, most, settings["fps"])
        sections.append(frames_section(video, grid, kept, f"{Path(unit).name}, question {item}"))
    return sections
