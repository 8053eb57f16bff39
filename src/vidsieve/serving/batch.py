"""Answer the questions of a file of JSON lines into another one, resumable after a kill at any moment.

Each group of rows is on the disk, in the journal, before the next one is answered; the outputs are written from the
journal at the end, in the input's order. `vidsieve.serving.ray_batch` answers the groups on workers of Ray Data.
"""

from __future__ import annotations

import os
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vidsieve.errors import OutputError
from vidsieve.io.files import beside, writing
from vidsieve.io.journal import Journal
from vidsieve.io.texts import json_line
from vidsieve.serving.batch_groups import BatchError, BatchSettings, Outcome, Outcomes, Rows, answer_groups

MAX_INITIAL_FAILURES = 50
"""A run ends if none of its first rows, this many, can be answered."""


@dataclass(frozen=True)
class BatchReport:
    """The state of a run at its end.

    `answered` and `failed` rows count all runs so far, `before` those done before this one. `stopped`: rows are left.
    `written`: this run wrote the outputs. Neither: the run had finished before.
    """

    rows: int
    answered: int
    failed: int
    before: int
    stopped: bool = False
    written: bool = False


def side_files(target: Path) -> tuple[Path, Path]:
    """Return the paths of failed rows and of the journal of a run with this output."""
    return beside(target, "failed.jsonl"), beside(target, "journal.jsonl")


class DoneRows:
    """The outcomes in a journal, with the number of rows answered and failed and the reason of the first failure."""

    def __init__(self, journal: Journal, groups: int) -> None:
        self.journal, self.answered, self.failed, self.reason = journal, 0, 0, ""
        self._places = array("Q", bytes(8 * groups))  # of lines; 0, that of the header, for groups not done
        journal.load(self._note)

    def _note(self, entry: Mapping[str, Any], place: int) -> None:
        if self._places[entry["group"]]:
            raise ValueError("a group is there twice")
        for answered, row in entry["rows"]:
            self.answered += answered
            self.failed += not answered
            self.reason = self.reason or ("" if answered else str(row["reason"]))
        self._places[entry["group"]] = place

    def __len__(self) -> int:
        return self.answered + self.failed

    def pending(self) -> Iterator[int]:
        """Yield the groups that are not done."""
        return (group for group, place in enumerate(self._places) if not place)

    def add(self, group: int, outcomes: Sequence[Outcome]) -> None:
        """Append the outcomes of a group to the journal, unless they are there."""
        if not self._places[group]:  # a worker that died may have sent them before
            entry = {"group": group, "rows": outcomes}
            self._note(entry, self.journal.add(entry))

    def rows(self, answered: bool) -> Iterator[dict[str, Any]]:
        """Yield the answered rows or the failed ones, in the input's order."""
        return (row for entry in self.journal.read(self._places) for kind, row in entry["rows"] if kind is answered)


def answer_file(
    source: Path,
    target: Path,
    settings: BatchSettings,
    *,
    root: Path | None = None,
    readers: int = 2,
    answer: Callable[[Rows, Iterable[int], BatchSettings, int], Outcomes] = answer_groups,
    progress: Callable[[int, int], object] = lambda done, rows: None,
    stop: Callable[[], bool] = lambda: False,
) -> BatchReport:
    """Answer the questions of a file that have no answer yet; when all rows are done, write the outputs.

    Parameters
    ----------
    source, target : Path
        JSON lines. Other files of the run are beside the target, see `side_files`.
    root : Path, optional
        Folder that the paths of videos start from; default: that of the source.
    readers : int
        Decoding threads, of each worker. At most twice as many decoded videos wait.
    answer : callable
        As `answer_groups`, the default.
    progress : callable, optional
        Called with (rows done, rows) after every group.
    stop : callable
        Called after every group; True ends the run.

    Raises
    ------
    BatchError
        If the input cannot be read, the journal is of another run, none of the first rows or of all can be answered,
        or the device is out of memory or lost.
    ModelError, UnknownNameError, PolicyError, OutputError, …
        As `Answerer`.
    """
    confined = root is not None
    root = (source.parent if root is None else root).resolve()  # reasons that name a path are the same everywhere
    rows, (failed, path) = Rows(source, root, settings.batch, confined), side_files(target)
    inputs = {"input_digest": rows.digest, "rows": rows.count, "video_root": str(root)}
    header = {"batch": 1, "settings": inputs | settings.described()}
    for output in (target, failed):
        if os.path.exists(output) and not os.path.exists(path):
            raise OutputError(f"{output} exists, and no {path.name} says which run wrote it: name another output")
    with Journal(path, header, error=BatchError, damaged="its rows are answered again") as journal:
        if finished := (journal.header or {}).get("finished"):
            if not os.path.exists(target):
                raise OutputError(f"{target} is gone, and its run had finished: remove {path} to answer again")
            return BatchReport(rows.count, finished["answered"], finished["failed"], rows.count)
        done = DoneRows(journal, rows.groups)
        before, stopped = len(done), False
        if before < rows.count:
            with closing(answer(rows, done.pending(), settings, readers)) as answers:
                for group, outcomes in answers:
                    done.add(group, outcomes)
                    _check_first(done, rows.count)
                    progress(len(done), rows.count)
                    if stop():
                        stopped = len(done) < rows.count
                        break
        if not stopped:
            if len(done) < rows.count:
                raise BatchError(f"{rows.count - len(done)} rows have no outcome: run the same command again")
            rows.check()
            _check_first(done, rows.count)
            _write(target, failed, done)
            journal.replace(header | {"finished": {"answered": done.answered, "failed": done.failed}})
        return BatchReport(rows.count, done.answered, done.failed, before, stopped, not stopped)


def _check_first(done: DoneRows, rows: int) -> None:
    """Raise BatchError if none of the first rows, or of all, was answered, and remove the journal."""
    if len(done) >= min(MAX_INITIAL_FAILURES, rows) and not done.answered:
        done.journal.discard()
        first = "first " if len(done) < rows else ""
        raise BatchError(
            f"none of the {first}{len(done)} rows could be answered, the first because: {done.reason}; nothing is "
            "kept. Is --video-root the folder that the rows' paths start from?"
        )


def _write(target: Path, failed: Path, done: DoneRows) -> None:
    """Write the outputs; if the process is killed before the journal says so, the next run writes them again."""
    for path, answered in ((failed, False), (target, True)):
        if answered or done.failed:
            with writing(path) as temporary, temporary.open("wb") as file:
                for row in done.rows(answered):
                    file.write(json_line(row).encode())
