"""Rows of a file whose captions are to be written anew, and what became of each."""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from vidsieve.io.files import relative
from vidsieve.training.data.layouts import files_of, read_records
from vidsieve.training.data.teaching.journal import AnnotationJournal
from vidsieve.training.data.teaching.teacher import Teacher


@dataclass(frozen=True)
class CaptionItem:
    """A row of the input: the record that it comes from, and what is done about it.

    Parameters
    ----------
    number : int
        Of the record.
    row : dict
        With paths from the output.
    shown : dict
        With absolute paths.
    key : str
        The same for the same row and settings; empty where nothing is to be asked.
    reason, detail : str
        Why it cannot be asked about; empty where it can, or where it has no caption.
    """

    number: int
    row: dict[str, Any] = field(default_factory=dict)
    shown: dict[str, Any] = field(default_factory=dict)
    key: str = ""
    reason: str = ""
    detail: str = ""


@dataclass(frozen=True)
class Captions:
    """A file of rows, where they go, and the teacher that is asked about them; `root` as `read_records` takes it."""

    source: Path
    target: Path
    teacher: Teacher
    root: Path | None = None

    def beside(self, what: str) -> Path:
        """Return the path of the "journal" or the "aside" of the output."""
        return self.target.with_name(f"{self.target.name}.{what}.jsonl")

    def journal(self, again: bool = False) -> AnnotationJournal:
        """Return the journal, neither read nor entered; `again` as it takes it."""
        settings = vars(self.teacher) | {"input": relative(self.source, self.target)}
        return AnnotationJournal(self.beside("journal"), settings, again)

    def items(self, left_out: Counter[str] | None = None) -> Iterator[CaptionItem]:
        """Yield every row, one record in memory at a time; parts that are no rows are counted in `left_out`."""
        settings = json.dumps(vars(self.teacher), sort_keys=True)
        for record in read_records(self.source, self.root):
            if left_out is not None:
                left_out.update(record.left_out or {})
            if record.fault:
                yield CaptionItem(record.number, reason="malformed record", detail=record.fault)
            for shown in record.rows:
                if "bytes" in shown:  # of Parquet: JSON lines cannot hold it
                    yield CaptionItem(record.number, reason="image inside the file", detail=str(shown["image"]))
                    continue
                row = shown | _moved(shown, self.target)
                missing = next((name for name in files_of(shown) if not os.path.isfile(name)), "")
                if "caption" not in row:
                    yield CaptionItem(record.number, row, shown)
                elif missing:  # told anew by every run: it may come later
                    where = _way(missing, self.target)
                    yield CaptionItem(record.number, row, shown, reason="missing video", detail=where)
                else:
                    text = settings + json.dumps(row, sort_keys=True, default=str)
                    yield CaptionItem(record.number, row, shown, hashlib.sha256(text.encode()).hexdigest()[:32])

    def waiting(self, journal: AnnotationJournal) -> Iterator[CaptionItem | None]:
        """Yield the rows that are not settled, the same ones once; None for every other row."""
        taken: set[str] = set()
        for item in self.items():
            if not item.key or item.key in journal.places or item.key in taken:
                yield None
            else:
                taken.add(item.key)
                yield item

    def outcomes(
        self, journal: AnnotationJournal, left_out: Counter[str] | None = None
    ) -> Iterator[tuple[CaptionItem, dict[str, Any] | None]]:
        """Yield every row with what settled it: ``done``, ``aside`` or ``unchanged``; None where nothing did."""
        with journal.path.open("rb") as file:
            for item in self.items(left_out):
                if item.key:
                    yield item, journal.outcome(item.key, file)
                elif item.reason:
                    yield item, {"aside": "", "reason": item.reason, "detail": item.detail}
                else:
                    yield item, {"unchanged": ""}


def _moved(row: dict[str, Any], target: Path) -> dict[str, Any]:
    """Return the fields of a row that name files, with paths from `target`."""
    if "frames" in row:
        return {"frames": [[_way(name, target), times] for name, times in row["frames"]]}
    shown = "video" if "video" in row else "image"
    return {shown: _way(row[shown], target)}


def _way(name: str, target: Path) -> str:
    folder, file = os.path.split(name)
    return os.path.normpath(f"{_folder(folder, target)}/{file}")


@lru_cache(4096)
def _folder(folder: str, target: Path) -> str:  # most rows have few folders, and to resolve one takes long
    return relative(Path(folder), target)
