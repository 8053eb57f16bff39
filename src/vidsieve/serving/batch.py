"""Questions about many videos, answered from one file of JSON lines into another.

Threads decode ahead of the model, a few videos at a time; what was answered is in a journal, group by group, so that
a run that was killed at any moment goes on without losing or doubling a row. The outputs are written from it at the
end, in the input's order. One machine does it, or Ray Data's workers (`batching.cluster`), by the same code.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vidsieve.errors import OutputError
from vidsieve.io.files import writing
from vidsieve.serving.batching.ahead import settle
from vidsieve.serving.batching.cluster import Cluster, on_cluster
from vidsieve.serving.batching.journal import BatchJournal
from vidsieve.serving.batching.model import Answerer
from vidsieve.serving.batching.rows import BatchError, Rows, Settled, line_of, numbered
from vidsieve.serving.batching.settings import BatchSettings

HOPELESS = 50
"""Rows without one answer after which a run ends: something is wrong with all of them."""


@dataclass(frozen=True)
class BatchReport:
    """What a run did.

    Parameters
    ----------
    rows, answered, failed : int
        In the input, and settled so far by all runs.
    before : int
        Settled before this run.
    stopped : bool
        Whether it was told to stop before all were.
    written : bool
        Whether the outputs were written by this run; neither stopped nor written: they were there.
    """

    rows: int
    answered: int
    failed: int
    before: int
    stopped: bool = False
    written: bool = False


@dataclass(frozen=True)
class Paths:
    """The files of a run: its output, and those beside it."""

    out: Path

    @property
    def failed(self) -> Path:
        """Rows without an answer, and why."""
        return self.out.with_suffix(".failed.jsonl")

    @property
    def journal(self) -> Path:
        """What is settled while the run goes on, and what was done after it."""
        return self.out.with_suffix(".journal.jsonl")


def answer_file(
    source: Path,
    target: Path,
    settings: BatchSettings,
    *,
    root: Path | None = None,
    readers: int = 2,
    cluster: Cluster | None = None,
    progress: Callable[[int, int], None] | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> BatchReport:
    """Answer the questions of a file that are not answered yet, and write all answers when there is none left.

    Parameters
    ----------
    source, target : Path
        JSON lines. Beside the target are its `Paths`.
    root : Path, optional
        Where the paths of videos start; default: the folder of the source.
    readers : int
        Decoding threads, of each worker. At most twice as many decoded videos wait, beside the one in hand.
    cluster : Cluster, optional
        Ray's workers to answer on; default: here.
    progress : callable, optional
        Called with (rows settled, rows) after every group.
    stop : callable
        Asked after every group whether to stop.

    Raises
    ------
    BatchError
        If the input cannot be read, the outputs are another run's, none of the first rows or of all can be answered,
        or the device is out of memory or lost.
    ModelError, UnknownNameError, PolicyError, OutputError, …
        As `Answerer`.
    """
    root = (source.parent if root is None else root).resolve()  # a reason that names a path is the same everywhere
    rows, paths = Rows(source, root, settings.batch), Paths(target)
    told = {"input_digest": rows.digest, "rows": rows.count, "video_root": str(root)}
    if not os.path.exists(paths.journal):
        _check_free(paths)
    with BatchJournal(paths.journal, told | settings.described(), rows.groups) as journal:
        if journal.finished is not None:
            return _done(paths, journal.finished, rows.count)
        before, stopped = len(journal), False
        if before < rows.count:
            settled = (
                on_cluster(cluster, rows, journal.pending(), settings, readers)
                if cluster is not None
                else here(rows, journal.pending(), settings, readers)
            )
            with closing(settled):
                for group, outcomes in settled:
                    journal.add(group, outcomes)
                    _check_hope(journal, rows.count)
                    if progress is not None:
                        progress(len(journal), rows.count)
                    if stop():
                        stopped = len(journal) < rows.count
                        break
        if not stopped:
            if len(journal) < rows.count:
                raise BatchError(f"{rows.count - len(journal)} rows are not settled: run the same command again")
            rows.check()
            _check_hope(journal, rows.count)
            _write(paths, journal)
        return BatchReport(rows.count, journal.answered, journal.failed, before, stopped, not stopped)


def here(rows: Rows, groups: Iterable[int], settings: BatchSettings, readers: int) -> Settled:
    """Yield what becomes of the rows of some groups, answered in this process; the model is loaded for the first."""
    yield from settle(numbered(rows, groups), Answerer(settings), settings.read, readers)


def _check_free(paths: Paths) -> None:
    """Refuse outputs of which no journal says what they are.

    Raises
    ------
    OutputError
    """
    for path in (paths.out, paths.failed):
        if os.path.exists(path):
            raise OutputError(f"{path} is there, and no {paths.journal.name} says of what: name another output")


def _check_hope(journal: BatchJournal, rows: int) -> None:
    """End a run that answers nothing of its first rows, or of all, and leave nothing of it.

    Raises
    ------
    BatchError
    """
    if len(journal) >= min(HOPELESS, rows) and not journal.answered:
        journal.discard()
        first = "first " if len(journal) < rows else ""
        raise BatchError(
            f"none of the {first}{len(journal)} rows could be answered, the first because: {journal.fault}; nothing is "
            "kept. Is --video-root the folder that the rows' paths start from?"
        )


def _write(paths: Paths, journal: BatchJournal) -> None:
    """Write the outputs, then what they are into the journal; killed in between, the next run writes them again."""
    written: dict[str, Any] = {"answered": journal.answered, "failed": journal.failed, "digests": {}}
    for path, kind in ((paths.failed, False), (paths.out, True)):
        if kind or journal.failed:
            lines = (line_of(row) for answered, row in journal.outcomes() if answered is kind)
            written["digests"][path.name] = _written(path, lines)
    journal.finish(written)


def _written(path: Path, lines: Iterable[bytes]) -> str:
    """Write lines to a file and return their digest."""
    found = hashlib.blake2b(digest_size=16)
    with writing(path) as temporary, temporary.open("wb") as file:
        for line in lines:
            file.write(line)
            found.update(line)
        file.flush()
        os.fsync(file.fileno())
    return found.hexdigest()


def _done(paths: Paths, finished: dict[str, Any], rows: int) -> BatchReport:
    """Return the report of a run that was through before.

    Raises
    ------
    OutputError
        If its outputs are not there any more.
    """
    for path in (paths.out, paths.failed):
        wanted = finished["digests"].get(path.name)
        if wanted is not None and not (os.path.exists(path) and _digest(path) == wanted):
            raise OutputError(
                f"{path} is not what the finished run wrote: remove {paths.journal} and the outputs to answer anew"
            )
    return BatchReport(rows, finished["answered"], finished["failed"], rows)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def as_dict(report: BatchReport, paths: Paths, settings: BatchSettings) -> dict[str, Any]:
    """Return a report as plain values for JSON."""
    files = {"out": str(paths.out), "failed_rows": str(paths.failed) if report.failed else None}
    return asdict(report) | files | {"settings": settings.described()}
