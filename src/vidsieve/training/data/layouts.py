"""Published files of videos with questions or captions, read into rows of one form.

A row has ``video`` (an absolute path), ``question``, ``options``, ``answer`` and ``problem_type``, or ``caption`` and
perhaps ``prompt``; ``source`` where the file says from which set a record comes. Rows of still images have ``frames``
(pseudo-videos, as `vidsieve data pseudo` writes them) or ``image``, with its ``bytes`` where the file holds them. A
layout is one file and one line in `LAYOUTS`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from itertools import chain
from pathlib import Path
from typing import Any

from vidsieve.errors import TrainingError
from vidsieve.io.files import relative
from vidsieve.training.data.reading import MalformedError, raw_records

LAYOUTS = {
    "koala-36m": "vidsieve.training.data.koala",
    "llava": "vidsieve.training.data.llava",
    "video-r1": "vidsieve.training.data.video_r1",
    "vidsieve": "vidsieve.training.data.rows",
}
"""Name: module with ``LAYOUT``. The first whose `matches` says so reads a file."""


@dataclass(frozen=True)
class Layout:
    """How the records of a published file are read.

    Parameters
    ----------
    name, title : str
        As `LAYOUTS` has it, and what people call the set.
    matches : callable
        Says of a record whether it is of this layout.
    rows : callable
        ``rows(record, folder, file)`` returns the rows of a record, paths from the folder, and how many of its parts
        are not for us, by reason. Raises `MalformedError`.
    """

    name: str
    title: str
    matches: Callable[[Any], bool]
    rows: Callable[[Any, Path, Path], tuple[list[dict[str, Any]], dict[str, int]]]


@dataclass(frozen=True)
class Record:
    """What one record of a file gave.

    Parameters
    ----------
    number : int
        The record's line in JSON lines, else its place from 1.
    rows : tuple of dict
        A conversation may give several; none where the record is not for us or wrong.
    left_out : dict
        Parts that are not for us, as images in a file of videos: how many, by reason.
    fault : str
        What is wrong with the record; empty where nothing is.
    """

    number: int
    rows: tuple[dict[str, Any], ...] = ()
    left_out: dict[str, int] | None = None
    fault: str = ""


def layout_of(path: Path) -> Layout:
    """Return the layout of a file, by its first record that is an object.

    Raises
    ------
    TrainingError
        If the file is unreadable, holds nothing, or is of no known layout.
    """
    found = None
    for _, record in raw_records(path):
        found = record
        if isinstance(record, dict):
            break
    else:
        if found is None:
            raise TrainingError(f"{path} holds no records; fetch it again")
    known = [import_module(module).LAYOUT for module in LAYOUTS.values()]
    layout: Layout | None = next((layout for layout in known if layout.matches(found)), None)
    if layout is not None:
        return layout
    if isinstance(found, MalformedError):
        raise TrainingError(f"{path}: its first record {found}")
    fields = ", ".join(map(str, list(found)[:8])) if isinstance(found, dict) else type(found).__name__
    raise TrainingError(
        f"{path} is of no known layout: its first record has {fields}. Known: {', '.join(k.title for k in known)}"
    )


def read_records(path: Path, root: Path | None = None) -> Iterator[Record]:
    """Yield what the records of a published file give, one record in memory at a time.

    Parameters
    ----------
    path : Path
        JSON list, JSON lines, CSV or Parquet, of a layout in `LAYOUTS`.
    root : Path, optional
        The folder that the records' paths start from; default: the folder of the file. Nothing in it is opened here.

    Raises
    ------
    TrainingError
        As `layout_of`, or if the file breaks off.
    """
    layout = layout_of(path)
    folder = (path.parent if root is None else root).absolute()
    for number, record in raw_records(path):
        try:
            if isinstance(record, MalformedError):
                raise record
            rows, left_out = layout.rows(record, folder, path)
        except MalformedError as error:
            yield Record(number, fault=str(error))
        else:
            yield Record(number, tuple(rows), left_out)


def files_of(row: Mapping[str, Any]) -> list[str]:
    """Return the paths of the files that a row shows: its video, or its still images; none if it has its own image."""
    if "inside" in row:
        return []
    if "frames" in row:
        return [name for name, _ in row["frames"]]
    return [row["video"] if "video" in row else row["image"]]


def moved(row: Mapping[str, Any], out: Path) -> dict[str, Any]:
    """Return the fields of a row that name files, as `out` names them."""
    if "frames" in row:
        return {"frames": [[relative(Path(name), out), times] for name, times in row["frames"]]}
    field = "video" if "video" in row else "image"
    return {field: relative(Path(files_of(row)[0]), out)}


def read_all(path: Path, root: Path | None = None) -> list[dict[str, Any]]:
    """Return the rows of a file that must be right altogether.

    Raises
    ------
    TrainingError
        If it is unreadable, or a record is malformed: the text counts them and names the first ones.
    """
    records = list(read_records(path, root))
    wrong = [f"record {record.number}: {record.fault}" for record in records if record.fault]
    if wrong:
        first = "; ".join(wrong[:3]) + ("; …" if len(wrong) > 3 else "")
        raise TrainingError(
            f"{len(wrong)} of {len(records)} records in {path} are malformed, correct or remove: {first}"
        )
    return list(chain.from_iterable(record.rows for record in records))
