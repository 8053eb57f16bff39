"""What of a file of prompts is not used, and why: counted by reason, and listed one a line in a file.

Missing or broken videos never end a run, and never go unsaid.
"""

from __future__ import annotations

import json
import os
import threading
from collections import Counter
from pathlib import Path
from typing import Any

from vidsieve.errors import OutputError


class Skipped:
    """Faults of records and videos, counted and listed. Any thread may add.

    Parameters
    ----------
    path : Path, optional
        Where faults are listed as JSON lines ``{"what", "where", "reason", "rows", "file"}``, each written at once;
        default: nowhere. What is there already is not listed again.
    lists : bool
        Whether this process lists what is found while reading; of several processes that read the same, one does.
        Videos that prove broken later are listed by the one that finds them.

    Attributes
    ----------
    faults : Counter
        Rows that are not used, by what is wrong.
    videos : Counter
        Missing and broken videos, by which of the two.
    left_out : Counter
        Parts of records that are not for the purpose, by reason; not listed, nothing is wrong with them.
    """

    def __init__(self, path: Path | None = None, lists: bool = True) -> None:
        self.path, self.lists = path, lists
        self.faults: Counter[str] = Counter()
        self.videos: Counter[str] = Counter()
        self.left_out: Counter[str] = Counter()
        self.layout: dict[str, str] = {}
        self.read: dict[str, tuple[int, int]] = {}
        self._first: dict[str, list[str]] = {}
        self._lock = threading.Lock()
        self._listed: set[tuple[str, str, str]] = set()
        if path is not None and path.exists():
            for line in path.read_text(encoding="utf-8").splitlines():
                try:
                    row = json.loads(line)
                    self._listed.add((row["file"], row["what"], row["where"]))
                except (ValueError, KeyError, TypeError):  # a line that a kill cut short
                    continue

    def add(self, what: str, where: str, reason: str, *, file: Path, rows: int = 1, later: bool = False) -> None:
        """Count a fault, and list it."""
        with self._lock:
            self.faults[what] += rows
            first = self._first.setdefault(what, [])
            if len(first) < 3:
                first.append(reason if reason.startswith(where) else f"{where}: {reason}" if reason else where)
            entry = {"what": what, "where": where, "reason": reason, "rows": rows, "file": str(file)}
            if self.path is not None and (self.lists or later) and (str(file), what, where) not in self._listed:
                self._listed.add((str(file), what, where))
                self._write(json.dumps(entry, ensure_ascii=False) + "\n")

    def missing(self, name: str, rows: int, *, file: Path) -> None:
        """Count a video or image that is not there, with the rows that show it."""
        self.videos["missing"] += 1
        self.add("missing video", name, "", file=file, rows=rows)

    def broken(self, name: str, rows: int, reason: str, *, file: Path, later: bool = False) -> None:
        """Count a video or image that cannot be read, with the rows that show it."""
        self.videos["broken"] += 1
        self.add("broken video", name, reason, file=file, rows=rows, later=later)

    def leave(self, reason: str, count: int = 1) -> None:
        """Count parts of records that are not for the purpose."""
        self.left_out[reason] += count

    def count(self, path: Path, read: int, usable: int) -> None:
        """Note how many rows a file had, and how many of them are used."""
        self.read[str(path)] = (read, usable)

    def summary(self) -> str:
        """Return in words what was left out, with the first of each; empty where nothing was."""
        return "; ".join(self.reasons())

    def reasons(self) -> list[str]:
        """Return in words what was left out, by reason, with the first of each."""
        said = []
        for what, rows in self.faults.items():
            first = "; ".join(self._first[what][:1])
            videos = self.videos.get(what.removesuffix(" video"), 0) if what.endswith(" video") else 0
            count = f"{videos} {what}{'s' * (videos != 1)} of {rows} rows" if videos else _many(rows, what)
            said.append(f"{count}, first {first}")
        said += [f"{count} × {reason}" for reason, count in self.left_out.items()]
        return said

    def lines(self) -> list[str]:
        """Return in words what was read of each file, and what was left out of all."""
        said = [
            f"{path} ({self.layout[path]}): {usable} of {rows} rows are used"
            for path, (rows, usable) in self.read.items()
        ]
        left = self.summary()
        if left:
            listed = f" (listed in {self.path})" if self.path is not None and self.faults else ""
            said.append(f"left out: {left}{listed}")
        return said

    def as_dict(self) -> dict[str, Any]:
        """Return the counts as plain values."""
        return {"faults": dict(self.faults), "videos": dict(self.videos), "left_out": dict(self.left_out)}

    def _write(self, line: str) -> None:
        path = self.path
        if path is None:
            return
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


def _many(count: int, what: str) -> str:
    """Return "3 malformed records", "1 question that cannot be asked"."""
    head, _, tail = what.partition(" that ")
    plural = head if count == 1 else f"{head}s"
    return f"{count} {plural}{' that ' + tail if tail else ''}"
