"""Reading and decoding videos: files that a player would show, within limits that hold for the whole process."""

from __future__ import annotations

import os
from pathlib import Path

from vidsieve.errors import VideoError
from vidsieve.io.limits import limits

__all__ = ["check_file", "is_inside", "limits"]


def check_file(path: Path) -> None:
    """Check that `path` is a file and not empty; a pipe or device is none, and is not opened.

    Raises
    ------
    VideoError
    """
    if not os.path.isfile(path) or path.stat().st_size == 0:
        what = "is empty" if os.path.isfile(path) else "is not a file" if os.path.exists(path) else "does not exist"
        raise VideoError(f"{path} {what}: give the path of a video file")


def is_inside(path: str | os.PathLike[str], folder: str | os.PathLike[str]) -> bool:
    """Return True if `path`, after symbolic links, lies in or below `folder`; no name with a NUL does."""
    try:
        return Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder))
    except ValueError:
        return False
