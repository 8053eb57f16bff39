"""LVBench: ``video_info.meta.jsonl``, one video a line, and its videos by key or number."""

from __future__ import annotations

import os
import re
from pathlib import Path

from vidsieve.errors import EvaluationError
from vidsieve.evaluation.benchmarks._layout import Fields, Videos, one_file, one_folder, read_lines, rows_of
from vidsieve.evaluation.items import Benchmark, Item, checked
from vidsieve.options import LETTERS

_OPTION = re.compile(r"^\(([A-Z])\)\s*(.*)$", re.MULTILINE)


def read(folder: Path) -> list[Item]:
    """Return the questions of a folder of zai-org/LVBench.

    Videos are ``all_videos/<key>.mp4``, ``videos/<key>.mp4`` or, as its scripts fetch them, numbered in the order of
    the file: ``scripts/videos/00000/00000000.mp4``.

    Raises
    ------
    EvaluationError
    """
    path = one_file(folder, "video_info.meta.jsonl", "data/video_info.meta.jsonl")
    named = Videos(one_folder(folder, "all_videos", "videos"))
    numbered = Videos(folder / "scripts" / "videos" / "00000")
    items = []
    for place, row in enumerate(rows_of(path, read_lines(path))):
        video = named.find(row.text("key"))
        counted = numbered.find(f"{place:08}")
        video = counted if not os.path.isfile(video) and os.path.isfile(counted) else video
        for number, entry in enumerate(row.get("qa", list), 1):
            items.append(_item(Fields(entry, f"question {number} in {row.where}"), video, row.text("type")))
    return checked(items, path)


def _item(row: Fields, video: Path, kind: str) -> Item:
    text = row.text("question")
    found = _OPTION.findall(text)
    if len(found) < 2 or "".join(letter for letter, _ in found) != LETTERS[: len(found)]:
        raise EvaluationError(f"question of {row.where} lists no options (A), (B), … one a line")
    question = text[: text.index(f"({LETTERS[0]})")].strip()
    labels = row.get("question_type", list)
    if not all(isinstance(label, str) for label in labels):
        raise EvaluationError(f"question_type of {row.where} is {labels}, must be texts")
    options = tuple(option.strip() for _, option in found)
    groups = {"question": tuple(labels), "video": (kind,)}
    return Item(row.text("uid"), video, question, options, row.text("answer"), groups, bracketed=True)


LVBENCH = Benchmark(
    "lvbench",
    "LVBench",
    "Wang et al., ICCV 2025, arXiv 2406.08035",
    read,
    1549,
    103,
    "Answer the question with the option letter",
)
