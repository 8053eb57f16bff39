"""Video-MME: ``videomme/test-00000-of-00001.parquet`` and ``data/<videoID>.mp4``, without subtitles."""

from __future__ import annotations

from pathlib import Path

import msgspec

from vidsieve.evaluation.benchmarks._layout import Options, Text, Videos, one_file, rows_of, without_letter
from vidsieve.evaluation.items import Benchmark, Item, checked


class VideoMMERow(msgspec.Struct):
    """A question."""

    question_id: Text
    videoID: Text
    question: Text
    options: Options
    answer: Text
    duration: Text
    domain: Text
    task_type: Text


def read(folder: Path) -> list[Item]:
    """Return the questions of a folder of lmms-lab/Video-MME.

    Raises
    ------
    EvaluationError
    """
    path = one_file(folder, "videomme/test-*.parquet", "test-*.parquet")
    videos, items = Videos(folder / "data"), []
    for row in rows_of(path, VideoMMERow):
        options = tuple(without_letter(option, place) for place, option in enumerate(row.options))
        groups = {"duration": (row.duration,), "domain": (row.domain,), "task": (row.task_type,)}
        items.append(Item(row.question_id, videos.find(row.videoID), row.question, options, row.answer, groups))
    return checked(items, path)


VIDEOMME = Benchmark(
    "videomme", "Video-MME (without subtitles)", "Fu et al., CVPR 2025, arXiv 2405.21075", read, 2700, 900
)
