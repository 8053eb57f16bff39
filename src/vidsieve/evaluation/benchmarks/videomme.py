"""Video-MME: ``videomme/test-00000-of-00001.parquet`` and ``data/<videoID>.mp4``, without subtitles."""

from __future__ import annotations

from pathlib import Path

from vidsieve.evaluation.benchmarks._layout import Videos, one_file, read_parquet, rows_of, without_letter
from vidsieve.evaluation.items import Benchmark, Item, checked


def read(folder: Path) -> list[Item]:
    """Return the questions of a folder of lmms-lab/Video-MME.

    Raises
    ------
    EvaluationError
    """
    path = one_file(folder, "videomme/test-*.parquet", "test-*.parquet")
    videos, items = Videos(folder / "data"), []
    for row in rows_of(path, read_parquet(path)):
        options = tuple(without_letter(option, place) for place, option in enumerate(row.texts("options")))
        groups = {
            "duration": (row.text("duration"),),
            "domain": (row.text("domain"),),
            "task": (row.text("task_type"),),
        }
        items.append(
            Item(
                row.text("question_id"),
                videos.find(row.text("videoID")),
                row.text("question"),
                options,
                row.text("answer"),
                groups,
            )
        )
    return checked(items, path)


VIDEOMME = Benchmark(
    "videomme", "Video-MME (without subtitles)", "Fu et al., CVPR 2025, arXiv 2405.21075", read, 2700, 900
)
