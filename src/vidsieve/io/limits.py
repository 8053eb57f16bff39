"""Limits of what is read from files of others, which the options of commands set for the process."""

from __future__ import annotations

import os
from dataclasses import dataclass

from vidsieve.errors import VideoError

MEMORY = 4.2
"""Bytes that reading may take for each pixel of the limit: three of a frame that is asked for, the rest to decode.

By default 32 frames of 4K in 8-bit H.264 fit, whatever number of frames the file makes its decoder hold."""


@dataclass
class Limits:
    """Limits of reading one video, and one row of a file.

    Parameters
    ----------
    pixels : int
        Frames × height × width of the frames asked for; also of an image. With what the decoder holds, they may take
        `MEMORY` bytes for each.
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
        """Pixels of the largest frame of a video, whatever decodes it."""
        return self.pixels // 8

    def check_pixels(self, path: str | os.PathLike[str], frames: int, width: int, height: int, held: float) -> None:
        """Check that `frames` frames of `path` are within the limit, with `held` bytes a pixel of one to decode them.

        Raises
        ------
        VideoError
        """
        area = width * height
        if frames * area > self.pixels or (3 * frames + held) * area > MEMORY * self.pixels:
            raise VideoError(
                f"{path} would take {frames} × {width} × {height} pixels, and {held * area / 2**20:.0f} MiB to decode "
                f"them, past the limit of {self.pixels}: take fewer frames, or raise --max-pixels "
                "(vidsieve.video.limits.pixels)"
            )


limits = Limits()
"""The limits of this process, in all its threads."""
