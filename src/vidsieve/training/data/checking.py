"""What a file of prompts holds and what of it can be used, found out before anything runs."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vidsieve.errors import VideoError
from vidsieve.training.data.layouts import layout_of
from vidsieve.training.data.rows import kind_of
from vidsieve.training.data.skipped import Skipped
from vidsieve.training.data.table import View, load_rows
from vidsieve.video.reading import read_image, read_video


@dataclass(frozen=True)
class Checked:
    """What was found in a file.

    Parameters
    ----------
    layout, title : str
        The layout's name, and what it is called.
    rows, usable : int
        Rows that are well formed, and those whose videos can be read, too.
    videos : int
        Different videos and images that rows show; which are missing or broken is in `Skipped`.
    seconds : float
        How long the readable videos are together.
    groups : list of dict
        By source and kind: rows and usable ones.
    example : dict or None
        The first usable row.
    """

    layout: str
    title: str
    rows: int
    usable: int
    videos: int
    seconds: float
    groups: list[dict[str, Any]]
    example: dict[str, Any] | None


def check_file(
    path: Path,
    root: Path | None = None,
    *,
    frames: int = 16,
    decode: bool = True,
    threads: int = 2,
    skipped: Skipped | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Checked:
    """Read a file of prompts and every video that it names, as training would.

    Parameters
    ----------
    path, root : Path
        As `read_records`.
    frames : int
        Frames read from each video: a broken one may show only where they lie.
    decode : bool
        False: look only whether the videos are there.
    threads : int
        Videos read at a time.
    skipped : Skipped, optional
        Told of everything that cannot be used.
    progress : callable, optional
        Called with (videos read, videos in all).

    Raises
    ------
    TrainingError
        If the file is unreadable, of no known layout, or holds nothing that can be used.
    """
    skipped = Skipped() if skipped is None else skipped
    view = load_rows(path, root, skipped=skipped)
    table = view.table
    good = np.isin(np.arange(len(table)), view.numbers)
    seconds, bad, videos = 0.0, [], sum(1 for _ in table.files())
    if decode:
        there, readable = _there(view), videos - skipped.videos["missing"]
        for done, ((key, name, shown, video), (length, fault)) in enumerate(_probed(there, frames, threads), 1):
            seconds += length
            if fault:
                bad.append(key)
                skipped.broken(name, shown, fault, file=path, video=video)
            if progress is not None:
                progress(done, readable)
    good &= np.isin(np.arange(len(table)), table.without(bad))
    rows, usable = Counter[tuple[str, str]](), Counter[tuple[str, str]]()
    example = None
    for row, fine in zip(table, good.tolist(), strict=True):
        group = str(row.get("source", "")), kind_of(row)
        rows[group] += 1
        usable[group] += fine
        example = row if example is None and fine else example
    groups = [
        {"source": source, "kind": kind, "rows": count, "usable": usable[source, kind]}
        for (source, kind), count in sorted(rows.items())
    ]
    layout = layout_of(path)
    return Checked(layout.name, layout.title, len(table), int(good.sum()), videos, seconds, groups, example)


Shown = tuple[int, str, int, bool]


def _there(view: View) -> Iterator[Shown]:
    """Yield the files that rows of a view show: key, path, rows, whether it is a video."""
    keys, rows = view.table.keys()
    there = set(keys[np.isin(rows, view.numbers)].tolist())
    return (shown for shown in view.table.files() if shown[0] in there)


def _probed(files: Iterable[Shown], frames: int, threads: int) -> Iterator[tuple[Shown, tuple[float, str]]]:
    """Yield files with their length in seconds and what is wrong with them, a few read ahead, in order."""
    with ThreadPoolExecutor(threads, "vidsieve-check") as pool:
        coming: deque[tuple[Shown, Future[tuple[float, str]]]] = deque()
        for shown in files:
            coming.append((shown, pool.submit(_probe, shown[1], shown[3], frames)))
            if len(coming) >= 4 * threads:
                head, future = coming.popleft()
                yield head, future.result()
        for head, future in coming:
            yield head, future.result()


def _probe(name: str, video: bool, frames: int) -> tuple[float, str]:
    """Return how long a file is, and what is wrong with it, an empty text if nothing is."""
    try:
        if video:
            return read_video(name, frames=frames).duration, ""
        read_image(name)
    except VideoError as error:
        return 0.0, str(error)
    return 0.0, ""
