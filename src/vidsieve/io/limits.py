"""Limits of what is read from files of others, which the options of commands set for the process."""

from __future__ import annotations

import os
from dataclasses import dataclass

from vidsieve.errors import VideoError

LEAST_FRAMES = 4
"""Frames counted at least, as decoding and converting hold several."""


@dataclass
class Limits:
    """Limits of reading one video, and one row of a file.

    Parameters
    ----------
    pixels : int
        Frames × height × width of the frames asked for, counted as `LEAST_FRAMES` at least; also of an image.
    seconds : float
        Time that reading may take.
    packets : int
        Packets of the video stream.
    row : int
        Bytes of one row of a file.
    """

    pixels: int = 2**28
    seconds: float = 300.0
    packets: int = 2**21
    row: int = 2**24

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
