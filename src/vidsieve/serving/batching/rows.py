"""Rows of questions read a group at a time, and what becomes of each; memory holds three numbers a group.

A group is what one call of the model answers. Which rows it has depends on their place in the file alone, so that a
row's answer does not depend on who computes it, or when.
"""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Generator, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vidsieve.errors import VidsieveError
from vidsieve.evaluation.items import Item
from vidsieve.options import Options, OptionsError

GIVEN = "given"
"""Where a row's own fields go whose names an answer or a failure needs."""

Outcome = tuple[bool, dict[str, Any]]
"""Whether a row was answered, and what is written of it."""
Settled = Generator[tuple[int, list[Outcome]], None, None]
"""Groups by their numbers, with what became of their rows."""


class BatchError(VidsieveError, RuntimeError):
    """Rows cannot be answered, or no more of them; what was answered stays in the journal."""


@dataclass(frozen=True)
class BatchRow:
    """One row of the input.

    Parameters
    ----------
    line : int
        Its line in the file, from 1.
    fields : dict or None
        What it holds; None where it is no JSON object.
    video, prompt : str
        Path of its video, and what is asked.
    fault : str
        Why it cannot be asked; empty where it can.
    """

    line: int
    fields: Mapping[str, Any] | None
    video: str = ""
    prompt: str = ""
    fault: str = ""

    def answered(self, answer: str, **counts: int) -> Outcome:
        """Return the row with its answer."""
        return True, _with(self.fields or {}, {"answer": answer, **counts})

    def failed(self, reason: str) -> Outcome:
        """Return the row, or its line number where it is no JSON object, with the reason why it has no answer."""
        return False, _with({"line": self.line} if self.fields is None else self.fields, {"reason": reason})


def _with(fields: Mapping[str, Any], said: Mapping[str, Any]) -> dict[str, Any]:
    """Return fields and what is said of them; fields of the same names go into one of their own."""
    hidden = {name: fields[name] for name in said if name in fields}
    if hidden and GIVEN in fields:
        hidden[GIVEN] = fields[GIVEN]
    rest = {name: value for name, value in fields.items() if name not in hidden}
    return rest | ({GIVEN: hidden} if hidden else {}) | dict(said)


def line_of(value: Any) -> bytes:
    """Return a value as a line of JSON."""
    try:
        return json.dumps(value, ensure_ascii=False).encode() + b"\n"
    except UnicodeEncodeError:  # half of a surrogate pair, which UTF-8 does not have
        return json.dumps(value).encode() + b"\n"


class Rows:
    """The rows of a file, read once for their places and a digest, then a group at a time.

    Parameters
    ----------
    path : Path
        JSON lines; blank ones do not count.
    root : Path
        Where the paths of videos start.
    size : int
        Rows in a group.

    Attributes
    ----------
    count : int
        Rows in all.
    digest : str
        Of the file's bytes.

    Raises
    ------
    BatchError
        If the file cannot be read, or holds no rows.
    """

    def __init__(self, path: Path, root: Path, size: int) -> None:
        self.path, self.root, self.size = path, root, size
        self.count, self._starts, self._lines = 0, array("Q"), array("Q")
        found = hashlib.blake2b(digest_size=16)
        place = 0
        try:
            with path.open("rb") as file:
                for number, line in enumerate(file, 1):
                    found.update(line)
                    if not _blank(line):
                        if self.count % size == 0:
                            self._starts.append(place)
                            self._lines.append(number)
                        self.count += 1
                    place += len(line)
                self._stamp = _stamp(path)
        except OSError as error:
            raise BatchError(f"cannot read {path}: {error.strerror}") from None
        if not self.count:
            raise BatchError(f"{path} holds no rows")
        self.digest = found.hexdigest()

    @property
    def groups(self) -> int:
        """How many groups there are."""
        return len(self._starts)

    def place(self, group: int) -> tuple[int, int]:
        """Return where in the file a group begins, and the number of that line."""
        return self._starts[group], self._lines[group]

    def group(self, number: int) -> list[BatchRow]:
        """Return the rows of a group.

        Raises
        ------
        BatchError
            If the file has changed since.
        """
        return read_group(self.path, self.root, self.size, *self.place(number))

    def check(self) -> None:
        """Refuse a file that was changed since it was read first.

        Raises
        ------
        BatchError
        """
        if _stamp(self.path) != self._stamp:
            raise BatchError(
                f"{self.path} was changed while its rows were answered: name another output, or put it back"
            )


def read_group(path: Path, root: Path, size: int, start: int, line: int) -> list[BatchRow]:
    """Return at most `size` rows of a file from a place in it on, which is the beginning of a line.

    Raises
    ------
    BatchError
        If there is none.
    """
    rows: list[BatchRow] = []
    try:
        with path.open("rb") as file:
            file.seek(start)
            for number, text in enumerate(file, line):
                if not _blank(text):
                    rows.append(read_row(text, number, root))
                if len(rows) == size:
                    break
    except OSError as error:
        raise BatchError(f"cannot read {path}: {error.strerror}") from None
    if not rows:
        raise BatchError(f"{path} was cut short while its rows were answered: put it back")
    return rows


def _no_number(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON's")


def read_row(text: bytes, line: int, root: Path) -> BatchRow:
    """Return the row in a line of a file."""
    try:
        fields = json.loads(text.decode("utf-8-sig"), parse_constant=_no_number)
    except UnicodeDecodeError as error:
        return BatchRow(line, None, fault=f"line {line} is not UTF-8: {error}")
    except (ValueError, RecursionError) as error:
        return BatchRow(line, None, fault=f"line {line} is not JSON: {error}")
    if not isinstance(fields, dict):
        return BatchRow(line, None, fault=f"line {line} holds {type(fields).__name__}, must be an object")
    wrong = _wrong(fields)
    if wrong:
        return BatchRow(line, fields, fault=wrong)
    return BatchRow(line, fields, str(root / fields["video"]), _prompt(fields["question"], fields.get("options") or []))


def _wrong(fields: Mapping[str, Any]) -> str:
    """Return what is wrong with a row; empty where nothing is."""
    for name in ("video", "question"):
        value = fields.get(name)
        if not (isinstance(value, str) and value.strip()):
            return f"{name} must be a text that is not empty, got {value!r}" if name in fields else f"it has no {name}"
    options = fields.get("options")
    if options is not None and not (isinstance(options, list) and all(isinstance(text, str) for text in options)):
        return f"options must be a list of texts, got {options!r}"
    if options:
        try:
            Options.parse(options)
        except OptionsError as error:
            return str(error)
    try:
        "".join([fields["video"], fields["question"], *(options or [])]).encode()
    except UnicodeEncodeError:
        return "its texts hold half of a surrogate pair, which no tokenizer reads"
    return "its video's path holds a zero byte" if "\0" in fields["video"] else ""


def _prompt(question: str, options: list[str]) -> str:
    """Return what is asked: as with files of questions in `vidsieve eval`, options are listed if they have letters."""
    parsed = Options.parse(options) if options else None
    if parsed is None or not parsed.lettered:
        return question
    return Item("", Path(), question, parsed.texts, "").prompt()


def numbered(rows: Rows, groups: Iterable[int]) -> Iterator[tuple[int, BatchRow]]:
    """Yield the rows of some groups, each with the number of its group."""
    for number in groups:
        for row in rows.group(number):
            yield number, row


def _blank(line: bytes) -> bool:
    return not line.removeprefix(b"\xef\xbb\xbf").strip()


def _stamp(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_size, found.st_mtime_ns
