"""What readers of published folders share: files by their names, fields by their types, videos by their stems."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar

from vidsieve.errors import EvaluationError
from vidsieve.options import LETTERS

T = TypeVar("T")


def one_file(folder: Path, *names: str) -> Path:
    """Return the one of some files that a folder has, by their names or patterns below it.

    Raises
    ------
    EvaluationError
        If there is none, or several.
    """
    if not os.path.isdir(folder):
        raise EvaluationError(f"{folder} is no folder: give the one that holds {' or '.join(names)}")
    found = [path for name in names for path in sorted(folder.glob(name))]
    if len(found) > 1:
        raise EvaluationError(
            f"{folder} has {' and '.join(str(path.relative_to(folder)) for path in found)}, of which one is expected: "
            "remove the others"
        )
    if found:
        return found[0]
    there = {
        path.name: path for path in folder.rglob("*") if os.path.isfile(path) and path.suffix == Path(names[0]).suffix
    }
    near = get_close_matches(Path(names[0]).name, there, n=1, cutoff=0.5)
    hint = f"; {there[near[0]].relative_to(folder)} is there: was it renamed or moved?" if near else ""
    raise EvaluationError(f"{folder} has no {' or '.join(names)}{hint}")


def one_folder(folder: Path, *names: str) -> Path:
    """Return the first of some folders below another that is there; the first of all where none is."""
    return next((folder / name for name in names if os.path.isdir(folder / name)), folder / names[0])


def read_json(path: Path) -> list[Any]:
    """Return the rows of a JSON list.

    Raises
    ------
    EvaluationError
    """
    try:
        rows = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise EvaluationError(f"cannot read {path}: {error}; fetch it again") from None
    if not isinstance(rows, list):
        raise EvaluationError(f"{path} holds {type(rows).__name__}, must be a list of questions: fetch it again")
    return rows


def read_lines(path: Path) -> list[Any]:
    """Return the rows of JSON lines.

    Raises
    ------
    EvaluationError
    """
    rows = []
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise EvaluationError(f"cannot read {path}: {error}; fetch it again") from None
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                rows.append(json.loads(line))
            except ValueError as error:
                raise EvaluationError(f"line {number} of {path} is not JSON: {error}; fetch it again") from None
    return rows


def read_parquet(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a Parquet file.

    Raises
    ------
    EvaluationError
        If it is unreadable, or pyarrow is not installed.
    """
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import read_table
    except ImportError:
        raise EvaluationError(f"{path} is a Parquet file: pip install 'vidsieve[benchmarks]' to read it") from None
    try:
        rows: list[dict[str, Any]] = read_table(path).to_pylist()
    except (OSError, ArrowException) as error:
        raise EvaluationError(f"cannot read {path}: {str(error).splitlines()[0]}; fetch it again") from None
    return rows


class Fields:
    """One row, whose fields are checked as they are read.

    Parameters
    ----------
    row : as it was parsed
    where : str
        Names the row in errors, as "row 12 of lvb_val.json".
    """

    def __init__(self, row: Any, where: str) -> None:
        if not isinstance(row, dict):
            raise EvaluationError(f"{where} is {type(row).__name__}, must be an object with fields")
        self.row, self.where = row, where

    def get(self, name: str, kind: type[T]) -> T:
        """Return a field of some type.

        Raises
        ------
        EvaluationError
            If it is missing or of another type.
        """
        if name not in self.row:
            raise EvaluationError(f"{self.where} has no {name}: fetch the file again")
        value = self.row[name]
        if not isinstance(value, kind) or isinstance(value, bool):
            said = repr(value)
            raise EvaluationError(f"{name} of {self.where} is {said[:60]}, must be {kind.__name__}")
        return value

    def text(self, name: str) -> str:
        """Return a text that is not empty, without blanks around it."""
        value = self.get(name, str).strip()
        if not value:
            raise EvaluationError(f"{name} of {self.where} is empty")
        return value

    def texts(self, name: str) -> tuple[str, ...]:
        """Return two or more texts."""
        values = self.get(name, list)
        if len(values) < 2 or not all(isinstance(value, str) for value in values) or len(values) > len(LETTERS):
            raise EvaluationError(f"{name} of {self.where} is {str(values)[:60]}, must be two or more texts")
        return tuple(value.strip() for value in values)

    def letter(self, name: str, options: Sequence[str]) -> str:
        """Return the letter of the option whose text a field has: of equal ones the last, as MLVU's own script does.

        Raises
        ------
        EvaluationError
            If no option has that text.
        """
        wanted = self.text(name)
        places = [place for place, option in enumerate(options) if option == wanted]
        if not places:
            raise EvaluationError(f"{name} of {self.where} is {wanted[:60]!r}, which is none of {list(options)}")
        return LETTERS[places[-1]]


def rows_of(path: Path, rows: Sequence[Any]) -> list[Fields]:
    """Return the rows of a file, each named by its number from 1."""
    return [Fields(row, f"row {number} of {path}") for number, row in enumerate(rows, 1)]


class Videos:
    """The video files in a folder, found by name; where it has another ending, or none, by stem."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.stems: dict[str, list[Path]] = {}
        for path in sorted(folder.iterdir()) if os.path.isdir(folder) else []:
            if os.path.isfile(path) and not path.name.startswith("."):
                self.stems.setdefault(path.stem, []).append(path)

    def find(self, name: str) -> Path:
        """Return the file of a video; where there is none, the path at which it was looked for.

        Raises
        ------
        EvaluationError
            If several files may be meant.
        """
        wanted = self.folder / name
        if os.path.isfile(wanted):
            return wanted
        stem = wanted.stem if wanted.suffix.lower() in ENDINGS else name
        found = self.stems.get(stem, [])
        if len(found) > 1:
            raise EvaluationError(f"{found[0]} and {found[1].name} may both be the video {name!r}: remove one")
        return found[0] if found else (wanted if wanted.suffix.lower() in ENDINGS else wanted.with_name(f"{name}.mp4"))


ENDINGS = (".mp4", ".mkv", ".webm", ".avi", ".mov")


def without_letter(option: str, place: int) -> str:
    """Return an option of a list in which each begins with its letter, as "B. a cat" or "(B) a cat", without it."""
    letter, text = LETTERS[place], option.strip()
    for mark in (f"{letter}.", f"({letter})", f"{letter})", f"{letter}:"):
        if text.startswith(mark):
            return text[len(mark) :].strip()
    return text
