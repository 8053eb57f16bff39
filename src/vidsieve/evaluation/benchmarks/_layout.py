"""Common parts of the readers of published folders: files by name, rows by type, videos by stem."""

from __future__ import annotations

import os
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, TypeVar

import msgspec

from vidsieve.errors import EvaluationError, TrainingError
from vidsieve.options import LETTERS
from vidsieve.training.data.reading import MalformedError, raw_records


def one_file(folder: Path, *names: str) -> Path:
    """Return the one of some files that a folder has, by their names or patterns below it.

    Raises
    ------
    EvaluationError
        If there is none, or several.
    """
    if not os.path.isdir(folder):
        raise EvaluationError(f"{folder} is not a folder: give the one that holds {' or '.join(names)}")
    paths = [path for name in names for path in sorted(folder.glob(name))]
    if len(paths) > 1:
        raise EvaluationError(
            f"{folder} has {' and '.join(str(path.relative_to(folder)) for path in paths)}, of which one is expected: "
            "remove the others"
        )
    if paths:
        return paths[0]
    there = {
        path.name: path for path in folder.rglob("*") if os.path.isfile(path) and path.suffix == Path(names[0]).suffix
    }
    near = get_close_matches(Path(names[0]).name, there, n=1, cutoff=0.5)
    hint = f"; {there[near[0]].relative_to(folder)} is there: was it renamed or moved?" if near else ""
    raise EvaluationError(f"{folder} has no {' or '.join(names)}{hint}")


def one_folder(folder: Path, *names: str) -> Path:
    """Return the first of some folders below another that is there; the first of all where none is."""
    return next((folder / name for name in names if os.path.isdir(folder / name)), folder / names[0])


Text = Annotated[str, msgspec.Meta(min_length=1)]
Options = Annotated[tuple[str, ...], msgspec.Meta(min_length=2, max_length=len(LETTERS))]
Row = TypeVar("Row", bound=msgspec.Struct)


def rows_of(path: Path, kind: type[Row]) -> list[Row]:
    """Return the rows of a JSON list, of JSON lines or of a Parquet file, checked; texts have no blanks around them.

    Parameters
    ----------
    kind : type
        Fields of a row; others are ignored.

    Raises
    ------
    EvaluationError
        If the file cannot be read, or a row has other fields; the text names the first one.
    """
    rows = []
    try:
        for number, row in raw_records(path):
            try:
                if isinstance(row, MalformedError):
                    raise row
                rows.append(msgspec.convert(_stripped(row), kind))
            except ValueError as error:
                raise EvaluationError(f"row {number} of {path}: {error!s:.300}; fetch the file again") from None
    except TrainingError as error:
        raise EvaluationError(str(error)) from None
    if not rows:
        raise EvaluationError(f"{path} holds no rows: fetch it again")
    return rows


def _stripped(value: Any) -> Any:
    """Return a parsed value with no blanks around its texts."""
    if isinstance(value, dict):
        return {name: _stripped(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_stripped(inner) for inner in value]
    return value.strip() if isinstance(value, str) else value


def letter_of(answer: str, options: Sequence[str], question: str) -> str:
    """Return the letter of the option with a text: of equal ones the last, as in MLVU's own script.

    Raises
    ------
    EvaluationError
        If no option has that text.
    """
    places = [place for place, option in enumerate(options) if option == answer]
    if not places:
        raise EvaluationError(f"the answer {answer!r} of question {question!r} is none of {list(options)}")
    return LETTERS[places[-1]]


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
        paths = self.stems.get(stem, [])
        if len(paths) > 1:
            raise EvaluationError(f"{paths[0]} and {paths[1].name} may both be the video {name!r}: remove one")
        return paths[0] if paths else (wanted if wanted.suffix.lower() in ENDINGS else wanted.with_name(f"{name}.mp4"))


ENDINGS = (".mp4", ".mkv", ".webm", ".avi", ".mov")


def without_letter(option: str, place: int) -> str:
    """Return an option of a list in which each begins with its letter, as "B. a cat" or "(B) a cat", without it."""
    letter, text = LETTERS[place], option.strip()
    for mark in (f"{letter}.", f"({letter})", f"{letter})", f"{letter}:"):
        if text.startswith(mark):
            return text[len(mark) :].strip()
    return text
