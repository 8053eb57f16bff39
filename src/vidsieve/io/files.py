"""Atomic writing of files, and locks on what a run writes."""

from __future__ import annotations

import errno
import os
import re
import socket
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from filelock import BaseFileLock, FileLock, SoftFileLock, Timeout
from safetensors import SafetensorError

from vidsieve.errors import OutputError, VidsieveError

RUN, METRICS = "run.json", "metrics.jsonl"
_HOLDS = {RUN: "results of `eval`, `bench` or `data filter`", METRICS: "a training run"}


def beside(target: Path, kind: str) -> Path:
    """Return what a command writes beside its output ``out.jsonl``: ``out.KIND``, such as "journal.jsonl", "blind"."""
    return target.with_name(f"{target.name.removesuffix('.jsonl')}.{kind}")


@contextmanager
def writing(path: Path, keep: Path | None = None) -> Iterator[Path]:
    """Yield a temporary path next to `path`, renamed to it when the block ends and removed when it raises.

    The file is on the disk before it is renamed, and the folder's entry before this returns. The target of a symbolic
    link is replaced, not the link. A pipe or device is written to directly.

    Parameters
    ----------
    keep : Path, optional
        New name of the file that is replaced. A process killed between the two renames leaves only this one.

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
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        if keep is not None and os.path.exists(path):
            os.replace(path, keep)
        os.replace(temporary, path)
        sync_folder(path.parent)
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror or error}") from error
    except SafetensorError as error:  # raised for a full disk, too
        raise OutputError(f"cannot write {path}: {error}") from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Wait until a folder's entries are on the disk, where the system can."""
    with suppress(OSError):  # Windows opens no folder, and some network file systems do not wait for one
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


@contextmanager
def locked(path: Path, error: type[VidsieveError] = OutputError) -> Iterator[None]:
    """Keep other processes from writing a file, or the folder that it stands for, until the block ends.

    The lock is a hidden file beside the target of `path`; it ends with the process that holds it. A network file system
    without locks gets a `SoftFileLock`: that of a process killed on another machine has to be removed by hand.

    Raises
    ------
    VidsieveError
        If another process holds the lock; the type given as `error`.
    OutputError
        If the lock cannot be written.
    """
    real = Path(os.path.realpath(path))
    name = real.with_name(f".{real.name}.lock")
    lock: BaseFileLock = FileLock(name, timeout=0)
    try:
        name.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire()
        except OSError as failed:
            if failed.errno not in (errno.ENOLCK, errno.EOPNOTSUPP):  # filelock itself sees to ENOSYS
                raise
            name.unlink(missing_ok=True)
            name = name.with_suffix(".softlock")
            lock = SoftFileLock(name, timeout=0)
            lock.acquire()
        holder = f"{os.getpid()}\n"
        if not _beginning(name).startswith(holder):  # SoftFileLock writes its own
            name.write_text(f"{holder}{socket.gethostname()}\n", encoding="utf-8")
    except Timeout:
        raise error(f"another process is writing {path}{_holder(name)}: wait for it, or name another output") from None
    except OSError as failed:
        raise OutputError(f"cannot write {path}: {failed.strerror or failed}") from None
    try:
        yield
    finally:
        with suppress(OSError):
            os.unlink(name)  # while it is held: a process that waits for it looks again
        lock.release()


def _holder(lock: Path) -> str:
    """Return in brackets which process holds a lock, and of a soft one how to remove it, where its file says so."""
    holder = None
    with suppress(OSError):
        holder = re.match(r"(\d+)\n([\w.-]+)", _beginning(lock))
    advice = f"; if it is gone, remove {lock}" if lock.suffix == ".softlock" else ""
    return f" (process {holder[1]} on {holder[2]}{advice})" if holder else ""


def _beginning(lock: Path) -> str:
    """Return the beginning of a lock's file; raise OSError for what is not a file, or has another name too."""
    status = os.lstat(lock)
    if not stat.S_ISREG(status.st_mode) or status.st_nlink > 1:
        raise OSError(errno.EEXIST, f"{lock} is not a file of ours, remove it")
    with lock.open(encoding="utf-8", errors="replace") as file:
        return file.read(300)


def refuse_foreign(path: Path, error: type[VidsieveError] = OutputError, *, begun: bool = False) -> None:
    """Refuse a path that holds anything but JSON lines of our own, before they are appended to or cut.

    With `begun`, the file is known to be ours, and its reader names damage.

    Raises
    ------
    VidsieveError
        If it is a link, a pipe, a folder, or begins otherwise; the type given as `error`.
    """
    if not os.path.lexists(path):
        return
    if os.path.islink(path) or not os.path.isfile(path):
        raise error(f"{path} is a link or no file: remove it, or name another output")
    with path.open("rb") as file:
        if not begun and file.read(2) not in (b"", b"{", b'{"'):
            raise error(f"{path} is not a journal of this command: name another output, or move it away")


def refuse_other_run(folder: Path, marker: str) -> None:
    """Refuse a folder with the run of another kind of command.

    Parameters
    ----------
    marker : str
        `RUN` or `METRICS`, the file that runs of this command have.

    Raises
    ------
    OutputError
    """
    for name, what in _HOLDS.items():
        if name != marker and os.path.exists(folder / name):
            raise OutputError(f"{folder} holds {what}: name another folder")


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
