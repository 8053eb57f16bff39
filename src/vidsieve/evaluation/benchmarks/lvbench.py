"""LVBench: ``video_info.meta.jsonl``, one video a line, and its videos by key or number."""

from __future__ import annotations

import os
import re
from pathlib import Path

import msgspec

from vidsieve.errors import EvaluationError
from vidsieve.evaluation.benchmarks._layout import Text, Videos, one_file, one_folder, rows_of
from vidsieve.evaluation.items import Benchmark, Item, checked
from vidsieve.options import LETTERS

_OPTION = re.compile(r"^\(([A-Z])\)\s*(.*)$", re.MULTILINE)


class LVBenchQuestion(msgspec.Struct):
    """A question, with its options in its text."""

    uid: Text
    question: Text
    answer: Text
    question_type: tuple[str, ...]


class LVBenchVideo(msgspec.Struct):
    """A video with its questions."""

    key: Text
    type: Text
    qa: list[LVBenchQuestion]


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
    for place, row in enumerate(rows_of(path, LVBenchVideo)):
        video = named.find(row.key)
        counted = numbered.find(f"{place:08}")
        video = counted if not os.path.isfile(video) and os.path.isfile(counted) else video
        items += [_item(question, video, row.type) for question in row.qa]
    return checked(items, path)


def _item(row: LVBenchQuestion, video: Path, kind: str) -> Item:
    lettered = _OPTION.findall(row.question)
    if len(lettered) < 2 or "".join(letter for letter, _ in lettered) != LETTERS[: len(lettered)]:
        raise EvaluationError(f"question {row.uid!r} lists no options (A), (B), … one a line")
    question = row.question[: row.question.index(f"({LETTERS[0]})")].strip()
    options = tuple(option.strip() for _, option in lettered)
    groups = {"question": row.question_type, "video": (kind,)}
    return Item(row.uid, video, question, options, row.answer, groups, bracketed=True)


LVBENCH = Benchmark(
    "lvbench",
    "LVBench",
    "Wang et al., ICCV 2025, arXiv 2406.08035",
    read,
    1549,
    103,
    "Answer the question with the option letter",
)
