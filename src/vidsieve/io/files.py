"""Writing files so that they are complete or not there at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from safetensors import SafetensorError

from vidsieve.errors import OutputError


@contextmanager
def writing(path: Path) -> Iterator[Path]:
    """Give a temporary path beside `path`, renamed to it when the block ends well and removed when it fails.

    A link stays one: the file it names is replaced. What is there and no file, as a pipe, is written to as it is.

    Raises
    ------
    OutputError
        If the folder or the file cannot be written.
    """
    path = Path(os.path.realpath(path))
    if os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path):
        try:
            yield path
        except OSError as error:
            raise OutputError(f"cannot write {path}: {error.strerror or error}") from error
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror or error}") from None
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror or error}") from error
    except SafetensorError as error:  # a full disk, too, comes as this from tensors
        raise OutputError(f"cannot write {path}: {error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def append(file: IO[bytes], line: bytes, path: Path) -> None:
    """Write a line at the end of a file opened for it; it is on the disk when this returns.

    Raises
    ------
    OutputError
        If it cannot be written.
    """
    try:
        left = memoryview(line)
        while left:  # an unbuffered file may take a part
            left = left[file.write(left) :]
        file.flush()
        os.fsync(file.fileno())
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror}") from None


def relative(path: Path, file: Path) -> str:
    """Return the way to `path` from the folder of `file`, as a file of rows names it."""
    return Path(os.path.relpath(path.resolve(), file.resolve().parent)).as_posix()
