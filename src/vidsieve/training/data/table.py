"""The rows of a file of prompts, kept in a temporary file: memory holds a few numbers a row, however long its texts.

What cannot be used is left out here, once for checking, filtering and training: malformed records, questions that
cannot be asked, rows whose videos are missing.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import weakref
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from vidsieve.errors import PromptError, TrainingError
from vidsieve.training.data.layouts import files_of, layout_of, read_records
from vidsieve.training.data.reading import image_fault
from vidsieve.training.data.skipped import Skipped

Keys = NDArray[np.uint64]


@lru_cache(4096)
def key_of(path: str) -> int:
    """Return 64 bits that stand for a file: those of its resolved path."""
    return int.from_bytes(hashlib.blake2b(os.path.realpath(path).encode(), digest_size=8).digest(), "little")


def keys_of(row: Mapping[str, Any]) -> frozenset[int]:
    """Return the keys of the files that a row shows."""
    return frozenset(key_of(name) for name in files_of(row))


class RecordTable(Sequence[dict[str, Any]]):
    """Rows in a temporary file, which goes when the table does. Any thread may read; append from one, before."""

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile(prefix="vidsieve-")  # noqa: SIM115 (it lives as long as the table)
        weakref.finalize(self, self._file.close)
        self._ends = array("Q", [0])
        self._keys = array("Q")
        self._key_ends = array("Q", [0])

    def append(self, row: Mapping[str, Any]) -> None:
        """Add a row."""
        text = json.dumps(row, ensure_ascii=False).encode()
        self._file.write(text)
        self._ends.append(self._ends[-1] + len(text))
        self._keys.extend(key_of(name) for name in files_of(row))
        self._key_ends.append(len(self._keys))

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, number: Any) -> Any:
        if not -len(self) <= number < len(self):
            raise IndexError(number)
        number %= len(self)
        self._file.flush()
        start, end = self._ends[number], self._ends[number + 1]
        return json.loads(os.pread(self._file.fileno(), end - start, start))

    def shown(self, number: int) -> frozenset[int]:
        """Return the keys of the files that row `number` shows."""
        return frozenset(self._keys[self._key_ends[number] : self._key_ends[number + 1]])

    def keys(self) -> tuple[Keys, NDArray[np.int64]]:
        """Return the keys of all rows' files in a row, and for each the number of its row."""
        ends = np.array(self._key_ends, np.int64)
        return np.array(self._keys, np.uint64), np.repeat(np.arange(len(self)), ends[1:] - ends[:-1])

    def files(self) -> Iterator[tuple[int, str, int, bool]]:
        """Yield every file once, as first met: key, path, how many rows show it, whether it is a video."""
        keys, rows = self.keys()
        if len(keys):
            unique, first, count = np.unique(keys, return_index=True, return_counts=True)
            for place in np.argsort(first):
                row, key = self[int(rows[first[place]])], int(unique[place])
                name = next(name for name in files_of(row) if key_of(name) == key)
                yield key, name, int(count[place]), "video" in row

    def without(self, bad: Sequence[int]) -> NDArray[np.int64]:
        """Return the numbers of the rows that show none of the files with these keys."""
        keys, rows = self.keys()
        return np.setdiff1d(np.arange(len(self)), rows[np.isin(keys, np.array(bad, np.uint64))])


class View(Sequence[dict[str, Any]]):
    """Some rows of a table, by their numbers."""

    def __init__(self, table: RecordTable, numbers: NDArray[np.int64]) -> None:
        self.table, self.numbers = table, numbers

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, place: Any) -> Any:
        return self.table[int(self.numbers[place])]


def load_rows(
    path: Path,
    root: Path | None = None,
    *,
    wanted: Callable[[Mapping[str, Any]], str] | None = None,
    skipped: Skipped | None = None,
    present: bool = True,
    empty: bool = False,
    progress: Callable[[int], None] | None = None,
) -> View:
    """Return the rows of a file of prompts that can be used; what cannot is counted and listed in `skipped`.

    Parameters
    ----------
    path, root : Path
        As `read_records`.
    wanted : callable, optional
        Says of a row why it is left out, in words; an empty text takes it. Raises `TrainingError` or `PromptError` for
        a row that is wrong.
    present : bool
        Leave out rows whose videos are not there.
    empty : bool
        Return no rows where none can be used, instead of an error.
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
    for count, record in enumerate(read_records(path, root), 1):
        where = f"record {record.number}"
        if record.fault:
            skipped.add("malformed record", where, record.fault, file=path)
        for reason, parts in (record.left_out or {}).items():
            skipped.leave(reason, parts, file=path)
        for row in record.rows:
            try:
                reason = "" if wanted is None else wanted(row)
            except (TrainingError, PromptError) as error:
                skipped.add("question that cannot be asked", where, str(error), file=path)
                continue
            fault = image_fault(row["bytes"]) if "bytes" in row and not reason else ""
            if reason:
                skipped.leave(reason, file=path)
            elif fault:
                skipped.add("image that cannot be read", where, fault, file=path)
            else:
                inside = {"inside": True} if "bytes" in row else {}
                table.append({key: value for key, value in row.items() if key != "bytes"} | inside)
        if progress is not None and count % 500 == 0:
            progress(count)
    read = len(table)
    missing = []
    if present:
        for key, name, rows, video in table.files():
            if not os.path.isfile(name):
                missing.append(key)
                skipped.missing(name, rows, file=path, video=video)
    view = View(table, table.without(missing))
    skipped.count(path, read, len(view))
    if not len(view) and not empty:
        advice = ". Do its paths start from that folder? --video-root names another" if missing else ""
        raise TrainingError(f"nothing in {path} can be used: {skipped.summary(path) or 'it holds no rows'}{advice}")
    return view


def held_out(rows: View, share: float, path: Path) -> frozenset[int]:
    """Return the keys of about `share` of the files that rows show, drawn by a fixed seed.

    Whole videos, so that no row shows some of both parts; still images that rows show together stay together.

    Raises
    ------
    TrainingError
        If the rows show a single video, or images that all hang together.
    """
    keys, numbers = rows.table.keys()
    taken = np.isin(numbers, rows.numbers)
    keys, numbers = keys[taken], numbers[taken]
    unique, first, which = np.unique(keys, return_index=True, return_inverse=True)
    group = list(range(len(unique)))

    def root_of(member: int) -> int:
        while group[member] != member:
            group[member] = group[group[member]]
            member = group[member]
        return member

    for place in range(1, len(keys)):
        if numbers[place] == numbers[place - 1]:
            group[root_of(int(which[place]))] = root_of(int(which[place - 1]))
    parts: dict[int, list[int]] = {}
    for member in np.argsort(first):  # as first met: the draw does not depend on where the files lie
        parts.setdefault(root_of(int(member)), []).append(int(member))
    groups = list(parts.values())
    if len(groups) < 2:
        why = "a single video" if len(unique) < 2 else "images that all hang together by its rows"
        raise TrainingError(f"{path} shows {why}, and cannot be parted: leave --hold-out out, or give --eval-data")
    held: list[int] = []
    for number in torch.randperm(len(groups), generator=torch.Generator().manual_seed(0)).tolist()[:-1]:
        if held and len(held) + len(groups[number]) / 2 > share * len(unique):
            break
        held += groups[number]
    return frozenset(int(unique[member]) for member in held)
