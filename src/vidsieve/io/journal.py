"""Files of JSON lines that survive being killed at any moment: the one journal of evaluations, batches and annotations.

`Journal` is one file that one process appends to. `Store` is a folder of them, one for each process of a run, with the
run's settings in ``run.json``.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from vidsieve.errors import EvaluationError, OutputError, VidsieveError
from vidsieve.io.bounded import lines, read_json
from vidsieve.io.files import RUN, append, locked, refuse_foreign, refuse_other_run, sync_folder, writing

LONGEST_LINE = 2**26
"""Bytes of the longest line that is read."""


class Journal:
    """A file of JSON lines; entering it locks it, so that no other process appends to it.

    An entry is on the disk when `add` returns. A last line without its end was being written when the process was
    killed: readers ignore it, and entering removes it. A line ends with its checksum, ``"crc"``; those of older
    versions have none.

    Parameters
    ----------
    path : Path
    header : dict, optional
        First line of the file, as values for JSON: what kind of journal this is, and under ``settings`` what its
        entries depend on. Without it the first line is an entry.
    error : type
        Raised where the file is damaged, of another run, or in use.
    damaged : str
        How an error about a damaged line ends: what becomes of its rows once the line is removed.
    """

    def __init__(
        self,
        path: Path,
        header: Mapping[str, Any] | None = None,
        *,
        error: type[VidsieveError] = EvaluationError,
        damaged: str = "what it recorded is done again",
    ) -> None:
        self.path, self._error, self._damaged = Path(path), error, damaged
        self.header: dict[str, Any] | None = None if header is None else json.loads(json.dumps(header))
        self._lock = ExitStack()
        self._file: IO[bytes] | None = None

    def __enter__(self) -> Self:
        self._lock.enter_context(locked(self.path, self._error))
        try:
            refuse_foreign(self.path, self._error)
            try:
                self._file = self.path.open("a+b", buffering=0)
                whole = _end_of_lines(self._file)
                self._file.truncate(whole)
            except OSError as error:
                raise OutputError(f"cannot write {self.path}: {error.strerror}") from None
            if not whole:
                sync_folder(self.path.parent)
                if self.header is not None:
                    self._append(self.header)
            self.check()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._close()
        self._lock.close()

    def _close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def check(self) -> None:
        """Refuse a file with another header; one that has no entries gets this one instead, where it is locked.

        Raises
        ------
        VidsieveError
            The type given as `error`.
        """
        if self.header is None or not os.path.isfile(self.path):
            return
        with self.path.open("rb") as file:
            first, second = file.readline(), file.readline()
        if not first.endswith(b"\n"):
            return
        try:
            known = _entry(first)
            changed = differences(known["settings"], self.header["settings"])
            if known.keys() - {"finished"} != self.header.keys() - {"finished"}:
                raise ValueError("another kind of journal")
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise self._error(
                f"{self.path} is not a journal of this command, or its first line is damaged: name another output, or "
                "move it away"
            ) from None
        if changed and (second.endswith(b"\n") or "finished" in known or self._file is None):
            raise self._error(
                f"{self.path} is of another run ({changed}): give the same settings, name another output, or remove "
                "that file and the outputs beside it"
            )
        if changed:
            self.replace(self.header)
        else:
            self.header = known

    def add(self, entry: Mapping[str, Any]) -> int:
        """Append an entry and return the position of its line in bytes; it is on the disk when this returns.

        Raises
        ------
        OutputError
            If it cannot be written.
        """
        return self._append(entry)

    def _append(self, entry: Mapping[str, Any]) -> int:
        if self._file is None:
            raise RuntimeError("enter the journal before adding to it")
        place = self._file.seek(0, os.SEEK_END)
        append(self._file, _line(entry), self.path)
        return place

    def load(self, take: Callable[[Any, int], object]) -> None:
        """Call `take` with every entry and the position of its line in bytes; a file that does not exist has none.

        Raises
        ------
        VidsieveError
            If a line is damaged, or `take` cannot read what it holds; the type given as `error`.
        """
        if not os.path.isfile(self.path):
            return
        place = 0
        with self.path.open("rb") as file:
            for number, line, length in lines(file, LONGEST_LINE):
                if not line.endswith(b"\n") and length <= LONGEST_LINE:
                    return  # being written by another process
                try:
                    entry = _entry(line)
                    if number > 1 or self.header is None:
                        take(entry, place)
                except (ValueError, KeyError, TypeError, IndexError, RecursionError):
                    raise self._error(
                        f"line {number} of {self.path} is damaged: remove that line, and {self._damaged}"
                    ) from None
                place += length

    def read(self, places: Sequence[int]) -> Iterator[Any]:
        """Yield the entries at positions that `add` or `load` gave.

        Raises
        ------
        VidsieveError
            If a line was damaged meanwhile; the type given as `error`.
        """
        with self.path.open("rb") as file:
            for place in places:
                file.seek(place)
                try:
                    yield _entry(file.readline())
                except ValueError:
                    raise self._error(f"{self.path} was damaged meanwhile: run the same command again") from None

    def replace(self, header: Mapping[str, Any]) -> None:
        """Remove all entries, leaving a header.

        Raises
        ------
        OutputError
        """
        self._close()
        with writing(self.path) as temporary:
            temporary.write_bytes(_line(header))
        self.header = json.loads(json.dumps(header))
        self._file = self.path.open("a+b", buffering=0)

    def discard(self) -> None:
        """Remove the file."""
        self._close()
        self.path.unlink(missing_ok=True)


def _line(entry: Mapping[str, Any]) -> bytes:
    """Return the line of an entry, with the CRC-32 of its JSON as the last key."""
    text = json.dumps(entry).encode()
    return text[:-1] + _ending(text)


def _ending(text: bytes) -> bytes:
    return b', "crc": "%08x"}\n' % zlib.crc32(text)


def _entry(line: bytes) -> Any:
    """Return the entry of a line, with a checksum or of an older version; raise ValueError for a damaged line."""
    start = len(line) - len(_ending(b""))
    if not line.startswith(b', "crc": "', max(start, 0)):
        return json.loads(line)
    text = line[:start] + b"}"
    if line[start:] != _ending(text):
        raise ValueError("its checksum differs")
    return json.loads(text)


class Store:
    """Results of a run in a folder, one journal for each shard, open for the shard of one process.

    Parameters
    ----------
    folder : Path
    config : dict
        What the results depend on, as values for JSON. A folder that was begun with another is refused.
    share : (int, int)
        Index of this process's shard and number of shards. Units measured in other shards count as done, so that a
        run can be resumed with another number of processes.
    check : callable
        Called with every record that is read; raises ValueError for one that this run cannot have written.

    Raises
    ------
    EvaluationError
        If the folder holds results of another run, another process has this shard open, or a file is damaged.
    OutputError
        If the folder cannot be written, or holds a training run.
    """

    def __init__(
        self,
        folder: Path,
        config: Mapping[str, Any],
        share: tuple[int, int] = (0, 1),
        check: Callable[[dict[str, Any]], object] = lambda record: None,
    ) -> None:
        self.folder, self.share, self._check = Path(folder), share, check
        refuse_other_run(self.folder, RUN)
        path = self.folder / RUN
        if os.path.exists(path):
            self._compare(path, config)
        elif any(file.stat().st_size for file in self.folder.glob("units-*-of-*.jsonl")):
            raise EvaluationError(f"{self.folder} holds results of a run, but not its {RUN}: {_ADVICE}")
        else:
            with writing(path) as temporary:
                temporary.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        self._journal = _shard(shard_path(self.folder, share)).__enter__()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._journal.__exit__(kind, error, at)

    def _compare(self, path: Path, config: Mapping[str, Any]) -> None:
        changed = differences(read_json(path, EvaluationError, _ADVICE, dict), json.loads(json.dumps(config)))
        if changed:
            raise EvaluationError(f"{self.folder} holds results of another run ({changed}): {_ADVICE}")

    def add(self, unit: str, record: Mapping[str, Any]) -> None:
        """Append the record of a unit; it is on the disk when this returns.

        Raises
        ------
        OutputError
            If it cannot be written.
        """
        self._journal.add({"unit": unit, **record})

    def records(self) -> dict[str, dict[str, Any]]:
        """Return the records of all units in all shards; of a unit measured twice, the first.

        Raises
        ------
        EvaluationError
            If a file is damaged, or `check` refuses a record.
        """
        return records_in(self.folder, self._check)


def shard_path(folder: Path, share: tuple[int, int]) -> Path:
    """Return the path of a shard's journal."""
    return folder / f"units-{share[0] + 1}-of-{share[1]}.jsonl"


def records_in(
    folder: Path, check: Callable[[dict[str, Any]], object] = lambda record: None
) -> dict[str, dict[str, Any]]:
    """Return the records of all units in the journals of a folder, as `Store.records` has them."""
    records: dict[str, dict[str, Any]] = {}

    def take(record: dict[str, Any], _: int) -> None:
        check(record)
        records.setdefault(record["unit"], record)

    for path in sorted(folder.glob("units-*-of-*.jsonl")):
        _shard(path).load(take)
    return records


def _end_of_lines(file: IO[bytes]) -> int:
    """Return the position behind the last whole line of a file."""
    end = file.seek(0, os.SEEK_END)
    while end:
        begin = max(0, end - 2**16)
        file.seek(begin)
        found = file.read(end - begin).rfind(b"\n")
        if found >= 0:
            return begin + found + 1
        end = begin
    return 0


def _shard(path: Path) -> Journal:
    return Journal(path, damaged="its unit is measured again")


def measure_all(
    store: Store | None,
    units: Sequence[str],
    measure: Callable[[str], Mapping[str, Any]],
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, dict[str, Any]]:
    """Measure the units of a store's shard that have no record yet, and return all records in the order of `units`.

    Without a store all units are measured and kept in memory. A record with ``unexpected`` is not stored
    either: its unit is measured again when the run is resumed.
    """
    records = store.records() if store is not None else {}
    first, step = store.share if store is not None else (0, 1)
    mine = units[first::step]
    done = sum(unit in records for unit in mine)
    for unit in mine:
        if unit in records:
            continue
        record = dict(measure(unit))
        if store is not None and not record.get("unexpected"):
            store.add(unit, record)
        records[unit] = {"unit": unit, **record}
        done += 1
        if progress:
            progress(done, len(mine))
    if store is not None:
        records |= store.records()  # what other processes have measured meanwhile
    return {unit: records[unit] for unit in units if unit in records}


_ADVICE = "give another folder, or remove this one"


def differences(known: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    """Return in one line which values of two mappings differ, and how; empty where they are equal."""
    changed = [key for key in {**known, **wanted} if known.get(key) != wanted.get(key)]
    return "; ".join(f"{key}: {_between(known.get(key), wanted.get(key))}" for key in changed)


def _between(known: object, wanted: object) -> str:
    """Return how two values differ: of long tables and lists the entries of one only, of long texts where they part."""
    if any(len(json.dumps(value)) > _SHORT for value in (known, wanted)):
        if isinstance(known, dict) and isinstance(wanted, dict) and known.keys() == wanted.keys():
            return f"({differences(known, wanted)})"
        if isinstance(known, dict | list) and isinstance(wanted, dict | list):
            gone, new = [v for v in known if v not in wanted], [v for v in wanted if v not in known]
            names = {"there": ", ".join(map(str, gone)), "now": ", ".join(map(str, new))}
            if gone or new:
                return ", ".join(f"only {when} {_cut(text)}" for when, text in names.items() if text)
    texts = [json.dumps(value, ensure_ascii=False) for value in (known, wanted)]
    start = 0
    if isinstance(known, str) and isinstance(wanted, str) and max(map(len, texts)) > _SHORT:
        start = max(0, next((n for n, (a, b) in enumerate(zip(*texts, strict=False)) if a != b), 0) - 20)
    there, now = (_cut(text, start) for text in texts)
    return f"{there} there, {now} now"


_SHORT = 60


def _cut(text: str, start: int = 0) -> str:
    return f"{'…' * (start > 0)}{text[start : start + _SHORT]}{'…' * (len(text) > start + _SHORT)}"
