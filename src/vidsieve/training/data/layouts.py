"""Published files of videos with questions or captions, read into rows of one form.

A row has ``video`` (an absolute path), ``question``, ``options``, ``answer`` and ``problem_type``, or ``caption`` and
perhaps ``prompt``; ``source`` where the file names the set of a record. Rows of still images have ``frames``
(pseudo-videos, as `vidsieve data pseudo` writes them) or ``image``, with `IMAGE_BYTES` where the file holds them. A
layout is one file in `formats` and one line in `LAYOUTS`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args

import msgspec

from vidsieve.errors import TrainingError
from vidsieve.io.files import relative
from vidsieve.training.data.reading import MalformedError, raw_records
from vidsieve.video import is_inside

LAYOUTS = {
    "koala-36m": "vidsieve.training.data.formats.koala",
    "llava": "vidsieve.training.data.formats.llava",
    "video-r1": "vidsieve.training.data.formats.video_r1",
    "vidsieve": "vidsieve.training.data.formats.jsonl",
}
"""Name: module with ``LAYOUT``. The first one that `matches` reads a file."""

IMAGE_BYTES, INSIDE = "vidsieve:bytes", "vidsieve:inside"
"""Fields of a row whose image is in the file itself: its bytes, and, once these are checked and left out, the mark."""

Words = Annotated[str, msgspec.Meta(max_length=2**16)]
"""A text of a question, as a field of a `msgspec.Struct`: no longer than regular expressions read at once."""
Text = Annotated[str, msgspec.Meta(pattern=r"\S", max_length=2**16)]
"""One that is not empty."""
Name = Annotated[str, msgspec.Meta(pattern=r"\S", max_length=4096)]
"""The path of a file."""
Form = TypeVar("Form", bound=msgspec.Struct)
Rows = tuple[list[dict[str, Any]], dict[str, int]]


@dataclass(frozen=True)
class Layout:
    """A published file format.

    Parameters
    ----------
    name, title : str
        Key in `LAYOUTS`, and the usual name of the set.
    matches : callable
        ``matches(record)`` is true for an object of this layout.
    rows : callable
        ``rows(record, folder, file)`` returns the rows of a record, paths from the folder, and the number of its parts
        that are not for training, by reason. Raises `MalformedError`.
    """

    name: str
    title: str
    matches: Callable[[dict[str, Any]], bool]
    rows: Callable[[Any, Path, Path], Rows]


@dataclass(frozen=True)
class Record:
    """The rows of one record of a file.

    Parameters
    ----------
    number : int
        The record's line in JSON lines, else its place from 1.
    rows : tuple of dict
        A conversation may give several; none where the record is not for training or wrong.
    left_out : dict
        Number of parts that are not for training, such as images in a file of videos, by reason.
    fault : str
        What is wrong with the record; empty where nothing is.
    """

    number: int
    rows: tuple[dict[str, Any], ...] = ()
    left_out: dict[str, int] = field(default_factory=dict)
    fault: str = ""


def checked(record: Any, form: type[Form]) -> Form:
    """Return a record as a struct.

    Raises
    ------
    MalformedError
        If a field is missing or has another type.
    """
    try:
        return msgspec.convert(record, form)
    except msgspec.ValidationError as error:
        fault, _, place = str(error).replace("`", "").partition(" - at $")
        place, fault = place.lstrip("."), fault[:1].lower() + fault[1:]
        fault = fault.replace(r"str matching regex '\\S'", "a text that is not empty").replace("str of", "a text of")
        fault = fault.replace("object missing required field", "missing field")
        if fault.startswith("invalid enum value"):
            known = next(part.type for part in msgspec.structs.fields(form) if part.encode_name == place)
            fault += f", must be one of {', '.join(get_args(known))}"
        raise MalformedError(f"{place}: {fault}" if place else fault) from None


def layout_of(path: Path) -> Layout:
    """Return the layout of a file, by its first record that is an object.

    Raises
    ------
    TrainingError
        If the file is unreadable, holds nothing, or is of no known layout.
    """
    record = None
    for _, record in raw_records(path):
        if isinstance(record, dict):
            break
    known: list[Layout] = [import_module(module).LAYOUT for module in LAYOUTS.values()]
    if isinstance(record, dict):
        for layout in known:
            if layout.matches(record):
                return layout
        fields = ", ".join(f"{name!s:.40}" for name in list(record)[:8])
    elif record is None:
        raise TrainingError(f"{path} holds no records; fetch it again")
    elif isinstance(record, MalformedError):
        raise TrainingError(f"{path}: its first record {record}")
    else:
        fields = type(record).__name__
    titles = ", ".join(layout.title for layout in known)
    raise TrainingError(f"{path} is of no known layout: its first record has {fields}. Known: {titles}")


def read_records(path: Path, root: Path | None = None) -> Iterator[Record]:
    """Yield the rows of each record of a published file, one record in memory at a time.

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


def confined_records(path: Path, root: Path | None = None) -> Iterator[Record]:
    """Yield what `read_records` does; with a `root`, files outside it, after symbolic links, are faults of a record."""
    for record in read_records(path, root):
        names = {name: None for row in record.rows if IMAGE_BYTES not in row for name in files_of(row)}
        outside = next((name for name in names if root is not None and not is_inside(name, root)), None)
        if outside is None:
            yield record
        else:
            yield Record(record.number, fault=f"{outside} lies outside {root}, the folder that paths start from")


def files_of(row: Mapping[str, Any]) -> list[str]:
    """Return the paths of a row's files: its video, or its still images; none if its image is inside the file."""
    if INSIDE in row:
        return []
    if "frames" in row:
        return [name for name, _ in row["frames"]]
    return [row["video"] if "video" in row else row["image"]]


def moved(row: Mapping[str, Any], out: Path) -> dict[str, Any]:
    """Return the fields of a row that name files, with paths from the folder of `out`."""
    if "frames" in row:
        return {"frames": [[path_from(name, out), times] for name, times in row["frames"]]}
    shown = "video" if "video" in row else "image"
    return {shown: path_from(row[shown], out)}


def path_from(name: str, out: Path) -> str:
    """Return the path of a file from the folder of `out`; links to files keep their names."""
    folder, file = os.path.split(name)
    return os.path.normpath(f"{_folder_from(folder, out)}/{file}")


@lru_cache(4096)
def _folder_from(folder: str, out: Path) -> str:  # most rows have few folders, and to resolve one takes long
    return relative(Path(folder), out)
