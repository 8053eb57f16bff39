"""Files that others wrote, read within bounds: regular files only, JSON of limited size and depth, row by row."""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Iterator
from io import BufferedReader
from pathlib import Path
from typing import IO, Any

from vidsieve.errors import VidsieveError
from vidsieve.io.limits import limits

DEPTH = 64
"""Most levels of lists and objects in a JSON text or a row."""
LONGEST_FILE = 2**24
"""Most bytes of a JSON file that is read at once."""
CHUNK = 2**16
"""Bytes that are read at a time."""
_MARK = re.compile(rb'["\[\]{},]')
_BRACKETS = re.compile(rb"[\[{]+|[\]}]+")
_TEXT = rb'"(?:[^"\\]++|\\.)*+"'
_FLAT = rb'(?:[^"\[\]{}]++|' + _TEXT + rb")*+"
_INNER = re.compile(rb'(?:[^"\[\]{}]++|' + _TEXT + rb"|[\[{]" + _FLAT + rb"[\]}])*+", re.DOTALL)
"""What closes again: texts, and lists and objects of texts and numbers."""
_QUOTED = re.compile(rb'(?:[^"\\]++|\\.)*+', re.DOTALL)


def opened(path: Path, error: type[VidsieveError]) -> BufferedReader:
    """Return a regular file, open for reading; a pipe or device is refused before it can block.

    Raises
    ------
    VidsieveError
        The type given as `error`.
    """
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise ValueError("it is a folder, a pipe or a device; name a file")
        return path.open("rb")
    except (OSError, ValueError) as fault:
        raise error(f"cannot read {path}: {getattr(fault, 'strerror', None) or fault}") from None


def read_bytes(path: Path, error: type[VidsieveError], most: int = LONGEST_FILE) -> bytes:
    """Return the contents of a regular file of at most `most` bytes.

    Raises
    ------
    VidsieveError
        The type given as `error`.
    """
    with opened(path, error) as file:
        try:
            data = file.read(most + 1)
        except OSError as fault:
            raise error(f"cannot read {path}: {fault.strerror}") from None
    if len(data) > most:
        raise error(f"cannot read {path}: it has more than {most:,} bytes")
    return data


def read_json(path: Path, error: type[VidsieveError], advice: str, kind: type | None = None) -> Any:
    """Return what a JSON file holds, of type `kind` if that is given.

    Raises
    ------
    VidsieveError
        The type given as `error`; its text ends in `advice`.
    """
    try:
        value = parsed(read_bytes(path, error))
    except ValueError as fault:
        if isinstance(fault, VidsieveError):
            raise
        raise error(f"{path} is damaged (it {fault}): {advice}") from None
    if kind is not None and not isinstance(value, kind):
        raise error(f"{path} is damaged (it holds {type(value).__name__}, not {kind.__name__}): {advice}")
    return value


def read_json_lines(path: Path, error: type[VidsieveError], advice: str) -> list[dict[str, Any]]:
    """Return the objects in the lines of a JSON Lines file.

    Raises
    ------
    VidsieveError
        The type given as `error`, which names the first damaged line; its text ends in `advice`.
    """
    rows: list[dict[str, Any]] = []
    with opened(path, error) as file:
        for number, line, _ in lines(file, limits.row):
            try:
                rows.append(parsed(line))
                if not isinstance(rows[-1], dict):
                    raise ValueError("is no JSON object")
            except ValueError as fault:
                raise error(f"line {number} of {path} {fault}: {advice}") from None
    return rows


def parsed(text: bytes) -> Any:
    """Return what a JSON text holds. NaN and Infinity are read as Python writes them.

    Raises
    ------
    ValueError
        If it is not JSON in UTF-8, is nested too deeply, or holds texts that `check_value` refuses.
    """
    try:
        value = json.loads(text.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ValueError(f"is not UTF-8: {error}") from None
    except RecursionError:
        raise ValueError(_TOO_DEEP) from None
    except ValueError as error:
        raise ValueError(f"is not JSON: {error}") from None
    if b"\\u" in text or text.count(b"[") + text.count(b"{") > DEPTH:
        check_value(value)
    return value


def check_value(value: Any) -> None:
    """Refuse a value of lists and dicts that is nested too deeply, or has a text that cannot be written or opened.

    Raises
    ------
    ValueError
        If it has more than `DEPTH` levels, a NUL character or half of a surrogate pair.
    """
    level = [value]
    for _ in range(DEPTH + 1):
        inner: list[Any] = []
        for part in level:
            if isinstance(part, str):
                _check_text(part)
            elif isinstance(part, dict):
                inner += part.keys()
                inner += part.values()
            elif isinstance(part, list):
                inner += part
        if not inner:
            return
        level = inner
    raise ValueError(_TOO_DEEP)


_TOO_DEEP = f"is nested deeper than {DEPTH} levels"


def _check_text(text: str) -> None:
    if "\0" in text:
        raise ValueError("holds a NUL character")
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError:
            raise ValueError("holds half of a surrogate pair") from None


# -- rows -----------------------------------------------------------------------------------------------------


def too_long(most: int) -> str:
    """Return the fault of a row of more than `most` bytes."""
    return f"has more than {most:,} bytes: --max-row allows more"


def lines(file: IO[bytes], most: int) -> Iterator[tuple[int, bytes, int]]:
    """Yield the lines of a file from its position on: number from 1, text, and length in bytes.

    Of a line longer than `most` the first bytes are yielded, more than `most`, and the rest is read past.
    """
    number = 0
    while line := file.readline(most + 1):
        number, length = number + 1, len(line)
        if length > most:
            end = line
            while not end.endswith(b"\n") and (end := file.readline(CHUNK)):
                length += len(end)
        yield number, line, length


def list_items(file: IO[bytes], most: int) -> Iterator[bytes | None]:
    """Yield the text of each item of a JSON list; None for one of more than `most` bytes, which is read past.

    Items are told apart by brackets, quotes and commas, and not checked any further. Empty ones are left out.

    Raises
    ------
    ValueError
        If the list does not end, or the file does not end with it.
    """
    buffer = b""
    while b"[" not in buffer:
        buffer += file.read(CHUNK)
    begin = place = buffer.index(b"[") + 1
    depth, quoted, whole = 1, False, True
    while depth:
        if quoted:
            place = _QUOTED.match(buffer, place).end()  # type: ignore[union-attr]
            if buffer[place : place + 1] == b'"':
                quoted, place = False, place + 1
                continue
        elif depth > 1:
            place = _INNER.match(buffer, place).end()  # type: ignore[union-attr]
            if run := _BRACKETS.match(buffer, place):
                opens = run[0][:1] in b"[{"
                size = len(run[0]) if opens else min(len(run[0]), depth - 1)
                depth, place = depth + (size if opens else -size), place + size
                continue
            if buffer[place : place + 1] == b'"':
                quoted, place = True, place + 1
                continue
        elif found := _MARK.search(buffer, place):
            mark, place = found[0], found.end()
            quoted = mark == b'"'
            depth += (mark in b"[{") - (mark in b"]}")
            if depth == 0 or (depth == 1 and mark == b","):
                text, whole = buffer[begin : place - 1], whole and place - 1 - begin <= most
                if not whole or text.strip():
                    yield text if whole else None
                begin, whole = place, True
            if depth == 0 and mark == b"}":
                raise ValueError("closes a bracket that is not open")
            continue
        else:
            place = len(buffer)
        if not whole or place - begin > most:
            whole, begin = False, place
        more = file.read(max(CHUNK, place - begin))
        if not more:
            raise ValueError("breaks off")
        buffer, place, begin = buffer[begin:] + more, place - begin, 0
    if (buffer[place:] + file.read(CHUNK)).strip():
        raise ValueError("goes on behind its list")
