"""Results that grow unit by unit in a folder: a unit is there whole or not at all, and is never measured twice.

A unit is what is measured in one go, a video or a scene with all its questions. Every process appends to a file of its
own, one line a unit; the folder's ``run.json`` says what is measured, and by what.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from vidsieve.errors import EvaluationError, OutputError
from vidsieve.io.files import append, writing

RUN = "run.json"


class Store:
    """Results of a run in a folder, open for one process's share of the units.

    Parameters
    ----------
    folder : Path
    config : dict
        What the results depend on, as values for JSON. A folder that was begun with another is refused.
    share : (int, int)
        Which of how many processes this is. Units that other shares have measured count as done, so that a run may go
        on with another number of processes.

    Raises
    ------
    EvaluationError
        If the folder holds results of something else, another process has this share open, or a file is damaged.
    OutputError
        If the folder cannot be written.
    """

    def __init__(self, folder: Path, config: Mapping[str, Any], share: tuple[int, int] = (0, 1)) -> None:
        self.folder, self.share = Path(folder), share
        path = self.folder / RUN
        if os.path.exists(path):
            self._compare(path, config)
        else:
            with writing(path) as temporary:
                temporary.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        own = self.folder / f"units-{share[0] + 1}-of-{share[1]}.jsonl"
        try:
            self._file = own.open("a+b")
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.close()
            raise EvaluationError(
                f"another process is writing {own}: wait for it, or give each its own share"
            ) from None
        except OSError as error:
            raise OutputError(f"cannot write {own}: {error.strerror}") from None
        self._cut()

    def __enter__(self) -> Store:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._file.close()

    def _compare(self, path: Path, config: Mapping[str, Any]) -> None:
        try:
            known = json.loads(path.read_text(encoding="utf-8"))
            known.keys()
        except (OSError, ValueError, AttributeError) as error:
            raise EvaluationError(f"{path} says nothing of the results in its folder ({error}): {_ADVICE}") from None
        wanted = json.loads(json.dumps(config))
        changed = [key for key in {**known, **wanted} if known.get(key) != wanted.get(key)]
        if changed:
            said = "; ".join(f"{key}: {_between(known.get(key), wanted.get(key))}" for key in changed)
            raise EvaluationError(f"{self.folder} holds results of another run ({said}): {_ADVICE}")

    def _cut(self) -> None:
        """Drop what follows the last whole line of the own file: a process was stopped while it wrote."""
        self._file.seek(0)
        whole = self._file.read().rfind(b"\n") + 1
        self._file.truncate(whole)
        self._file.seek(whole)

    def add(self, unit: str, record: Mapping[str, Any]) -> None:
        """Append what was measured of a unit; it is on the disk when this returns.

        Raises
        ------
        OutputError
            If it cannot be written.
        """
        line = json.dumps({"unit": unit, **record}, ensure_ascii=False) + "\n"
        append(self._file, line.encode(), Path(self._file.name))

    def records(self) -> dict[str, dict[str, Any]]:
        """Return every unit that some process has measured; of one that two have, what the first file says.

        Raises
        ------
        EvaluationError
            If a file is damaged.
        """
        found: dict[str, dict[str, Any]] = {}
        for path in sorted(self.folder.glob("units-*-of-*.jsonl")):
            lines = path.read_bytes().split(b"\n")[:-1]  # what follows the last end of line is still being written
            for number, line in enumerate(lines, 1):
                try:
                    record = json.loads(line)
                    found.setdefault(record["unit"], record)
                except (ValueError, KeyError, TypeError):
                    raise EvaluationError(
                        f"line {number} of {path} is damaged: remove that line, and its unit is measured again"
                    ) from None
        return found


def measure_all(
    store: Store | None,
    units: Sequence[str],
    measure: Callable[[str], Mapping[str, Any]],
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, dict[str, Any]]:
    """Measure the units of a store's share that are not there yet, and return all records there are, in their order.

    Without a store everything is measured here and kept in memory.
    """
    records = store.records() if store is not None else {}
    first, step = store.share if store is not None else (0, 1)
    mine = units[first::step]
    done = sum(unit in records for unit in mine)
    for unit in mine:
        if unit in records:
            continue
        record = dict(measure(unit))
        if store is not None:
            store.add(unit, record)
        records[unit] = {"unit": unit, **record}
        done += 1
        if progress:
            progress(done, len(mine))
    if store is not None:
        records = store.records()  # what other processes have measured meanwhile
    return {unit: records[unit] for unit in units if unit in records}


_ADVICE = "give another folder, or remove this one"


def _between(there: object, now: object) -> str:
    """Return how two values differ: of long lists and tables what only one of them has."""
    if any(_short(value).endswith("…") for value in (there, now)):
        if isinstance(there, dict) and isinstance(now, dict):
            there, now = ([*one.items()] for one in (there, now))
        if isinstance(there, list) and isinstance(now, list):
            gone, new = [v for v in there if v not in now], [v for v in now if v not in there]
            there, now = (gone, new) if gone or new else (there, now)
    return f"{_short(there)} there, {_short(now)} now"


def _short(value: object) -> str:
    said = json.dumps(value)
    return said if len(said) <= 60 else f"{said[:59]}…"
