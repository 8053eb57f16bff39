"""Reading and decoding videos: files that a player would show, within limits that hold for the whole process."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from vidsieve.errors import VideoError

LEAST_FRAMES = 4
"""Frames counted at least, as decoding and converting hold several."""


@dataclass
class Limits:
    """Limits of reading one video.

    Parameters
    ----------
    pixels : int
        Frames × height × width of the frames asked for, counted as `LEAST_FRAMES` at least; also of an image.
    seconds : float
        Time that reading may take.
    packets : int
        Packets of the video stream.
    """

    pixels: int = 2**28
    seconds: float = 300.0
    packets: int = 2**21

    @property
    def frame_pixels(self) -> int:
        """Pixels of the largest frame."""
        return self.pixels // LEAST_FRAMES

    def check_pixels(self, path: str | os.PathLike[str], frames: int, width: int, height: int) -> None:
        """Check that `frames` frames of `path` are within the limit.

        Raises
        ------
        VideoError
        """
        count = max(frames, LEAST_FRAMES)
        if count * width * height > self.pixels:
            raise VideoError(
                f"{path} would take {count} × {width} × {height} pixels, past the limit of {self.pixels}: take fewer "
                "frames, or raise --max-pixels (vidsieve.video.limits.pixels)"
            )


limits = Limits()
"""The limits of this process, in all its threads."""


def check_file(path: Path) -> None:
    """Check that `path` is a file and not empty; a pipe or device is none, and is not opened.

    Raises
    ------
    VideoError
    """
    if not os.path.isfile(path) or path.stat().st_size == 0:
        what = "is empty" if os.path.isfile(path) else "is no file" if os.path.exists(path) else "does not exist"
        raise VideoError(f"{path} {what}: give the path of a video file")


def is_inside(path: str | os.PathLike[str], folder: str | os.PathLike[str]) -> bool:
    """Return True if `path`, after symbolic links, lies in or below `folder`; no name with a NUL does."""
    try:
        return Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder))
    except ValueError:
        return False
