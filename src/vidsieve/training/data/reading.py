"""Raw records of a file, one after the other, so that memory does not grow with the file.

JSON lists, JSON lines, CSV and Parquet differ in name and first byte. `layouts` gives the records their meaning.
"""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import IO, Any

from PIL import Image

from vidsieve.errors import TrainingError
from vidsieve.io.bounded import CHUNK, check_value, lines, list_items, opened, parsed, too_long
from vidsieve.io.limits import limits
from vidsieve.video.reading import open_image

BATCH = 64
"""Most rows of a Parquet file in memory at a time; each may hold an image."""
_GROUP = 16
"""Bytes in one group of Parquet rows that memory may hold at once, in longest rows."""
_VALUE = 16
"""Bytes that a value of a Parquet row counts in addition to its own: an empty list has none."""
MOST_COLUMNS = 4096
"""Columns of a CSV file."""
_MOST_PARTS = 2**16
"""Columns, and groups of rows, of a Parquet file: each takes kilobytes before anything is read."""
_LEVELS = 4
"""Bytes that a nested value takes while its group is decoded, whatever its own."""
_LONGEST_FAULT = 300
_BOM = b"\xef\xbb\xbf"


class MalformedError(ValueError):
    """A fault of one record, in one short text."""

    def __init__(self, fault: object) -> None:
        super().__init__(str(fault)[:_LONGEST_FAULT])


def raw_records(path: Path) -> Iterator[tuple[int, Any]]:
    """Yield the records of a file with their numbers: the line in JSON lines, else counted from 1.

    A record that is longer than `limits.row`, not JSON, nested too deeply, or has a text with NUL or half of a
    surrogate pair, is yielded as a `MalformedError`. NaN and Infinity are read as Python writes them.

    Raises
    ------
    TrainingError
        If the file is unreadable, or breaks off.
    """
    try:
        with opened(path, TrainingError) as file:
            if path.suffix == ".parquet":
                yield from _parquet(path)
                return
            is_list = file.read(CHUNK).removeprefix(_BOM).lstrip().startswith(b"[")
            file.seek(0)
            read = _csv if path.suffix == ".csv" else _list if is_list else _lines
            yield from read(path, file)
    except OSError as error:
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


def _record(text: bytes | None) -> Any:
    """Return what a JSON text holds, or its fault; None stands for a text that is too long."""
    try:
        if text is None or len(text) > limits.row:
            raise ValueError(too_long(limits.row))
        return parsed(text)
    except ValueError as error:
        return MalformedError(error)


def _list(path: Path, file: IO[bytes]) -> Iterator[tuple[int, Any]]:
    number = 0
    try:
        for number, text in enumerate(list_items(file, limits.row), 1):
            yield number, _record(text)
    except ValueError as error:
        raise TrainingError(f"cannot read {path}: it {error} after record {number}: fetch it again") from None


def _lines(path: Path, file: IO[bytes]) -> Iterator[tuple[int, Any]]:
    for number, line, _ in lines(file, limits.row):  # a text may hold other ends of lines, such as U+2028
        if line.removeprefix(_BOM).strip():
            yield number, _record(line)


def _csv(path: Path, file: IO[bytes]) -> Iterator[tuple[int, Any]]:
    taken, place, number = 0, 0, 0

    def text(line: tuple[int, bytes, int]) -> str:
        nonlocal taken, place
        taken, place = taken + line[2], line[0]
        if taken > limits.row:
            raise ValueError(too_long(limits.row))
        return line[1].decode("utf-8-sig" if line[0] == 1 else "utf-8")

    csv.field_size_limit(limits.row)
    reader = csv.DictReader(map(text, lines(file, limits.row)))  # a map goes on after an error, a generator does not
    try:
        known = reader.fieldnames is not None
        if known and len(reader.fieldnames or ()) > MOST_COLUMNS:  # every row has a value for each
            raise ValueError(f"it has more than {MOST_COLUMNS:,} columns")
    except (ValueError, csv.Error) as error:
        raise TrainingError(f"cannot read {path}: {error}") from None
    while known:
        taken, begun = 0, place + 1
        try:
            record: Any = next(reader)
            check_value(record)
        except StopIteration:
            return
        except (ValueError, csv.Error) as error:
            if taken > limits.row and place > begun:  # the rows behind it are in it
                raise TrainingError(
                    f"cannot read {path}: the record from line {begun} on {error}, or its quote is not closed"
                ) from None
            record = MalformedError(error)
        number += 1
        yield number, record


def _parquet(path: Path) -> Iterator[tuple[int, Any]]:
    try:
        import pyarrow as arrow
        import pyarrow.parquet as parquet
    except ImportError:
        raise TrainingError(f"{path} needs pyarrow: pip install 'vidsieve[benchmarks]'") from None
    try:
        with parquet.ParquetFile(path, buffer_size=2**20, thrift_container_size_limit=_MOST_PARTS) as file:
            number = 0
            nested = any(field.type.num_fields for field in file.schema_arrow)
            for batch in file.iter_batches(batch_size=_batch(path, file.metadata, nested)):
                for place in range(len(batch)):
                    number += 1
                    yield number, _arrow_record(batch.slice(place, 1))
    except (arrow.ArrowException, OSError, ValueError, KeyError, OverflowError) as error:
        fault = " ".join(str(error).split())
        raise TrainingError(f"cannot read {path}: {fault:.300}; fetch it again") from None


_COUNT = """
import sys
from pyarrow.parquet import read_metadata
metadata = read_metadata(sys.argv[1])
groups = (metadata.row_group(number) for number in range(metadata.num_row_groups))
print(max(sum(group.column(place).num_values for place in range(group.num_columns)) for group in groups))
"""


def _batch(path: Path, metadata: Any, nested: bool) -> int:
    """Return the number of rows to decode at a time; refuse groups that memory may not hold."""
    count = metadata.num_row_groups
    largest = max((metadata.row_group(number).total_byte_size for number in range(count)), default=0)
    most = _GROUP * limits.row
    if nested and count:  # one row may hold many values, in no bytes if they are equal
        run = [sys.executable, "-c", _COUNT, str(path)]  # which damaged metadata of columns ends
        counted = subprocess.run(run, capture_output=True, text=True, check=False)
        if counted.returncode:
            raise TrainingError(f"cannot read {path}: its columns are damaged; fetch it again")
        largest = max(largest, _LEVELS * int(counted.stdout))
    if largest > max(most, 2 * path.stat().st_size):  # images do not compress; what does by much may fill memory
        raise TrainingError(
            f"{path} has {largest:,} bytes in one group of rows: a larger --max-row allows more, or write it in "
            "smaller groups"
        )
    return max(1, min(BATCH, most // max(1, largest)))


def _arrow_record(row: Any) -> Any:
    """Return the row in a record batch of one, or its fault."""
    if row.nbytes + _VALUE * sum(_values(column) for column in row.columns) > limits.row:
        return MalformedError(too_long(limits.row))
    try:
        record = row.to_pylist()[0]
        check_value(record)
    except (ValueError, OverflowError) as error:  # a text that is not UTF-8, a date out of range
        return MalformedError(error)
    return record


def _values(column: Any) -> int:
    """Return the number of values in an array of Arrow, those of nested ones too."""
    if not column.type.num_fields or not len(column):
        return len(column)
    inner = column.flatten()
    return len(column) + sum(_values(part) for part in (inner if isinstance(inner, list) else [inner]))
