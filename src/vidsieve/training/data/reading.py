"""Records of a published file one after the other, so that memory does not grow with the file.

JSON lists, JSON lines, CSV and Parquet are told apart by name and first byte; what the records mean is for `layouts`.
"""

from __future__ import annotations

import codecs
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

CHUNK = 2**16
"""Bytes of a JSON list that are read at a time."""
LONGEST = 2**26
"""Characters of the longest record of a JSON list."""
_BLANK = re.compile(r"[\s,]*")
_CLOSED = re.compile(r"\s*[,\]]")
BATCH = 64
"""Rows of a Parquet file in memory at a time; each may hold an image."""


class MalformedError(ValueError):
    """What is wrong with one record."""


def raw_records(path: Path) -> Iterator[tuple[int, Any]]:
    """Yield the records of a file with their numbers: the line in JSON lines, else counted from 1.

    A line that is not JSON comes as the `MalformedError` that says so.

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
        else:
            with path.open("rb") as file:
                first = _first(file)
                if first == b"[":
                    yield from _list(path, file)
                else:
                    yield from _lines(file)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise TrainingError(f"cannot read {path}: {error}") from None


def image_fault(image: Path | bytes) -> str:
    """Return what is wrong with an image, a file or its bytes, as far as its format checks itself; or an empty text."""
    if isinstance(image, Path) and not os.path.isfile(image):
        return "missing image"
    try:
        with Image.open(BytesIO(image) if isinstance(image, bytes) else image) as opened:
            opened.verify()
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return "unreadable image"
    return ""


def _first(file: IO[bytes]) -> bytes:
    """Return the first byte that is no blank, and leave the file before it."""
    while True:
        place = file.tell()
        byte = file.read(1)
        if byte == b"\xef" and place == 0:  # a byte order mark
            file.read(2)
        elif not byte.isspace() or not byte:
            file.seek(place)
            return byte


def _list(path: Path, file: IO[bytes]) -> Iterator[tuple[int, Any]]:
    """Yield the items of a JSON list, one in memory at a time; NaN and Infinity are read as Python writes them."""
    characters, decoder = codecs.getincrementaldecoder("utf-8")(), json.JSONDecoder()
    file.read(1)  # the bracket
    buffer, place, number, ended = "", 0, 0, False

    def more() -> bool:
        nonlocal buffer, place, ended
        # Twice as much each time: a long item is not decoded from its start again and again.
        read = file.read(max(CHUNK, len(buffer) - place))
        buffer, place, ended = buffer[place:] + characters.decode(read, not read), 0, not read
        return bool(read)

    while True:
        place = _BLANK.match(buffer, place).end()  # type: ignore[union-attr]
        if place == len(buffer):
            if more():
                continue
            raise TrainingError(f"{path} breaks off after record {number}: fetch it again")
        if buffer[place] == "]":
            return
        try:
            record, end = decoder.raw_decode(buffer, place)
            what = "" if _CLOSED.match(buffer, end) else "Expecting ',' or ']'"  # a number may go on
        except json.JSONDecodeError as error:
            what = error.msg
        if not what:
            place, number = end, number + 1
            yield number, record
        elif ended or len(buffer) - place > LONGEST or not more():
            raise TrainingError(f"{path} is not JSON in record {number + 1}: {what}")


def _lines(file: IO[bytes]) -> Iterator[tuple[int, Any]]:
    file.seek(0)  # blank lines count
    for number, line in enumerate(file, 1):  # a text may hold other ends of lines, as U+2028
        if not line.removeprefix(b"\xef\xbb\xbf").strip():
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
            number = 0
            for batch in file.iter_batches(batch_size=BATCH):
                for record in batch.to_pylist():
                    number += 1
                    yield number, record
    except arrow.ArrowException as error:
        raise TrainingError(f"cannot read {path}: {error}; fetch it again") from None
