"""Atomic writing of files."""

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
    """Yield a temporary path next to `path`, renamed to it when the block ends and removed when it raises.

    The target of a symbolic link is replaced, not the link. A pipe or device is written to directly.

    Raises
    ------
    OutputError
        If the folder or the file cannot be written.
    """
    path = Path(os.path.realpath(path))
    temporary = None
    try:
        if os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path):
            yield path
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
        os.close(handle)
        temporary = Path(name)
        yield temporary
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror or error}") from error
    except SafetensorError as error:  # raised for a full disk, too
        raise OutputError(f"cannot write {path}: {error}") from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def append(file: IO[bytes], line: bytes, path: Path) -> None:
    """Append a line to an open file; it is on the disk when this returns.

    Raises
    ------
    OutputError
        If it cannot be written.
    """
    try:
        left = memoryview(line)
        while left:  # an unbuffered file may write a part
            left = left[file.write(left) :]
        file.flush()
        os.fsync(file.fileno())
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror}") from None


def relative(path: Path, file: Path) -> str:
    """Return `path` relative to the folder of `file`, with forward slashes."""
    return Path(os.path.relpath(path.resolve(), file.resolve().parent)).as_posix()
