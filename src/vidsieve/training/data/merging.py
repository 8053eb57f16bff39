"""One file of prompts out of several, whatever their layouts: all usable rows, or some drawn by a seed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from vidsieve.errors import TrainingError
from vidsieve.io.files import writing
from vidsieve.io.texts import json_line
from vidsieve.training.data.layouts import moved
from vidsieve.training.data.rows import unwanted
from vidsieve.training.data.skipped import Skipped
from vidsieve.training.data.table import load_rows

Only = Literal["all", "captions", "questions"]


def merge_files(
    sources: Sequence[tuple[Path, Path | None]],
    out: Path,
    *,
    only: Only = "all",
    count: int | None = None,
    seed: int = 0,
    skipped: Skipped | None = None,
    progress: Callable[[int], None] | None = None,
) -> dict[str, int]:
    """Write the usable rows of several files as JSON lines with paths from `out`; return their number by file.

    Rows keep the order of the files; still images are left out, `pseudo_file` is for those.

    Parameters
    ----------
    sources : sequence of (file, root)
        As `confined_records` takes them.
    only : {"all", "captions", "questions"}
    count : int, optional
        Rows in all, drawn evenly from all files' rows together; default: every row.
    seed : int
        The same files, count and seed give the same rows.
    progress : callable, optional
        Called with the number of records read of a file, now and then.

    Raises
    ------
    TrainingError
        If a file is unreadable, none has a row that can be used, or there are fewer than `count`.
    OutputError
        If `out` cannot be written.
    """
    skipped = Skipped() if skipped is None else skipped
    captions = None if only == "all" else only == "captions"
    views = [
        load_rows(
            path,
            root,
            wanted=lambda row: unwanted(row, captions),
            skipped=skipped,
            empty=True,
            answers=False,
            progress=progress,
        )
        for path, root in sources
    ]
    places = [(which, place) for which, view in enumerate(views) for place in range(len(view))]
    if not places:
        raise TrainingError(f"none of these files has a row that can be used: {skipped.summary()}")
    if count is not None and not 1 <= count <= len(places):
        raise TrainingError(f"count must be from 1 to the {len(places)} rows that there are, got {count}")
    if count is not None:
        drawn = np.random.default_rng(seed).choice(len(places), count, replace=False)
        places = [places[number] for number in sorted(drawn.tolist())]
    counts = Counter({str(path): 0 for path, _ in sources})
    with writing(out) as temporary, temporary.open("w", encoding="utf-8") as file:
        for which, place in places:
            row = views[which][place]
            counts[str(sources[which][0])] += 1
            file.write(json_line(row | moved(row, out)))
    return dict(counts)
