"""The rows of a file of prompts, kept in a temporary file: memory holds a few numbers a row and each path once.

What cannot be used is left out here, once for checking, filtering and training: malformed records, questions that
cannot be asked, rows whose videos are missing.
"""

from __future__ import annotations

import json
import os
import tempfile
import weakref
from array import array
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from vidsieve.errors import PromptError, TrainingError
from vidsieve.training.data.layouts import IMAGE_BYTES, INSIDE, confined_records, files_of, layout_of
from vidsieve.training.data.reading import image_fault
from vidsieve.training.data.rows import labelled
from vidsieve.training.data.skipped import Skipped

_key = lru_cache(4096)(os.path.realpath)


def keys_of(row: Mapping[str, Any]) -> frozenset[str]:
    """Return the resolved paths of the files that a row shows."""
    return frozenset(_key(name) for name in files_of(row))


@dataclass(slots=True)
class ShownFile:
    """A video or image: its path as first named, the number of rows that show it, and True for a video."""

    name: str
    rows: int
    is_video: bool


class RecordTable(Sequence[dict[str, Any]]):
    """Rows in a temporary file, removed with the table. Any thread may read; append from one, before.

    Attributes
    ----------
    shown : list of tuple of str
        By row: resolved paths of the files that it shows.
    files : dict of ShownFile
        By resolved path, in the order in which rows first show them.
    """

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile(prefix="vidsieve-")  # noqa: SIM115 (it lives as long as the table)
        weakref.finalize(self, self._file.close)
        self._ends = array("Q", [0])
        self.shown: list[tuple[str, ...]] = []
        self.files: dict[str, ShownFile] = {}

    def append(self, row: Mapping[str, Any]) -> None:
        """Add a row."""
        text = json.dumps(row).encode()  # ASCII, as texts may hold half of a surrogate pair
        self._file.write(text)
        self._ends.append(self._ends[-1] + len(text))
        names = {_key(name): name for name in files_of(row)}
        for key, name in names.items():
            self.files.setdefault(key, ShownFile(name, 0, "video" in row)).rows += 1
        self.shown.append(tuple(names))

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, number: Any) -> Any:
        if not 0 <= number < len(self):
            raise IndexError(number)
        self._file.flush()
        start, end = self._ends[number], self._ends[number + 1]
        return json.loads(os.pread(self._file.fileno(), end - start, start))


class View(Sequence[dict[str, Any]]):
    """Some rows of a table, by their numbers."""

    def __init__(self, table: RecordTable, numbers: Iterable[int]) -> None:
        self.table, self.numbers = table, array("Q", numbers)

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, place: Any) -> Any:
        return self.table[self.numbers[place]]

    def without(self, bad: frozenset[str] | set[str]) -> View:
        """Return the rows that show none of the files with these resolved paths."""
        return View(self.table, (number for number in self.numbers if bad.isdisjoint(self.table.shown[number])))


def load_rows(
    path: Path,
    root: Path | None = None,
    *,
    wanted: Callable[[Mapping[str, Any]], str] | None = None,
    skipped: Skipped | None = None,
    present: bool = True,
    empty: bool = False,
    answers: bool = True,
    progress: Callable[[int], None] | None = None,
) -> View:
    """Return the rows of a file of prompts that can be used; the others are counted and listed in `skipped`.

    Parameters
    ----------
    path, root : Path
        As `confined_records`.
    wanted : callable, optional
        Returns the reason why a row is left out, or an empty text to take it. Raises `TrainingError` or `PromptError`
        for a row that is wrong.
    present : bool
        Leave out rows whose videos are missing.
    empty : bool
        Return no rows where none can be used, instead of an error.
    answers : bool
        Leave out questions without an answer.
    progress : callable, optional
        Called with the number of records read, now and then.

    Raises
    ------
    TrainingError
        If the file is unreadable or of no known layout, or nothing in it can be used.
    """
    skipped = Skipped() if skipped is None else skipped
    skipped.layout[str(path)] = layout_of(path).name
    table = RecordTable()
    for count, record in enumerate(confined_records(path, root), 1):
        where = f"record {record.number}"
        if record.fault:
            skipped.add("malformed record", where, record.fault, file=path)
        for reason, parts in record.left_out.items():
            skipped.leave(reason, parts)
        for row in record.rows:
            try:
                reason = "" if wanted is None else wanted(row)
                if answers and not labelled(row):
                    reason = reason or "a question without an answer: for reward 'agreement' and for sieve alone"
            except (TrainingError, PromptError) as error:
                skipped.add("question that cannot be asked", where, str(error), file=path)
                continue
            if reason:
                skipped.leave(reason)
            elif IMAGE_BYTES not in row:
                table.append(row)
            elif fault := image_fault(row[IMAGE_BYTES]):
                skipped.add("image that cannot be read", where, fault, file=path)
            else:
                table.append({key: value for key, value in row.items() if key != IMAGE_BYTES} | {INSIDE: True})
        if progress is not None and count % 500 == 0:
            progress(count)
    missing = {key for key, shown in table.files.items() if present and not os.path.isfile(shown.name)}
    for shown in (table.files[key] for key in table.files if key in missing):
        skipped.add(f"missing {'video' if shown.is_video else 'image'}", shown.name, "", file=path, rows=shown.rows)
    view = View(table, range(len(table))).without(missing)
    skipped.read[str(path)] = len(view)
    if not len(view) and not empty:
        advice = ". Do its paths start from that folder? --video-root names another" if missing else ""
        raise TrainingError(f"nothing in {path} can be used: {skipped.summary() or 'it holds no rows'}{advice}")
    return view


def held_out(rows: View, share: float, path: Path) -> frozenset[str]:
    """Return the resolved paths of about `share` of the files that rows show, drawn by a fixed seed.

    Whole videos, so that no row shows some of both parts; still images that rows show together stay together.

    Raises
    ------
    TrainingError
        If the rows show a single video, or images that all hang together.
    """
    group_of: dict[str, list[str]] = {}  # in the order in which rows show them: the draw does not depend on folders
    for number in rows.numbers:
        for key in rows.table.shown[number]:
            group_of.setdefault(key, [key])
            one, other = group_of[rows.table.shown[number][0]], group_of[key]
            if one is not other:
                small, large = sorted((one, other), key=len)
                large += small
                group_of.update(dict.fromkeys(small, large))
    groups = list({id(group): group for group in group_of.values()}.values())
    if len(groups) < 2:
        why = "a single video" if len(group_of) < 2 else "images that all hang together by its rows"
        raise TrainingError(f"{path} shows {why}, and cannot be parted: leave --hold-out out, or give --eval-data")
    held: set[str] = set()
    for number in torch.randperm(len(groups), generator=torch.Generator().manual_seed(0)).tolist()[:-1]:
        if held and len(held) + len(groups[number]) / 2 > share * len(group_of):
            break
        held.update(groups[number])
    return frozenset(held)
