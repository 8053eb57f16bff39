"""LongVideoBench, validation: ``lvb_val.json`` and ``videos/``, without subtitles."""

from __future__ import annotations

from pathlib import Path

import msgspec

from vidsieve.errors import EvaluationError
from vidsieve.evaluation.benchmarks._layout import Options, Text, Videos, one_file, rows_of
from vidsieve.evaluation.items import Benchmark, Item, checked
from vidsieve.options import LETTERS

_DURATIONS = {15: "8–15 s", 60: "15–60 s", 600: "180–600 s", 3600: "900–3600 s"}


class LongVideoBenchRow(msgspec.Struct):
    """A question."""

    id: Text
    video_path: Text
    question: Text
    candidates: Options
    correct_choice: int
    duration_group: int
    question_category: Text


def read(folder: Path) -> list[Item]:
    """Return the questions of a folder of longvideobench/LongVideoBench.

    Raises
    ------
    EvaluationError
    """
    path = one_file(folder, "lvb_val.json")
    videos, items = Videos(folder / "videos"), []
    for row in rows_of(path, LongVideoBenchRow):
        if not 0 <= row.correct_choice < len(row.candidates):
            count = len(row.candidates)
            raise EvaluationError(f"correct_choice of {row.id!r} is {row.correct_choice}, with {count} candidates")
        duration = _DURATIONS.get(row.duration_group, f"{row.duration_group} s")
        groups = {"duration": (duration,), "question": (row.question_category,)}
        letter = LETTERS[row.correct_choice]
        items.append(Item(row.id, videos.find(row.video_path), row.question, row.candidates, letter, groups))
    return checked(items, path)


LONGVIDEOBENCH = Benchmark(
    "longvideobench",
    "LongVideoBench (validation, without subtitles)",
    "Wu et al., NeurIPS 2024, arXiv 2407.15754",
    read,
    1337,
    753,
)
