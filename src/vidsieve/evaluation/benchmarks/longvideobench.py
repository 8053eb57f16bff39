"""LongVideoBench, validation: ``lvb_val.json`` and ``videos/``, without subtitles."""

from __future__ import annotations

from pathlib import Path

from vidsieve.errors import EvaluationError
from vidsieve.evaluation.benchmarks._layout import Videos, one_file, read_json, rows_of
from vidsieve.evaluation.items import Benchmark, Item, checked
from vidsieve.options import LETTERS

_DURATIONS = {15: "8–15 s", 60: "15–60 s", 600: "180–600 s", 3600: "900–3600 s"}


def read(folder: Path) -> list[Item]:
    """Return the questions of a folder of longvideobench/LongVideoBench.

    Raises
    ------
    EvaluationError
    """
    path = one_file(folder, "lvb_val.json")
    videos, items = Videos(folder / "videos"), []
    for row in rows_of(path, read_json(path)):
        options, right = row.texts("candidates"), row.get("correct_choice", int)
        if not 0 <= right < len(options):
            raise EvaluationError(f"correct_choice of {row.where} is {right}, with {len(options)} candidates")
        duration = row.get("duration_group", int)
        groups = {
            "duration": (_DURATIONS.get(duration, f"{duration} s"),),
            "question": (row.text("question_category"),),
        }
        items.append(
            Item(
                row.text("id"),
                videos.find(row.text("video_path")),
                row.text("question"),
                options,
                LETTERS[right],
                groups,
            )
        )
    return checked(items, path)


LONGVIDEOBENCH = Benchmark(
    "longvideobench",
    "LongVideoBench (validation, without subtitles)",
    "Wu et al., NeurIPS 2024, arXiv 2407.15754",
    read,
    1337,
    753,
)
