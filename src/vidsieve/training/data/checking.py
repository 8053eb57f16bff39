"""Check a file of prompts and its videos before anything runs."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vidsieve.errors import VideoError
from vidsieve.training.data.layouts import layout_of
from vidsieve.training.data.rows import kind_of
from vidsieve.training.data.skipped import Skipped
from vidsieve.training.data.table import ShownFile, load_rows
from vidsieve.video.reading import read_image, read_video


@dataclass(frozen=True)
class Checked:
    """The contents of a file.

    Parameters
    ----------
    layout, title : str
        The layout's name, and the usual name of the set.
    rows, usable : int
        Rows that are well formed, and those whose videos can be read, too.
    videos : int
        Different videos and images that rows show; the missing and broken ones are in `Skipped`.
    seconds : float
        Length of all readable videos together.
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
        False: only look for the videos, and read none of them.
    threads : int
        Videos read at a time.
    skipped : Skipped, optional
        Counts and lists everything that cannot be used.
    progress : callable, optional
        Called with (videos read, videos in all).

    Raises
    ------
    TrainingError
        If the file is unreadable, of no known layout, or holds nothing that can be used.
    """
    skipped = Skipped() if skipped is None else skipped
    view = load_rows(path, root, skipped=skipped)
    table, seconds, bad = view.table, 0.0, set[str]()
    if decode:
        present = dict.fromkeys(key for number in view.numbers for key in table.shown[number])
        files = [(key, table.files[key]) for key in table.files if key in present]
        for done, ((key, shown), (length, fault)) in enumerate(_probed(files, frames, threads), 1):
            seconds += length
            if fault:
                bad.add(key)
                what = f"broken {'video' if shown.is_video else 'image'}"
                skipped.add(what, shown.name, fault, file=path, rows=shown.rows)
            if progress is not None:
                progress(done, len(files))
    good = view.without(bad)
    rows, usable = (Counter((str(row.get("source", "")), kind_of(row)) for row in some) for some in (table, good))
    groups = [
        {"source": source, "kind": kind, "rows": count, "usable": usable[source, kind]}
        for (source, kind), count in sorted(rows.items())
    ]
    layout, example = layout_of(path), good[0] if len(good) else None
    return Checked(layout.name, layout.title, len(table), len(good), len(table.files), seconds, groups, example)


def _probed(
    files: Iterable[tuple[str, ShownFile]], frames: int, threads: int
) -> Iterator[tuple[tuple[str, ShownFile], tuple[float, str]]]:
    """Yield files with their length in seconds and their fault, in order, a few read ahead."""
    with ThreadPoolExecutor(threads, "vidsieve-check") as pool:
        coming: deque[tuple[tuple[str, ShownFile], Future[tuple[float, str]]]] = deque()
        for file in files:
            coming.append((file, pool.submit(_probe, file[1], frames)))
            if len(coming) >= 4 * threads:
                head, future = coming.popleft()
                yield head, future.result()
        for head, future in coming:
            yield head, future.result()


def _probe(shown: ShownFile, frames: int) -> tuple[float, str]:
    """Return the length of a file in seconds, 0 for an image, and its fault, empty without one."""
    try:
        if shown.is_video:
            return read_video(shown.name, frames=frames).duration, ""
        read_image(shown.name)
    except VideoError as error:
        return 0.0, str(error)
    return 0.0, ""
