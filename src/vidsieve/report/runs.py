"""Pages of finished runs: what they keep in their folders, and frames of the videos they were asked about."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from vidsieve.errors import EvaluationError
from vidsieve.evaluation.table import named
from vidsieve.evaluation.tasks.questions import frames_of
from vidsieve.report.page import Kept, Section
from vidsieve.report.sections import frames_section
from vidsieve.types import TokenGrid


def finished(folder: Path) -> dict[str, Any]:
    """Return the result of a finished run.

    Raises
    ------
    EvaluationError
        If there is none, or its file is damaged.
    """
    path = folder / "result.json"
    if not os.path.isfile(path):
        raise EvaluationError(
            f"{folder} has no finished run: a page is made of result.json or metrics.jsonl; of a paper's table, by "
            "`python -m workbench reproduce … --report`"
        )
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise EvaluationError(f"{path} is damaged ({error}): give the command of the run again") from None
    if "benchmark" not in found and "n_questions" not in found:
        raise EvaluationError(f"{folder} is no run of `eval` or `train`: give that command again with --report")
    return found


def kept_sections(folder: Path, result: dict[str, Any], videos: int) -> list[Section]:
    """Return frames of a run's first `videos` videos, with what every condition keeps for the first question of each.

    Raises
    ------
    EvaluationError
        If the run kept no indices; the text says which option keeps them.
    VideoError
        If a video is no longer there.
    """
    if "benchmark" not in result:
        raise EvaluationError(
            f"{folder} is a run of the testbed, which keeps no indices: see `vidsieve ask … --report`"
        )
    settings = result["settings"]
    if not settings["indices_kept"]:
        raise EvaluationError(
            f"{folder} has no kept indices: run its command again with --indices, into another folder"
        )
    conditions, fps = settings["conditions"], settings["fps"]
    most = max(condition["frames"] for condition in conditions.values())
    found = []
    for record in _units(folder)[:videos]:
        item = record["samples"][0]["item"]
        shown = [s for s in record["samples"] if s["item"] == item and s["indices"]]
        shown = [s for s in shown if conditions[s["condition"]]["frames"] == most]
        if not shown:
            continue
        path = Path(record["unit"])
        kept = [Kept(_name(conditions[s["condition"]]), s["indices"][0]) for s in shown]
        found.append(
            frames_section(
                frames_of(path, most, fps), TokenGrid(*shown[0]["grid"]), kept, f"{path.name}, question {item}"
            )
        )
    return found


def _units(folder: Path) -> list[dict[str, Any]]:
    """Return what was measured of every video that could be read, in the order of their names."""
    lines = [line for path in sorted(folder.glob("units-*.jsonl")) for line in path.read_text("utf-8").splitlines()]
    records = {record["unit"]: record for record in map(json.loads, lines) if record["samples"]}
    return [records[unit] for unit in sorted(records)]


def _name(condition: dict[str, Any]) -> str:
    return f"{named(condition)}, {condition['retention']}"
