"""What became of which rows, a group a line, on the disk before the next group is begun.

The first line holds the settings. When the outputs are written it is all that stays, with what they are.
"""

from __future__ import annotations

import fcntl
import json
import os
from array import array
from collections.abc import Iterator, Mapping, Sequence
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import Any

from vidsieve.errors import OutputError
from vidsieve.io.files import append, writing
from vidsieve.serving.batching.rows import BatchError, Outcome, line_of


class BatchJournal:
    """The journal of a run; entered as a context manager it is this process's alone.

    Parameters
    ----------
    path : Path
    settings : dict
        What answers depend on, as values for JSON. A journal that holds rows under others is refused.
    groups : int
        How many groups of rows there are.

    Attributes
    ----------
    answered, failed : int
        Rows in it.
    fault : str
        The reason of the first failure in it.
    finished : dict or None
        What was written at the end of a run that is through.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any], groups: int) -> None:
        self.path, self.settings, self._groups = path, json.loads(json.dumps(settings)), groups
        self._forget()

    def _forget(self) -> None:
        self.answered = self.failed = 0
        self.fault = ""
        self.finished: dict[str, Any] | None = None
        self._places = array("Q", bytes(8 * self._groups))
        self._end = 0

    def __enter__(self) -> BatchJournal:
        self._file = self._open()
        try:
            self._read()
            self._file.truncate(self._end)  # drops what a kill cut short
            if not self._end:
                self._append(line_of({"batch": 1, "settings": self.settings}))
        except BaseException:
            self._file.close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._file.close()

    def __len__(self) -> int:
        return self.answered + self.failed

    def __contains__(self, group: int) -> bool:
        return self._places[group] > 0

    def pending(self) -> Iterator[int]:
        """Yield the groups that are not in it."""
        return (group for group in range(self._groups) if group not in self)

    def add(self, group: int, outcomes: Sequence[Outcome]) -> None:
        """Append what became of a group, if it is not there; it is on the disk when this returns.

        Raises
        ------
        OutputError
            If it cannot be written.
        """
        if group in self:  # a worker that died may have handed it over before
            return
        place = self._end
        self._append(line_of({"group": group, "rows": outcomes}))
        self._note(group, outcomes, place)

    def outcomes(self) -> Iterator[Outcome]:
        """Yield what became of every row, in their order."""
        with self.path.open("rb") as file:
            for place in self._places:
                file.seek(place)
                yield from json.loads(file.readline())["rows"]

    def finish(self, written: Mapping[str, Any]) -> None:
        """Leave nothing but the settings and what was written.

        Raises
        ------
        OutputError
        """
        with writing(self.path) as temporary:
            temporary.write_bytes(line_of({"batch": 1, "settings": self.settings, "finished": written}))

    def discard(self) -> None:
        """Remove it."""
        self.path.unlink(missing_ok=True)

    def _open(self) -> FileIO:
        while True:
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                file = self.path.open("ab", buffering=0)  # nothing waits in memory to be written at a later moment
            except OSError as error:
                raise OutputError(f"cannot write {self.path}: {error.strerror}") from None
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.path.samestat(os.fstat(file.fileno()), os.stat(self.path)):
                    return file
            except FileNotFoundError:
                pass
            except OSError:
                file.close()
                raise BatchError(
                    f"another process is writing {self.path}: wait for it, or name another output"
                ) from None
            file.close()  # a process that was through has put another in its place

    def _read(self) -> None:
        with self.path.open("rb") as file:
            if not self._same(file.readline(), file.readline()):
                return
            file.seek(0)
            for number, line in enumerate(file, 1):
                if not line.endswith(b"\n"):
                    break
                try:
                    if number > 1:
                        event = json.loads(line)
                        self._note(event["group"], event["rows"], self._end)
                except (ValueError, KeyError, TypeError, IndexError):
                    raise BatchError(
                        f"line {number} of {self.path} is damaged: remove that line, and its rows are asked again"
                    ) from None
                self._end += len(line)

    def _same(self, first: bytes, second: bytes) -> bool:
        """Return whether to go on from a journal, by its first two lines; where nothing is settled it is begun anew.

        Raises
        ------
        BatchError
            If it is of another run, or none.
        """
        if not first.endswith(b"\n"):
            return False
        try:
            head = json.loads(first)
            known, self.finished = head["settings"], head.get("finished")
            changed = [name for name in {**known, **self.settings} if known.get(name) != self.settings.get(name)]
        except (ValueError, KeyError, TypeError, AttributeError):
            raise BatchError(
                f"{self.path} is no journal of `vidsieve batch`: name another output, or move it away"
            ) from None
        if changed and (self.finished or second.endswith(b"\n")):
            said = "; ".join(
                f"{name}: {json.dumps(known.get(name))} there, {json.dumps(self.settings.get(name))} now"
                for name in changed
            )
            raise BatchError(f"{self.path} is of another run ({said}): {_ADVICE}")
        return not changed

    def _append(self, line: bytes) -> None:
        append(self._file, line, self.path)
        self._end += len(line)

    def _note(self, group: int, outcomes: Sequence[Outcome], place: int) -> None:
        if group in self:
            raise ValueError(group)  # the same rows twice: no run writes that
        self._places[group] = place
        for answered, row in outcomes:
            self.answered += answered
            self.failed += not answered
            self.fault = self.fault or ("" if answered else str(row["reason"]))


_ADVICE = "name another output, or remove that file and the outputs beside it"
