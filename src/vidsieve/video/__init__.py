"""Reading and decoding videos."""

from __future__ import annotations

import os
from pathlib import Path

from vidsieve.errors import VideoError


def check_file(path: Path) -> None:
    """Check that `path` is a file and not empty.

    Raises
    ------
    VideoError
    """
    if not os.path.isfile(path) or path.stat().st_size == 0:
        what = "is empty" if os.path.isfile(path) else "is no file" if os.path.exists(path) else "does not exist"
        raise VideoError(f"{path} {what}: give the path of a video file")
