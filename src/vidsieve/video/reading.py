"""Read and write videos with PyAV: an index of timestamps first, then only the wanted frames.

The index comes from the packets, without decoding; `decoding` then decodes the wanted frames. Videos of still images
are read here too.
"""

from __future__ import annotations

import math
import os
import struct
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from fractions import Fraction
from io import BytesIO
from itertools import accumulate
from pathlib import Path

import av
import numpy as np
from av import VideoFrame
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from vidsieve.errors import VideoError
from vidsieve.io.files import writing
from vidsieve.io.limits import limits
from vidsieve.video import check_file
from vidsieve.video.decoding import File, Index, Ints, Pixels, count_frames, decode_all, decode_groups
from vidsieve.video.opening import VideoFile

TOLERANCE = 1e-6  # seconds: a time this close before a frame's timestamp belongs to that frame

IMAGES = ("PNG", "JPEG", "MPO", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM", "TGA", "PCX")
"""Formats of still images. Pillow runs programs for others, such as EPS, and an ICO hides the size of what is in it."""
DAMAGED = (
    *(OSError, EOFError, ValueError, LookupError, TypeError, ArithmeticError, SyntaxError, MemoryError, RuntimeError),
    *(struct.error, zlib.error, Image.DecompressionBombError),
)
"""What Pillow's readers raise for damaged files."""
LAVISH = ("WEBP", "AVIF", "JPEG2000")
"""Formats whose decoders take up to 32 bytes a pixel; others take 16."""
FASTEST = 1e9
"""Most frames per second that can be asked for."""


@dataclass(frozen=True, eq=False)
class Video:
    """Frames of a video, upright, and notes on how they were obtained.

    Parameters
    ----------
    pixels : array, (T, H, W, 3), uint8, RGB
    timestamps : array, (T,), float64, seconds at which each appears; the file's first frame appears at 0
    notes : tuple of str, anything skipped, clamped or assumed
    duration : float, seconds from the start of the file's first frame to the end of its last
    fps : float, average frame rate of the file
    num_frames : int, number of frames that a player shows
    size : tuple of int, height and width on screen
    """

    pixels: Pixels
    timestamps: NDArray[np.float64]
    notes: tuple[str, ...]
    duration: float
    fps: float
    num_frames: int
    size: tuple[int, int]


def read_video(
    path: str | os.PathLike[str],
    *,
    frames: int | None = None,
    fps: float | None = None,
    times: Sequence[float] | None = None,
    max_frames: int | None = None,
    seek: bool | None = None,
    allow_playlists: bool = False,
) -> Video:
    """Return frames of a video file, chosen by exactly one of `frames`, `fps` and `times`.

    Parameters
    ----------
    path : a local file that FFmpeg reads; of several video streams the default one, never cover art
    frames : number of evenly spaced frames, the file's first and last included; 1 is the middle one
    fps : frames on screen at 0, 1/fps, 2/fps, … seconds, each once
    times : the frame on screen at each of these seconds, in this order
    max_frames : limit for `fps`; beyond it, this many evenly spaced frames are returned
    seek : True to seek to keyframes, False to read the file from its start, None for whichever reads less; the frames
        are the same
    allow_playlists : read HLS playlists and ffconcat scripts too, whose members must be in or below their folder;
        DASH manifests, SDP descriptions and patterns of image sequences are refused in any case

    Raises
    ------
    VideoError
        If the file holds no readable video, the request cannot be met, or one of `vidsieve.video.limits` is passed.
    """
    request = _Request(Path(path), frames, fps, times, max_frames)
    return _read(request, VideoFile(request.path, playlists=allow_playlists), seek)


def _read(
    request: _Request,
    source: VideoFile,
    seek: bool | None = None,
    index_of: Callable[[File], Index | None] = File.index,
) -> Video:
    """Return the frames that are asked for; `index_of` may know the file's index from an earlier call."""
    reel = None
    with closing(File(source)) as file:
        index = index_of(file)
        if index is not None:
            chosen, remarks = request.choose(index)
            file.check(len(chosen))
    if index is not None:
        reel = decode_groups(source, index, index.pts[chosen], seek)
        reel = reel or decode_all(source, index.pts[chosen], counting=False)
    if index is None or reel is None:  # the packets do not determine the shown frames: decode them all
        index = count_frames(source)
        chosen, remarks = request.choose(index)
        reel = decode_all(source, chosen, counting=True)
    if reel is None:
        raise VideoError(f"{request.path} changed while it was being read: read it again")
    size, rate = (reel.pixels.shape[1], reel.pixels.shape[2]), len(index.pts) / index.duration
    return Video(
        reel.pixels, index.seconds[chosen], (*source.notes, *remarks), index.duration, rate, len(index.pts), size
    )


def read_parts(path: str | os.PathLike[str], fps: float, *, frames: int = 64) -> Iterator[tuple[Video, int]]:
    """Yield the frames that ``read_video(path, fps=fps)`` returns, at most `frames` at a time, and how many there are.

    Only one part is in memory; each is read by its times, and the file's packets once for all of them. Where the file
    has fewer frames than `fps` asks for, the number is that of the times.

    Raises
    ------
    VideoError
        As `read_video`.
    """
    if not 0 < fps <= FASTEST:
        raise VideoError(f"{path}: fps must be a number above 0, up to {FASTEST:g}; got {fps!r}")
    first, seen = VideoFile(Path(path)), list[Index | None]()

    def index_of(file: File) -> Index | None:
        if not seen:
            seen.append(file.index())
        return seen[0]

    duration = _read(_Request(first.path, 1), first, index_of=index_of).duration
    total, last = max(1, math.ceil((duration - TOLERANCE) * fps)), -1.0
    for start in range(0, total, frames):
        times = [number / fps for number in range(start, min(start + frames, total))]
        source = VideoFile(first.path, dict(first.notes))  # each part has its own time limit
        part = _read(_Request(first.path, times=times), source, index_of=index_of)
        new = np.diff(part.timestamps, prepend=last) > 0
        if new.any():
            last = float(part.timestamps[-1])
            yield replace(part, pixels=part.pixels[new], timestamps=part.timestamps[new]), total


def read_frames(images: Sequence[tuple[str | os.PathLike[str], int]], *, frames: int | None = None) -> Video:
    """Return a video of still images, one frame a second.

    Images are turned upright, converted to RGB, and scaled to the size of the first.

    Parameters
    ----------
    images : pairs (path, number of frames), at least one
    frames : maximum number of frames, evenly spaced; None: all

    Raises
    ------
    VideoError
        If there is no image, or one cannot be read.
    """
    ends = list(accumulate(times for _, times in images))
    total = ends[-1] if ends else 0
    if not 0 < total <= limits.pixels:
        raise VideoError(
            "a video of still images needs at least one image, shown for at least one frame and at most "
            f"{limits.pixels} in all"
        )
    count = total if frames is None else min(total, frames)
    start = next(n for n, end in enumerate(ends) if end)
    first = read_image(images[start][0])
    size = first.shape[1], first.shape[0]
    limits.check_pixels(images[start][0], count, *size, 16)
    chosen = _uniform(total, count)
    shown = np.searchsorted(ends, chosen, side="right").tolist()
    pixels = np.empty((count, *first.shape), np.uint8)
    for n in dict.fromkeys(shown):  # images without a chosen frame are not opened
        pixels[[place for place, other in enumerate(shown) if other == n]] = (
            first if n == start else read_image(images[n][0], size, pixels.size)
        )
    return Video(pixels, chosen.astype(np.float64), (), float(total), 1.0, total, (size[1], size[0]))


def open_image(file: str | os.PathLike[str] | BytesIO) -> Image.Image:
    """Return a still image, whose header is read.

    Raises
    ------
    OSError, ValueError, SyntaxError, PIL.Image.DecompressionBombError
        If it is none of the `IMAGES`, or damaged.
    """
    image = Image.open(file)
    if image.format not in IMAGES:
        image.close()
        raise UnidentifiedImageError(f"{image.format} is not read")
    return image


def read_image(path: str | os.PathLike[str], size: tuple[int, int] | None = None, taken: int = 0) -> Pixels:
    """Return a still image (H, W, 3) uint8 RGB, upright, scaled to `size` (width, height) if given.

    `taken` bytes of memory, which others hold, count towards the limit.

    Raises
    ------
    VideoError
        If it cannot be read.
    """
    check_file(Path(path))
    try:
        with open_image(path) as image:
            held = (29 if image.format in LAVISH else 13) + taken / (image.width * image.height)
            limits.check_pixels(path, 1, *image.size, held)
            ImageOps.exif_transpose(image, in_place=True)
            upright = _eight_bits(image)
            upright = upright if upright.mode == "RGB" else upright.convert("RGB")
            upright.load()
    except VideoError:  # a ValueError too
        raise
    except DAMAGED as error:
        raise VideoError(
            f"{path} cannot be read as an image ({error}): fetch it again, save it as 8-bit RGB, or leave it out"
        ) from None
    if size is not None and upright.size != size:
        upright = upright.resize(size, Image.Resampling.BICUBIC)
    return np.asarray(upright)


def _eight_bits(image: Image.Image) -> Image.Image:
    """Return an image of at most eight bits a channel: 16-bit and float grey are scaled, not clipped.

    Raises
    ------
    ValueError
        If its white is unknown: numbers beyond 16 bits, or floats outside [0, 1].
    """
    if not image.mode.startswith(("I", "F")):
        return image
    values = np.asarray(image)
    low, high, white = values.min(), values.max(), 1 if image.mode == "F" else 65535
    if not (low >= 0 and high <= white):
        raise ValueError(f"its pixels are numbers from {low:g} to {high:g}, and nothing says which of them is white")
    scaled = np.multiply(values, np.float32(255 / white), dtype=np.float32)
    return Image.fromarray(np.rint(scaled, out=scaled).astype(np.uint8))


def write_video(path: str | os.PathLike[str], pixels: Pixels, fps: float, *, crf: int = 12) -> None:
    """Write pixels (T, H, W, 3) uint8 RGB, H and W even, as an H.264 mp4, atomically.

    `crf` is the quality, from 0 (only colour resolution is lost) to 51.

    Raises
    ------
    VideoError
        If the pixels, rate or quality cannot be encoded.
    OutputError
        If the path cannot be written.
    """
    if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[3] != 3 or pixels.size == 0:
        raise VideoError(f"{path}: pixels must be uint8 (T, H, W, 3), T at least 1; got {pixels.dtype} {pixels.shape}")
    if pixels.shape[1] % 2 or pixels.shape[2] % 2:
        raise VideoError(f"{path}: yuv420p needs an even height and width, got {pixels.shape[1:3]}: crop or pad by one")
    if not (math.isfinite(fps) and fps > 0 and 0 <= crf <= 51):
        raise VideoError(f"{path}: fps must be above 0 and crf between 0 and 51; got fps={fps!r}, crf={crf!r}")
    rate = Fraction(fps).limit_denominator(1001)
    with writing(Path(path)) as temporary:
        try:
            with av.open(str(temporary), "w", format="mp4") as container:
                # With mbtree, x264's output differs from run to run.
                options = {"crf": str(crf), "x264-params": "mbtree=0"}
                stream = container.add_stream("libx264", rate=rate, options=options)
                stream.height, stream.width = pixels.shape[1:3]
                stream.pix_fmt, stream.thread_count = "yuv420p", 1
                for count, picture in enumerate(pixels):
                    frame = VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
                    frame.pts, frame.time_base = count, 1 / rate
                    container.mux(stream.encode(frame))
                container.mux(stream.encode(None))
        except av.FFmpegError as error:
            raise OSError(error.errno, error.strerror) from error


@dataclass(frozen=True)
class _Request:
    path: Path
    frames: int | None = None
    fps: float | None = None
    times: Sequence[float] | None = None
    max_frames: int | None = None

    def __post_init__(self) -> None:
        given = [name for name in ("frames", "fps", "times") if getattr(self, name) is not None]
        if len(given) != 1:
            raise VideoError(f"{self.path}: give one of frames, fps and times; got {' and '.join(given) or 'none'}")
        for name in ("frames", "max_frames"):
            count = getattr(self, name)
            if count is not None and (isinstance(count, bool) or not isinstance(count, int | np.integer) or count < 1):
                raise VideoError(f"{self.path}: {name} must be a whole number of at least 1; got {count!r}")
        if self.fps is not None and not 0 < self.fps <= FASTEST:
            raise VideoError(f"{self.path}: fps must be a number above 0, up to {FASTEST:g}; got {self.fps!r}")
        if self.max_frames is not None and self.fps is None:
            raise VideoError(f"{self.path}: max_frames limits fps; leave it out with {given[0]}")
        if self.times is not None and (np.ndim(self.times) != 1 or len(self.times) == 0):
            raise VideoError(f"{self.path}: times must be a sequence of at least one number; got {self.times!r}")

    def choose(self, index: Index) -> tuple[Ints, list[str]]:
        """Return the numbers (T,) int64 of the chosen frames, and notes."""
        seconds, n = index.seconds, len(index.pts)
        if self.frames is not None:
            notes = [f"asked for {self.frames} frames, the video has {n}: all are used"] if self.frames > n else []
            return _uniform(n, self.frames), notes
        if self.fps is not None:
            # A frame is chosen if a time k/fps is between its start and that of the next.
            moments = np.ceil((np.append(seconds, index.duration) - TOLERANCE) * self.fps)
            chosen, asked = np.flatnonzero(np.diff(moments) > 0), f"{self.fps:g} fps asks for {moments[-1]:.0f} moments"
            if self.max_frames is not None and len(chosen) > self.max_frames:
                return _uniform(n, self.max_frames), [f"{asked}: {self.max_frames} uniform frames are used instead"]
            return chosen, [f"{asked}, with {len(chosen)} different frames"] * int(moments[-1] > len(chosen))
        wanted = np.asarray(self.times, dtype=np.float64)
        inside = (wanted >= -TOLERANCE) & (wanted <= index.duration + TOLERANCE)  # false for NaN
        if not inside.all():
            raise VideoError(f"{self.path} shows nothing at {wanted[~inside][0]:g} s: give 0 to {index.duration:.3f} s")
        return (np.searchsorted(seconds, wanted + TOLERANCE, side="right") - 1).clip(0), []


def _uniform(n: int, count: int) -> Ints:
    return np.array([(n - 1) // 2]) if count == 1 else np.linspace(0, n - 1, min(n, count)).round().astype(np.int64)
