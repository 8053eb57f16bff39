"""What of a file of prompts is not used, and why: counted by reason, and listed one a line in a file.

Missing or broken videos never end a run, and never go unsaid.
"""

from __future__ import annotations

import json
import os
import threading
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vidsieve.errors import OutputError


@dataclass
class _Counts:
    """What is not used of one file: rows by what is wrong, videos, parts by reason, and the first of each fault."""

    faults: Counter[str] = field(default_factory=Counter)
    videos: Counter[str] = field(default_factory=Counter)
    left_out: Counter[str] = field(default_factory=Counter)
    first: dict[str, str] = field(default_factory=dict)


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
    """

    def __init__(self, path: Path | None = None, lists: bool = True) -> None:
        self.path, self.lists = path, lists
        self._files: dict[str, _Counts] = {}
        self.layout: dict[str, str] = {}
        self.read: dict[str, tuple[int, int]] = {}
        self._lock = threading.Lock()
        self._listed: set[tuple[str, str, str]] = set()
        if path is not None and os.path.exists(path):
            for line in path.read_text(encoding="utf-8").splitlines():
                try:
                    row = json.loads(line)
                    self._listed.add((row["file"], row["what"], row["where"]))
                except (ValueError, KeyError, TypeError):  # a line that a kill cut short
                    continue

    @property
    def faults(self) -> Counter[str]:
        """Rows of all files that are not used, by what is wrong."""
        return sum((counts.faults for counts in self._files.values()), Counter())

    @property
    def videos(self) -> Counter[str]:
        """Missing and broken videos of all files, by which of the two."""
        return sum((counts.videos for counts in self._files.values()), Counter())

    @property
    def left_out(self) -> Counter[str]:
        """Parts of records that are not for the purpose, by reason; not listed, nothing is wrong with them."""
        return sum((counts.left_out for counts in self._files.values()), Counter())

    def _of(self, file: Path) -> _Counts:
        return self._files.setdefault(str(file), _Counts())

    def add(self, what: str, where: str, reason: str, *, file: Path, rows: int = 1, later: bool = False) -> None:
        """Count a fault, and list it."""
        with self._lock:
            counts = self._of(file)
            counts.faults[what] += rows
            said = reason if reason.startswith(where) else f"{where}: {reason}" if reason else where
            counts.first.setdefault(what, said)
            entry = {"what": what, "where": where, "reason": reason, "rows": rows, "file": str(file)}
            if self.path is not None and (self.lists or later) and (str(file), what, where) not in self._listed:
                self._listed.add((str(file), what, where))
                self._write(json.dumps(entry, ensure_ascii=False) + "\n")

    def missing(self, name: str, rows: int, *, file: Path, video: bool = True) -> None:
        """Count a video or image that is not there, with the rows that show it."""
        self._of(file).videos["missing"] += 1
        self.add(f"missing {'video' if video else 'image'}", name, "", file=file, rows=rows)

    def broken(self, name: str, rows: int, reason: str, *, file: Path, later: bool = False, video: bool = True) -> None:
        """Count a video or image that cannot be read, with the rows that show it."""
        self._of(file).videos["broken"] += 1
        self.add(f"broken {'video' if video else 'image'}", name, reason, file=file, rows=rows, later=later)

    def leave(self, reason: str, count: int = 1, *, file: Path) -> None:
        """Count parts of records that are not for the purpose."""
        self._of(file).left_out[reason] += count

    def count(self, path: Path, read: int, usable: int) -> None:
        """Note how many rows a file had, and how many of them are used."""
        self.read[str(path)] = (read, usable)

    def summary(self, file: Path | None = None) -> str:
        """Return in words what was left out, of one file or of all, with the first of each; or an empty text."""
        return "; ".join(self.reasons(file))

    def reasons(self, file: Path | None = None) -> list[str]:
        """Return in words what was left out, of one file or of all, by reason, with the first of each."""
        files = list(self._files.values()) if file is None else [self._of(file)]
        said, known = [], dict.fromkeys(what for counts in files for what in counts.faults)
        for what in known:
            rows = sum(counts.faults[what] for counts in files)
            first = next(counts.first[what] for counts in files if what in counts.first)
            how, _, kind = what.partition(" ")
            shown = sum(counts.videos[how] for counts in files) if kind in ("video", "image") else 0
            many = f"{_many(shown, what)} of {_many(rows, 'row')}" if shown else _many(rows, what)
            said.append(f"{many}, first {first}")
        left = sum((counts.left_out for counts in files), Counter[str]())
        return said + [f"{count} × {reason}" for reason, count in left.items()]

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
