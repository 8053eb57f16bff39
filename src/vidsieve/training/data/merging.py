"""One file of prompts out of several, whatever their layouts: all usable rows, or some drawn by a seed."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from vidsieve.errors import TrainingError
from vidsieve.io.files import writing
from vidsieve.training.data.layouts import moved
from vidsieve.training.data.rows import kind_of
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
    """Write the rows of several files that can be used, as JSON lines with paths from `out`; return how many of each.

    Rows keep the order of the files; still images are left out, `pseudo_file` is for those.

    Parameters
    ----------
    sources : sequence of (file, root)
        As `read_records` takes them.
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

    def wanted(row: Mapping[str, Any]) -> str:
        kind = kind_of(row)
        if kind == "image":
            return "a still image: `vidsieve data pseudo` makes pseudo-videos of them"
        if only != "all" and (kind == "caption") != (only == "captions"):
            return "a caption" if kind == "caption" else "a question"
        return ""

    views = [
        load_rows(path, root, wanted=wanted, skipped=skipped, empty=True, progress=progress) for path, root in sources
    ]
    ends = np.cumsum([len(view) for view in views])
    total = int(ends[-1])
    if not total:
        raise TrainingError(f"none of these files has a row that can be used: {skipped.summary()}")
    if count is not None and not 1 <= count <= total:
        raise TrainingError(f"count must be from 1 to the {total} rows that there are, got {count}")
    taken = np.arange(total)
    if count is not None:
        taken = np.sort(np.random.default_rng(seed).choice(total, count, replace=False))
    found = Counter({str(path): 0 for path, _ in sources})
    with writing(out) as temporary, temporary.open("w", encoding="utf-8") as file:
        for place in taken.tolist():
            which = int(np.searchsorted(ends, place, side="right"))
            row = views[which][place - int(ends[which])]
            found[str(sources[which][0])] += 1
            file.write(json.dumps({**row, **moved(row, out)}, ensure_ascii=False) + "\n")
    return dict(found)
