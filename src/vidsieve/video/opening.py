"""Open files of strangers with FFmpeg: which containers and playlists it may read, and what they may claim."""

from __future__ import annotations

import ctypes
import os
import re
import time
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from io import BytesIO, FileIO
from pathlib import Path
from typing import IO, Any, cast

import av
from av.container import InputContainer

from vidsieve.errors import VideoError
from vidsieve.io.limits import Limits, limits
from vidsieve.video import check_file, is_inside

CONTAINERS = (
    "mov,matroska,avi,flv,mpeg,mpegts,mpegvideo,m4v,h263,h264,hevc,vvc,obu,av1,ivf,ogg,asf,rm,mxf,gxf,nut,dv,wtv,"
    "yuv4mpegpipe,amv,gif,apng,mjpeg,png_pipe,jpeg_pipe,bmp_pipe,tiff_pipe,webp_pipe"
)
"""The demuxers that FFmpeg may use, each for one file; their other names go with them."""
PLAYLISTS = {
    rb"#EXTM3U": ("an HLS playlist", "hls"),
    rb"ffconcat": ("an ffconcat script", "concat"),
    rb"<(?s:.*)<?MPD": ("a DASH manifest", ""),
    rb"v=0\s": ("an SDP description", ""),
}
"""How a file begins that names others, what it is, and the demuxer if it can be read."""
LONGEST_PLAYLIST, LONGEST_HEADER = 2**20, 2**28
"""Bytes."""
MOST_BOXES, MOST_CLAIMED = 2**18, 2**22
"""Boxes of an mp4 that are looked at, and samples that these may claim without bytes of their own."""
MOST_STREAMS, MOST_VIDEOS = 256, 8
"""Streams of a file, such as fonts, and those of them that are videos: FFmpeg decodes the first frame of each."""
_SAMPLES = re.compile(rb"stsz.{4}(.{4})(.{4})|trun.(.{3})(.{4})", re.DOTALL)
_PLAIN_SOUND = re.compile(rb"soun.*stts.{4}\x00\x00\x00\x01.{4}\x00\x00\x00\x01", re.DOTALL)
"""A track whose samples FFmpeg counts by chunks, such as PCM."""
limit_blocks = getattr(ctypes.CDLL(av._core.__file__), "av_max_alloc", lambda size: None)
"""FFmpeg's own limit of one block of memory; on Windows a library does not show those that it is linked with."""
Notes = dict[str, None]  # an ordered set


@dataclass(frozen=True, eq=False)
class VideoFile:
    """A video file, notes on how it is read, and the time (`time.monotonic`) at which reading must have ended.

    With `playlists`, the file may be an HLS playlist or an ffconcat script.

    Raises
    ------
    VideoError
        If it is not a file, or its header claims more samples than it can have.
    """

    path: Path
    notes: Notes = field(default_factory=dict)
    playlists: bool = False
    end: float = field(default_factory=lambda: time.monotonic() + limits.seconds)
    examined: list[bool] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        check_file(self.path)
        self.check_claims(claimed_samples(self.path))

    def check_claims(self, samples: int) -> None:
        """Check the number of samples that have no bytes of their own: each takes memory before one is read.

        Raises
        ------
        VideoError
        """
        if samples > MOST_CLAIMED:
            raise VideoError(f"{self.path} claims millions of samples that it has no room for: encode it again")

    def check_time(self) -> None:
        """Check that there is time left.

        Raises
        ------
        VideoError
        """
        if time.monotonic() > self.end:
            raise VideoError(
                f"{self.path} was not read within {limits.seconds:g} s: cut it into parts, or encode it again as mp4 "
                "with a keyframe every few seconds"
            )

    def open(self) -> InputContainer:
        """Return the file, opened by FFmpeg, which may open no other one and no protocol.

        Members of a playlist must be files in or below its folder.

        Raises
        ------
        VideoError
        """
        # Of one block of memory, in the whole process; the index of a file may claim any number of frames.
        limit_blocks(ctypes.c_size_t(max(limits.pixels, Limits.pixels)))
        path, members = self.path.resolve(), None
        options = {"protocol_whitelist": "file", "format_whitelist": CONTAINERS, "max_pixels": str(limits.frame_pixels)}
        try:
            what, demuxer = _playlist(path)
            if what:
                text = self._checked_playlist(path, what, demuxer)
                options["format_whitelist"] += f",{demuxer}"
                members = self._member_opener(text) if demuxer == "hls" else None
            if members is None and not self.examined:
                self._examine(path, options)
            container = av.open(
                os.fspath(path),  # absolute: FFmpeg reads "a:b.mp4" as a protocol
                metadata_errors="replace",
                options=options,
                timeout=limits.seconds,
                io_open=members,
            )
        except (OSError, av.FFmpegError) as error:
            self.check_time()
            unlisted = isinstance(error, av.ArgumentError)
            why = "no video stream in a container that is read" if unlisted else error.strerror
            raise VideoError(f"{self.path} is not a video or cut short ({why}): fetch or encode it again") from error
        return cast(InputContainer, container)

    def _examine(self, path: Path, options: dict[str, str]) -> None:
        """Check, without a decoder, how much a file has FFmpeg read and how many streams it has.

        Raises
        ------
        VideoError
        """
        with _Counted(path) as file:
            try:
                options = options | {"codec_whitelist": "none"}
                how: dict[str, Any] = {"metadata_errors": "replace", "timeout": limits.seconds, "options": options}
                with closing(av.open(file, **how)) as container:
                    count, videos = len(container.streams), len(container.streams.video)
            finally:
                if file.left < 0:
                    raise VideoError(f"{self.path} has a header of more than {LONGEST_HEADER} bytes: encode it again")
        if count > MOST_STREAMS or videos > MOST_VIDEOS:
            raise VideoError(
                f"{self.path} has {count} streams, {videos} of them videos, past the limits of {MOST_STREAMS} and "
                f"{MOST_VIDEOS}: copy the one that is meant into a file of its own"
            )
        self.examined.append(True)

    def _checked_playlist(self, path: Path, what: str, demuxer: str) -> bytes:
        """Return the contents of a file that names others, if it may be read.

        Raises
        ------
        VideoError
        """
        allowed = "or read it with" if demuxer else "only HLS playlists and ffconcat scripts can be read, with"
        advice = f"give the video itself; {allowed} allow_playlists=True"
        if not self.playlists or not demuxer:
            raise VideoError(f"{self.path} is not a video but {what}, which names other files: {advice}")
        if path.stat().st_size > LONGEST_PLAYLIST:
            raise VideoError(f"{self.path} has more than {LONGEST_PLAYLIST} bytes, too many for {what}")
        text = path.read_bytes()
        lines = re.split(rb"[\r\n\0]", text)
        if demuxer == "hls":
            if not any(line.startswith(b"#EXT-X-ENDLIST") for line in lines):
                raise VideoError(f"{self.path} has no end (#EXT-X-ENDLIST): read it when the broadcast is over")
            return text
        # FFmpeg opens the members of a script itself, from the same list of demuxers: none may be a list in turn.
        for line in lines:
            if name := re.match(rb"\s*file\s+['\"]?(.+?)['\"]?\s*$", line):
                self._member(os.fsdecode(name[1])).open().close()
        return text

    def _member_opener(self, text: bytes) -> Callable[[str, int, Mapping[str, str]], IO[bytes]]:
        """Return what opens a playlist for FFmpeg, and then its members, of which none may be a playlist in turn."""
        playlist, claimed = iter([BytesIO(text)]), 0

        def open_member(url: str, flags: int, options: Mapping[str, str]) -> IO[bytes]:
            nonlocal claimed
            if first := next(playlist, None):
                return first
            self.check_time()
            member = self._member(url).path
            if what := _playlist(member)[0]:
                raise VideoError(f"{self.path} names {url!r}, {what}: give that one itself")
            claimed += claimed_samples(member, int(options.get("offset", 0)))  # FFmpeg keeps those of all parts
            self.check_claims(claimed)
            return member.open("rb")

        return open_member

    def _member(self, name: str) -> VideoFile:
        """Return a playlist's member.

        Raises
        ------
        VideoError
            If it is not a file in or below the playlist's folder, or claims too much.
        """
        folder = self.path.resolve().parent
        if not is_inside(folder / name, folder):
            raise VideoError(f"{self.path} names {name!r}, outside its folder: give the video itself")
        return VideoFile(folder / name, end=self.end)


class _Counted(FileIO):
    """A file that seems to end when more is read than a header may take; `left` is below zero then."""

    left = LONGEST_HEADER

    def read(self, size: int | None = -1, /) -> bytes:
        """Read, as any file."""
        data = super().read(size) or b""
        self.left -= len(data)
        return data if self.left >= 0 else b""


def claimed_samples(path: Path, place: int = 0) -> int:
    """Return the number of samples that the header of an mp4 claims without bytes of their own; 0 for other files.

    `place` is the byte at which the mp4 begins.
    """
    count = 0
    size = path.stat().st_size
    with path.open("rb") as file:
        for _ in range(MOST_BOXES):
            file.seek(place)
            head = file.read(16)
            length, kind = int.from_bytes(head[:4], "big"), head[4:8]
            if length < 2:  # eight bytes of length follow, or the rest of the file
                length = int.from_bytes(head[8:], "big") if length else size - place
            if len(head) < 16 or length < 8:
                break
            if kind not in (b"mdat", b"free", b"skip", b"wide"):
                file.seek(place)
                for track in file.read(min(length, LONGEST_HEADER)).split(b"trak"):
                    if b"dcom" in track:  # compressed, it can claim anything
                        return MOST_CLAIMED + 1
                    if not _PLAIN_SOUND.search(track):
                        count += sum(map(_claimed, _SAMPLES.finditer(track)))
            place += length
            if place >= size:
                break
    return count


def _claimed(table: re.Match[bytes]) -> int:
    """Return the samples of a table that has no entry for each: all are of one size, or of the default one."""
    size, samples, flags, run = (int.from_bytes(group or b"", "big") for group in table.groups())
    return samples * (size > 0) + run * (not flags & 0xF00)


def _playlist(path: Path) -> tuple[str, str]:
    """Return what a file that names others is, and the demuxer if it can be read; empty for any other file."""
    with path.open("rb") as file:
        head = file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()
    return next((found for mark, found in PLAYLISTS.items() if re.match(mark, head)), ("", ""))
