"""Decode only the wanted frames of a file, checked packet by packet against an index.

Each wanted frame is decoded from the keyframe before it. Every packet on the path is compared with the index, and the
decoded frames with their packets: a run must begin with a picture that the decoder reports as a keyframe, and pictures
must come out in the order of their timestamps. On any mismatch (a container that seeks elsewhere, false keyframes,
missing references, damaged data) the file is decoded from its start instead.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import chain, islice
from typing import Any, cast

import av
import numpy as np
from av import Packet, VideoCodecContext, VideoFrame, VideoStream
from av.stream import Disposition
from av.video.reformatter import VideoReformatter
from numpy.typing import NDArray

from vidsieve.errors import VideoError
from vidsieve.io.limits import limits
from vidsieve.video.opening import VideoFile

# Starting threads costs more than converting a small frame; before PyAV 17 there were none.
ONE_THREAD: dict[str, Any] = {"threads": 1} if int(av.__version__.split(".")[0]) >= 17 else {}
SEEKABLE = frozenset(
    {
        *("av1", "vvc", "hevc", "h264", "h263", "h261", "vp6", "vp6f", "vp8", "vp9", "theora", "flv1"),
        *("mpeg1video", "mpeg2video", "mpeg4", "msmpeg4v2", "msmpeg4v3", "vc1", "wmv1", "wmv2", "wmv3"),
        *("mjpeg", "prores", "dnxhd", "png", "rawvideo", "ffv1", "huffyuv", "ffvhuff", "utvideo"),
    }
)
"""Codecs whose keyframes can be decoded alone, by their specification; other files are read from the start."""
DECODERS = {"libdav1d": "av1", "libaom-av1": "av1", "libvpx": "vp8", "libvpx-vp9": "vp9"}
"""Codecs of decoders with another name."""
HELD = dict.fromkeys(SEEKABLE, 5) | dict.fromkeys(("vp9", "av1"), 10) | dict.fromkeys(("h264", "hevc", "vvc"), 17)
"""Frames that a decoder holds at most, with the one that it writes; other codecs are taken to hold the most."""
TABLES = 0.75
"""Bytes for each pixel of a held frame, besides its own: motion vectors and the like."""
UNTIMED = frozenset({"avi", "h264", "hevc", "m4v", "mpegvideo", "vvc", "obu"})
"""Formats without presentation times: FFmpeg computes them, wrongly if pictures are reordered."""
CENTURY = 3_200_000_000
"""Seconds between the first and last frame of a video at most."""
PREFIX = 8
"""Number of frames decoded for the index, to check that they come in the order of the packets."""
Pixels = NDArray[np.uint8]
Ints = NDArray[np.int64]
Row = tuple[int, int, bool, int, bool]  # a packet: pts, bytes, is it a keyframe, dts, is it shown


@dataclass(frozen=True, eq=False)
class Index:
    """The frames that a player shows, and the packets in decoding order."""

    pts: Ints  # (n,), ascending
    end: int  # pts at which the last frame ends
    tick: Fraction  # seconds
    packets: list[Row] = field(default_factory=list)

    @property
    def seconds(self) -> NDArray[np.float64]:
        """Time at which each frame appears, in seconds from the first."""
        return np.array((self.pts - self.pts[0]) * self.tick.numerator / self.tick.denominator, np.float64)

    @property
    def duration(self) -> float:
        """Seconds from the start of the first frame to the end of the last."""
        return float((self.end - int(self.pts[0])) * self.tick)


class Reel:
    """The wanted frames, filled in as they are decoded; the first sets size and orientation."""

    pixels: Pixels

    def __init__(self, wanted: Ints, file: File) -> None:
        self.file, self.notes, self.names, self.missing = file, file.notes, wanted, set(wanted.tolist())
        file.wanted = len(wanted)
        self.size = (0, 0)
        self.convert = VideoReformatter().reformat  # reused, since it caches its tables

    def offer(self, name: int | None, frame: VideoFrame) -> None:
        """Fill in `frame` if it is wanted and missing."""
        if name not in self.missing:
            return
        self.missing.discard(name)
        if first := self.size == (0, 0):
            self.file.check(len(self.names), frame)
            self.size = self.file.shown(frame)
            if self.size != (frame.width, frame.height):
                stored, shown = f"{frame.width}×{frame.height}", "{}×{}".format(*self.size)
                note = f"pixels are {float(self.file.aspect):.4g} times as wide as high: frames of {stored}"
                self.notes[f"{note} were scaled to {shown}"] = None
            self.matrix = self.turning(frame)
        elif self.size != self.file.shown(frame):
            self.notes["frames of another size were scaled to that of the earliest"] = None
        rgb = cast(Pixels, self.convert(frame, *self.size, format="rgb24", **ONE_THREAD).to_ndarray())
        # x' = a·x + c·y, y' = b·x + d·y, rounded to the nearest of the eight rotations and reflections
        a, b, _, c, d = self.matrix
        if abs(b) > abs(a):
            rgb, a, d = rgb.transpose(1, 0, 2), c, b
        rgb = rgb[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1]
        if first:
            self.pixels = np.empty((len(self.names), *rgb.shape), np.uint8)
            if angle := -frame.rotation % 360:
                self.notes[f"rotated by {angle}° clockwise"] = None
        for slot in np.flatnonzero(self.names == name):
            self.pixels[slot] = rgb

    def turning(self, frame: VideoFrame) -> list[float]:
        """Return the first five numbers of the matrix that turns a frame upright."""
        try:
            matrix = cast("Mapping[str, bytes]", frame.side_data).get("DISPLAYMATRIX")
        except ValueError:  # PyAV knows no name of some data, such as EXIF, and then gives none
            self.notes["it has data that PyAV does not know, such as EXIF: mirrored frames stay mirrored"] = None
            cos, sin = math.cos(math.radians(frame.rotation)), math.sin(math.radians(frame.rotation))
            return [cos, -sin, 0, sin, cos]
        return np.frombuffer(bytes(matrix), np.int32)[:5].tolist() if matrix else [1, 0, 0, 0, 1]


class File:
    """An open file, at the stream that a player would show, with one decoding thread."""

    def __init__(self, source: VideoFile) -> None:
        self.source, self.notes, path = source, source.notes, source.path
        self.container = source.open()
        streams = self.container.streams
        videos = [s for s in streams.video if not s.disposition & Disposition.attached_pic]
        if not videos:
            held = "cover art" if streams.video else "sound" if streams.audio else "other data"
            raise VideoError(f"{path} has no video stream, only {held}: give a file with one")
        videos = [s for s in videos if cast(object, s.codec_context) is not None]
        if not videos:
            raise VideoError(f"{path} uses a codec that PyAV cannot decode: encode it again, for example as H.264")
        if self.container.format.name == "webp_pipe":
            raise VideoError(
                f"{path} is an animated WebP, which FFmpeg does not read: save it as mp4, or its frames as images and "
                "name those in a row's `frames`"
            )
        best = max(
            videos, key=lambda s: (not _is_still(s), bool(s.disposition & Disposition.default), s.width * s.height)
        )
        self.stream: VideoStream = best
        self.codec = best.codec_context
        aspect = best.sample_aspect_ratio or self.codec.sample_aspect_ratio or Fraction(1)
        self.aspect = aspect if Fraction(1, 8) <= aspect <= 8 else Fraction(1)  # beyond that it is an error in the file
        self.size = self.codec.width * self.codec.height
        self.wanted, self.form = 1, (0, 0, "")
        self.codec.options = {"max_pixels": str(limits.frame_pixels)}
        self.codec.thread_count = 1  # frame threads restart after each seek, which costs more than they gain

    def close(self) -> None:
        """Close the file and free its decoder, which holds frames as long as it lives."""
        self.container.close()
        del self.stream, self.codec

    def shown(self, frame: VideoFrame | VideoCodecContext) -> tuple[int, int]:
        """Return the width and height of a frame on screen, by the aspect ratio of its pixels."""
        return max(1, round(frame.width * self.aspect)), frame.height

    def check(self, frames: int, frame: VideoFrame | None = None) -> None:
        """Check that `frames` frames like `frame`, or the next one, are within the limit, with those that are held.

        Raises
        ------
        VideoError
        """
        name, like = DECODERS.get(self.codec.name, self.codec.name), frame or self.codec
        count = HELD.get(name, 5 if self.codec.codec.intra_only else max(HELD.values()))
        depth = like.format.padded_bits_per_pixel / 8 if like.format else 4
        width, height = self.shown(like)
        limits.check_pixels(
            self.source.path, frames, width, height, 3 + count * (depth + TABLES) * like.width / max(1, width)
        )

    def packets(self) -> Iterator[Packet[VideoStream]]:
        """Yield the stream's intact packets until the file ends or breaks off.

        Raises
        ------
        VideoError
            If the time is over, or there are too many.
        """
        try:
            for count, packet in enumerate(self.container.demux(self.stream)):
                self.source.check_time()
                if count > limits.packets:
                    raise VideoError(f"{self.source.path} has more than {limits.packets} packets: cut it into parts")
                if packet.is_corrupt:
                    self.notes["corrupt packets were skipped"] = None
                elif packet.size:
                    yield packet
        except (av.FFmpegError, IndexError) as error:  # IndexError: a damaged file seems to start a new stream
            self.source.check_time()
            self.notes[f"the file breaks off ({error})"] = None

    def decode(self, packet: Packet[VideoStream] | None) -> list[VideoFrame]:
        """Return the intact frames that `packet` completes; None flushes the decoder.

        Raises
        ------
        VideoError
            If frames are too large.
        """
        self.check_form()
        try:
            frames = self.codec.decode(packet)
        except av.FFmpegError:
            size = self.codec.width * self.codec.height
            if size > limits.frame_pixels or (self.size and not size):  # FFmpeg resets what is past `max_pixels`
                raise VideoError(f"{self.source.path} has {self.too_large()}") from None
            self.notes["corrupt packets were skipped"] = None
            return []
        self.check_form()
        if any(frame.is_corrupt for frame in frames):
            self.notes["corrupt frames were skipped"] = None
        return [frame for frame in frames if not frame.is_corrupt]

    def check_form(self) -> None:
        """Check the limit if the size or format of frames has changed; one that is reached may pass it, not a second.

        Raises
        ------
        VideoError
        """
        if self.form != (form := (self.codec.width, self.codec.height, self.codec.pix_fmt or "")):
            self.form = form
            self.check(self.wanted)

    def too_large(self) -> str:
        """Return the fault of frames past the limit."""
        return f"frames of more than {limits.frame_pixels} pixels: encode it smaller, or raise --max-pixels"

    def frames(self) -> Iterator[VideoFrame]:
        """Yield every intact frame that a player shows."""
        for packet in chain(self.packets(), [None]):
            yield from self.decode(packet)

    def unseekable(self) -> str:
        """Return the reason why decoding from a keyframe may give other frames; empty if it does not."""
        codec = DECODERS.get(self.codec.name, self.codec.name)
        if self.codec.pix_fmt == "pal8":
            return "its palette comes with its first packet alone"
        return "" if codec in SEEKABLE else f"keyframes of {codec} may need what lies before them"

    def index(self) -> Index | None:
        """Return the index from the packets; None if they do not determine the shown frames."""
        rows: list[Row] = []
        shown: list[tuple[int, int]] = []
        seen: list[int | None] = []
        for packet in self.packets():
            if packet.pts is None:
                return None
            dts, inside = packet.pts if packet.dts is None else packet.dts, not packet.is_discard
            rows.append((packet.pts, packet.size, packet.is_keyframe, dts, inside))
            if inside:  # else it is outside the edit list: decoded, never shown
                shown.append((packet.pts, packet.duration or 0))
            if len(seen) < PREFIX:
                seen += [frame.pts for frame in self.decode(packet)]
        if not seen or None in seen or seen != sorted(cast("list[int]", seen)):
            return None
        # Frames before the first keyframe may never be shown.
        shown = sorted(row for row in shown if row[0] >= cast(int, seen[0]))
        untimed = self.container.format.name in UNTIMED or (len(rows) > 1 and rows == sorted(rows))
        if self.codec.has_b_frames and untimed:
            return None
        if not shown or shown[0][0] != seen[0] or len(dict(shown)) < len(shown):
            return None
        return self.indexed(shown, rows)

    def indexed(self, shown: list[tuple[int, int]], rows: list[Row]) -> Index:
        """Return the index of frames (pts, duration); without a duration the last one gets the median.

        Raises
        ------
        VideoError
            If the first and last are more than `CENTURY` apart, as wrapped or damaged times are.
        """
        tick = self.stream.time_base or Fraction(1, av.time_base)
        if (shown[-1][0] - shown[0][0]) * tick > CENTURY:
            raise VideoError(f"{self.source.path} has damaged timestamps, ages apart: encode it again")
        pts = np.array([row[0] for row in shown])
        usual = np.median(np.diff(pts)) if len(pts) > 1 else 1 / ((self.stream.average_rate or 25) * tick)
        index = Index(pts, int(pts[-1]) + (shown[-1][1] or max(1, round(usual))), tick, rows)
        if (announced := (self.container.duration or 0) / av.time_base) > 1.05 * index.duration + 0.5:
            self.notes[f"the file announces {announced:.1f} s, its frames end at {index.duration:.1f} s"] = None
        return index

    def land(self, rows: list[Row], start: int) -> Iterator[Packet[VideoStream]]:
        """Return the packets from keyframe `start`; none if the container cannot seek to it."""
        aims = [row[3] for row in rows[start::-1] if row[2]]
        for aim in (rows[start][0], aims[0], *aims[1:5:3], aims[-1]):  # some seek by pts, some by dts, some too far
            try:
                self.container.seek(aim, stream=self.stream)
            except av.FFmpegError:
                continue
            packets = self.packets()
            for packet in packets:
                if packet.pts == rows[start][0]:
                    return chain([packet], packets)
                if packet.is_keyframe and (packet.pts or 0) > rows[start][0]:
                    break
        return iter(())

    def fill(self, reel: Reel, rows: list[Row], packets: Iterator[Packet[VideoStream]]) -> bool:
        """Decode `rows`, which begin with a keyframe, into `reel`; return False on a mismatch.

        The first row's picture must be a keyframe to the decoder, and the later ones must come in the order of their
        timestamps. Pictures that an open group shows before its keyframe are skipped.
        """
        self.codec.flush_buffers()
        # The decoder does not output a picture that is not shown.
        newest = None if rows[0][4] else rows[0][0]
        for row in chain(rows, [None]):
            packet = next(packets, None) if row else None
            if row and (packet is None or row[:2] != (packet.pts, packet.size)):
                return False
            if row and self.codec.name == "h264":  # marks frames that no other refers to, which can be skipped
                self.codec.skip_frame = "DEFAULT" if row[0] in reel.missing else "NONREF"
            for frame in self.decode(packet):
                pts = frame.pts
                if newest is None and pts != rows[0][0]:
                    continue
                if pts is None or (not frame.key_frame if newest is None else pts <= newest):
                    return False
                newest = pts
                reel.offer(pts, frame)
        return True


def _is_still(stream: VideoStream) -> bool:
    """True if a stream is a still image, as in AVIF."""
    still = bool(stream.disposition & Disposition.still_image)
    return still or (stream.frames == 1 and stream.duration is None)


def decode_groups(source: VideoFile, index: Index, wanted: Ints, seek: bool | None) -> Reel | None:
    """Return the wanted frames (pts), decoded from the keyframes before them; None if one is missing.

    `seek`: seek to those keyframes, or else skip the packets between them; None: whichever is less work.
    """
    rows, runs = index.packets, _runs(index.packets, wanted)
    passed_over = any(start > 0 for start, _ in runs)
    if seek is None:
        seek = sum(last + 1 - start for start, last in runs) < len(rows) / 2
    for jumping in [True, False] if seek else [False]:
        with closing(File(source)) as file:
            reel, position = Reel(wanted, file), 0
            if passed_over and (why := file.unseekable()):
                if seek:
                    source.notes[f"read from its start: {why}"] = None
                return None
            packets = file.packets()
            for start, last in runs:
                if jumping:
                    packets = file.land(rows, start)
                else:
                    deque(islice(packets, start - position), maxlen=0)
                position = last + 1
                if not file.fill(reel, rows[start:position], packets):
                    break
        if not reel.missing:
            return reel
    if seek:
        source.notes["read from its start: frames decoded from its keyframes are not those that it shows"] = None
    return None


def _runs(rows: list[Row], wanted: Ints) -> list[tuple[int, int]]:
    """Return the runs of packets, from a keyframe to the last one needed, with the wanted frames."""
    at = {row[0]: position for position, row in enumerate(rows)}
    keys = [position for position, row in enumerate(rows) if row[2]]
    runs: list[tuple[int, int]] = []
    for position in sorted({at[pts] for pts in wanted.tolist()}):
        # A frame shown before the keyframe that it follows may refer to frames before both (open groups).
        before = reversed(keys[: bisect_right(keys, position)])
        start = next((key for key in before if rows[key][0] <= rows[position][0]), None)
        if start is None:
            return []
        while runs and start <= runs[-1][1]:
            start = min(start, runs.pop()[0])
        runs.append((start, position))
    return runs


def decode_all(source: VideoFile, wanted: Ints, *, counting: bool) -> Reel | None:
    """Return the wanted frames, by pts or by number, decoded from the start; None if one is missing."""
    with closing(File(source)) as file:
        reel, newest = Reel(wanted, file), None
        for count, frame in enumerate(file.frames()):
            if not counting:
                if frame.pts is None or (newest is not None and frame.pts <= newest):
                    return None
                newest = frame.pts
            reel.offer(count if counting else frame.pts, frame)
            if not reel.missing:
                return reel
    return None


def count_frames(source: VideoFile) -> Index:
    """Return the index from decoding the whole file."""
    path, notes = source.path, source.notes
    with closing(File(source)) as file:
        seen = [(frame.pts, frame.duration) for frame in file.frames()]
        if not seen:
            why = "fetch or encode it again" if file.size else f"it is damaged, or has {file.too_large()}"
            raise VideoError(f"{path} has a video stream, but no frame of it can be decoded: {why}")
        shown = sorted((pts, duration) for pts, duration in seen if pts is not None)
        if len(dict(shown)) == len(seen):
            if [pts for pts, _ in shown] != [pts for pts, _ in seen]:
                notes["its timestamps are not in the order in which its frames are shown: they were sorted"] = None
            return file.indexed(shown, [])
        rate = file.stream.average_rate or Fraction(25)
        notes[f"the file has no usable timestamps: {float(rate):g} frames per second are assumed"] = None
        return Index(np.arange(len(seen)), len(seen), 1 / rate)
