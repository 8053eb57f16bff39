"""Raw records of a file, one after the other, so that memory does not grow with the file.

JSON lists, JSON lines, CSV and Parquet differ in name and first byte. `layouts` gives the records their meaning.
"""

from __future__ import annotations

import csv
import json
import os
import re
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import IO, Any

from PIL import Image

from vidsieve.errors import TrainingError
from vidsieve.video.reading import open_image

CHUNK = 2**16
"""Characters of a JSON list that are read at a time."""
LONGEST = 2**26
"""Characters of the longest record of a JSON list."""
BATCH = 64
"""Rows of a Parquet file in memory at a time; each may hold an image."""
_BOM = b"\xef\xbb\xbf"
_BLANK = re.compile(r"[\s,]*")
_CLOSED = re.compile(r"\s*[,\]]")


class MalformedError(ValueError):
    """A fault of one record."""


def raw_records(path: Path) -> Iterator[tuple[int, Any]]:
    """Yield the records of a file with their numbers: the line in JSON lines, else counted from 1.

    A line that is not JSON is yielded as a `MalformedError`. NaN and Infinity are read as Python writes them.

    Raises
    ------
    TrainingError
        If the file is unreadable, or breaks off.
    """
    try:
        if path.suffix == ".csv":
            yield from _csv(path)
        elif path.suffix == ".parquet":
            yield from _parquet(path)
        elif _is_list(path):
            with path.open(encoding="utf-8-sig") as file:
                yield from _list(path, file)
        else:
            yield from _lines(path)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise TrainingError(f"cannot read {path}: {error}") from None


def image_fault(image: Path | bytes) -> str:
    """Return the fault of an image, a file or its bytes, as far as its format checks itself; empty without one."""
    if isinstance(image, Path) and not os.path.isfile(image):
        return "missing image"
    try:
        with open_image(BytesIO(image) if isinstance(image, bytes) else image) as opened:
            opened.verify()
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return "unreadable image"
    return ""


def _is_list(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(CHUNK).removeprefix(_BOM).lstrip().startswith(b"[")


def _list(path: Path, file: IO[str]) -> Iterator[tuple[int, Any]]:
    decoder, number = json.JSONDecoder(), 0
    buffer, place = file.read(CHUNK), 0
    place = buffer.index("[") + 1
    while True:
        place = _BLANK.match(buffer, place).end()  # type: ignore[union-attr]
        if buffer.startswith("]", place):
            return
        try:
            record, end = decoder.raw_decode(buffer, place)
            fault = "" if _CLOSED.match(buffer, end) else "Expecting ',' or ']'"  # a number may go on
        except json.JSONDecodeError as error:
            fault = error.msg
        if not fault:
            place, number = end, number + 1
            yield number, record
            continue
        length = len(buffer) - place
        # Twice as much each time: a long record is not decoded from its start again and again.
        more = file.read(max(CHUNK, length)) if length <= LONGEST else ""
        if not more and not length:
            raise TrainingError(f"{path} breaks off after record {number}: fetch it again")
        if not more:
            raise TrainingError(f"{path} is not JSON in record {number + 1}: {fault}")
        buffer, place = buffer[place:] + more, 0


def _lines(path: Path) -> Iterator[tuple[int, Any]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):  # a text may hold other ends of lines, such as U+2028
            if not line.removeprefix(_BOM).strip():
                continue
            try:
                yield number, json.loads(line.decode("utf-8-sig"))
            except UnicodeDecodeError as error:
                yield number, MalformedError(f"is not UTF-8: {error}")
            except ValueError as error:
                yield number, MalformedError(f"is not JSON: {error}")


def _csv(path: Path) -> Iterator[tuple[int, Any]]:
    csv.field_size_limit(2**24)
    with path.open(encoding="utf-8-sig", newline="") as file:
        yield from enumerate(csv.DictReader(file), 1)


def _parquet(path: Path) -> Iterator[tuple[int, Any]]:
    try:
        import pyarrow as arrow
        import pyarrow.parquet as parquet
    except ImportError:
        raise TrainingError(f"{path} needs pyarrow: pip install 'vidsieve[benchmarks]'") from None
    try:
        with parquet.ParquetFile(path) as file:
            batches = file.iter_batches(batch_size=BATCH)
            yield from enumerate((record for batch in batches for record in batch.to_pylist()), 1)
    except arrow.ArrowException as error:
        raise TrainingError(f"cannot read {path}: {error}; fetch it again") from None
