"""Records and videos that cannot be used: counted by reason, and listed one a line in a file.

Missing or broken videos never end a run, and are always reported.
"""

from __future__ import annotations

import os
import threading
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from vidsieve.errors import OutputError, TrainingError
from vidsieve.io.bounded import lines, opened, parsed
from vidsieve.io.limits import limits
from vidsieve.io.texts import json_line


class Skipped:
    """Faults of records and videos, counted and listed. Any thread may add.

    Parameters
    ----------
    path : Path, optional
        File of JSON lines ``{"what", "where", "reason", "rows", "file"}``, one for each fault, written at once;
        default: none. Faults that it lists already are not listed again.
    lists : bool
        True if this process lists the faults of reading; of several processes that read the same, one does. Videos that
        prove broken later are listed by the process that meets them.

    Attributes
    ----------
    faults : Counter
        Rows that are not used, by fault.
    videos : Counter
        ``"missing"`` and ``"broken"`` videos and images.
    left_out : Counter
        Parts of records that are not for training, by reason; not listed, nothing is wrong with them.
    later : list of dict
        What was met after the files were read, as the arguments of `add`.
    layout, read : dict
        By file: its layout, and the number of its rows that are used.
    """

    def __init__(self, path: Path | None = None, lists: bool = True) -> None:
        self.path, self.lists = path, lists
        self.layout: dict[str, str] = {}
        self.read: dict[str, int] = {}
        self.faults, self.videos, self.left_out = Counter[str](), Counter[str](), Counter[str]()
        self.later: list[dict[str, Any]] = []
        self._first: dict[str, str] = {}
        self._shown = Counter[str]()
        self._lock = threading.Lock()
        self._listed: set[tuple[str, str, str]] = set()
        if path is not None and os.path.exists(path):
            with opened(path, TrainingError) as file:
                for _, line, _ in lines(file, limits.row):
                    try:
                        row = parsed(line)
                        self._listed.add((row["file"], row["what"], row["where"]))
                    except (ValueError, KeyError, TypeError):  # a line that a kill cut short
                        continue

    def add(self, what: str, where: str, reason: str, *, file: Path, rows: int = 1, later: bool = False) -> None:
        """Count a fault, and list it.

        Parameters
        ----------
        what : str
            Kind of fault, such as "malformed record", "missing video" or "broken image".
        where : str
            The record or video.
        reason : str
            May be empty.
        file : Path
            The file of rows.
        rows : int
            Rows that cannot be used because of it.
        later : bool
            True if it was met after the file was read.

        Raises
        ------
        OutputError
            If the list cannot be written.
        """
        text = reason if reason.startswith(where) else f"{where}: {reason}" if reason else where
        key = str(file), what, where
        with self._lock:
            if later:
                self.later.append({"what": what, "where": where, "reason": reason, "file": file, "rows": rows})
            self.faults[what] += rows
            self._first.setdefault(what, text)
            if _is_shown(what):
                self.videos[what.split()[0]] += 1
                self._shown[what] += 1
            if self.path is not None and (self.lists or later) and key not in self._listed:
                self._listed.add(key)
                entry = {"what": what, "where": where, "reason": reason, "rows": rows, "file": str(file)}
                _write(self.path, json_line(entry))

    def count_others(self, met: Iterable[dict[str, Any]]) -> None:
        """Count what other processes met `later`, and listed, each fault once."""
        known = {(str(fault["file"]), fault["what"], fault["where"]) for fault in self.later}
        for fault in met:
            key = str(fault["file"]), fault["what"], fault["where"]
            if key not in known:
                known.add(key)
                self._listed.add(key)
                self.add(**fault)

    def leave(self, reason: str, count: int = 1) -> None:
        """Count parts of records that are not for training."""
        self.left_out[reason] += count

    def reasons(self) -> list[str]:
        """Return a text for each fault, with the first of its kind, and for each reason."""
        texts = []
        for what, rows in self.faults.items():
            many = f"{_many(self._shown[what], what)} of {_many(rows, 'row')}" if _is_shown(what) else _many(rows, what)
            texts.append(f"{many}, first {self._first[what]}")
        return texts + [f"{count} × {reason}" for reason, count in self.left_out.items()]

    def summary(self) -> str:
        """Return all reasons in one text, empty if nothing was left out."""
        return "; ".join(self.reasons())

    def lines(self) -> list[str]:
        """Return lines for a person: the rows read of each file, and what was left out of all."""
        lines = [f"{path} ({self.layout[path]}): {_many(usable, 'row')} used" for path, usable in self.read.items()]
        left = self.summary()
        if left:
            listed = f" (listed in {self.path})" if self.path is not None and self.faults else ""
            lines.append(f"left out: {left}{listed}")
        return lines

    def as_dict(self) -> dict[str, Any]:
        """Return the counts as plain values."""
        return {"faults": dict(self.faults), "videos": dict(self.videos), "left_out": dict(self.left_out)}


def _is_shown(what: str) -> bool:
    """Return True for the fault of a video or image, which several rows may show."""
    return what.startswith(("missing", "broken"))


def _many(count: int, what: str) -> str:
    """Return "3 malformed records", "1 question that cannot be asked"."""
    head, _, tail = what.partition(" that ")
    return f"{count} {head}{'s' * (count != 1)}{' that ' + tail if tail else ''}"


def _write(path: Path, line: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # One write to a file opened for appending: lines of several processes do not mix.
        handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(handle, line.encode())
        finally:
            os.close(handle)
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror or error}") from None
