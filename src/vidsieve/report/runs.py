"""Pages of finished runs, from the files in their folders."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from vidsieve.errors import EvaluationError, VidsieveError
from vidsieve.evaluation.accuracy import accuracy_table
from vidsieve.evaluation.conditions import BASELINES
from vidsieve.evaluation.table import Table, named
from vidsieve.evaluation.tasks.questions import frames_of
from vidsieve.evaluation.tasks.timing import timing_table
from vidsieve.io.bounded import read_json
from vidsieve.io.journal import records_in
from vidsieve.report.page import Kept, Section
from vidsieve.report.sections import frames_section, result_sections, training_sections
from vidsieve.types import TokenGrid

ASKED = 20
"""Questions on the page of a run."""


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
        asked = _asked_sections(folder, result) if "benchmark" in result else []
        kept = _kept_sections(folder, result, videos) if videos else []
        return table.title, [*result_sections(table), *asked, *kept]
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, OverflowError) as error:
        if isinstance(error, VidsieveError):
            raise
        raise EvaluationError(f"{path} is damaged ({type(error).__name__}: {error!s:.200}): {advice}") from None


def _asked_sections(folder: Path, result: dict[str, Any]) -> list[Section]:
    """Return the first `ASKED` questions of a run with every method's answer; none of a run that kept no texts."""
    conditions, shown = result["settings"]["conditions"], dict[tuple[str, str], dict[str, dict[str, Any]]]()
    for unit, record in sorted(records_in(folder).items()):
        for sample in record["samples"]:
            shown.setdefault((Path(unit).name, sample["item"]), {})[sample["condition"]] = sample
        if len(shown) >= ASKED:
            break
    cells = []
    for (video, _), answers in list(shown.items())[:ASKED]:
        first = next(iter(answers.values()))
        if "question" not in first:  # of a release that did not keep them
            return []
        said = map(answers.get, conditions)
        marked = ("–" if one is None else f"{'✓' if one['score'] >= 1 else '✗'} {one['said']}" for one in said)
        cells.append((video, first["question"], first["answer"], *marked))
    if not cells:
        return []
    several = len({row["frames"] for row in conditions.values()}) > 1
    names = [_name(row) + (f", {row['frames']} frames" if several else "") for row in conditions.values()]
    columns = ("video", "question", "correct", *names)
    text = f"The first {len(cells)}; samples.jsonl has all." if len(cells) == ASKED else ""
    return [Section("Questions and answers", text, Table("", columns, cells, frozenset(range(len(columns)))))]


def _name(row: dict[str, Any]) -> str:
    return named(row) if row["method"] == "full" else f"{named(row)}, {row['retention']}"


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
        shown.sort(key=lambda row: row[0]["method"] in BASELINES)
        kept = [Kept(_name(row), sample["indices"][0]) for row, sample in shown]
        grid, video = TokenGrid(*shown[0][1]["grid"]), frames_of(unit, most, settings["fps"])
        asked = shown[0][1].get("question", item)
        answers = dict[str, list[str]]()
        for row, sample in shown:
            answers.setdefault(f"{'✓' if sample['score'] >= 1 else '✗'} {sample['said']}", []).append(_name(row))
        lines = [f"{answer}: {'; '.join(names)}" for answer, names in answers.items()]
        section = frames_section(video, grid, kept, f"{Path(unit).name}: {asked}")
        sections.append(replace(section, text="\n".join((f"Correct: {shown[0][1]['answer']}", *lines))))
    return sections
