"""Reading and writing videos, on files encoded here with the number of each frame drawn into it."""

from __future__ import annotations

import socket
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from av.stream import Disposition
from PIL import Image

from vidsieve.errors import OutputError, VideoError
from vidsieve.video import decoding as module
from vidsieve.video.decoding import File
from vidsieve.video.opening import VideoFile
from vidsieve.video.reading import Video, read_image, read_parts, read_video, write_video

BITS = 10


def picture(i: int, height: int = 48, width: int = 80) -> np.ndarray:
    """Return a picture (H, W, 3) whose upper half holds the bits of `i`, white for 1; below moves a square."""
    out = np.full((height, width, 3), 60, np.uint8)
    bar = np.repeat([235 if i >> bit & 1 else 20 for bit in range(BITS)], width // BITS)
    out[: height // 2, : len(bar)] = bar[None, :, None]
    left = 3 * i % (width - 10)
    out[height // 2 + 4 : height // 2 + 12, left : left + 10] = (200, 90, 30)
    return out


def number(pixels: np.ndarray) -> int:
    """Return the number in a picture, read from the middles of its cells."""
    height, width = pixels.shape[:2]
    cell = width // BITS
    bar = pixels[height // 8 : height * 3 // 8, : BITS * cell].reshape(-1, BITS, cell, 3)
    return sum(int(bit) << i for i, bit in enumerate(bar[:, :, cell // 4 : -(cell // 4) or None].mean((0, 2, 3)) > 128))


def rgb(frame: av.VideoFrame) -> np.ndarray:
    return frame.reformat(format="rgb24", **module.ONE_THREAD).to_ndarray()


def numbers(video: Video) -> list[int]:
    return [number(pixels) for pixels in video.pixels]


def encode(
    path: Path,
    codec: str = "libx264",
    count: int = 60,
    *,
    size: tuple[int, int] = (48, 80),
    pixel_format: str = "yuv420p",
    options: dict[str, str] | None = None,
    container: dict[str, str] | None = None,
    file_format: str | None = None,
    milliseconds: Sequence[int] | None = None,
    start: int = 0,
    sound: bool = False,
    cover: bool = False,
) -> Path:
    """Write a video at 25 fps, or with the given timestamps, and return its path."""
    with av.open(str(path), "w", format=file_format, options=container or {}) as out:
        if cover:
            art = out.add_stream("png", rate=1)
            art.width, art.height, art.pix_fmt, art.disposition = 96, 96, "rgb24", Disposition.attached_pic.value
        stream = out.add_stream(codec, rate=25, options=options or {})
        stream.height, stream.width, stream.pix_fmt = *size, pixel_format
        stream.thread_count = 1
        if milliseconds is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        if sound:
            audio = out.add_stream("aac", rate=44100)
        if cover:
            frame = av.VideoFrame.from_ndarray(np.full((96, 96, 3), 99, np.uint8), format="rgb24")
            frame.pts = 0
            out.mux(art.encode(frame))
        packets: list[av.Packet] = []
        for i in range(count):
            frame = av.VideoFrame.from_ndarray(picture(start + i, *size), format="rgb24")
            frame.pts = i if milliseconds is None else milliseconds[i]
            frame.time_base = Fraction(1, 25) if milliseconds is None else Fraction(1, 1000)
            packets += stream.encode(frame)
        for packet in packets + stream.encode(None):
            if milliseconds is not None:
                packet.duration = 40
            out.mux(packet)
        if sound:
            silence = av.AudioFrame.from_ndarray(np.zeros((2, 44100), np.float32), format="fltp", layout="stereo")
            silence.sample_rate, silence.pts = 44100, 0
            out.mux(audio.encode(silence))
            out.mux(audio.encode(None))
    return path


def x264(gop: int, more: str = "") -> dict[str, str]:
    return {"x264-params": f"keyint={gop}:min-keyint={gop}:scenecut=0:bframes=3:b-adapt=0{more}", "preset": "veryfast"}


X265 = {"x265-params": "keyint=12:min-keyint=12:open-gop=1:bframes=3:log-level=none:pools=none"}
KINDS: dict[str, tuple[str, dict[str, object]]] = {
    "gop12": ("mp4", {"options": x264(12)}),
    "gop48": ("mp4", {"options": x264(48), "count": 120}),
    "gop250": ("mp4", {"options": x264(250), "count": 300}),
    "open groups": ("mp4", {"options": x264(12, ":open-gop=1")}),
    "open groups, hevc": ("mp4", {"codec": "libx265", "options": X265}),
    "gradual refresh": ("mp4", {"options": x264(12, ":intra-refresh=1")}),
    "interlaced": ("mp4", {"options": x264(12, ":tff=1")}),
    "fragments": ("mp4", {"options": x264(12), "container": {"movflags": "frag_keyframe+empty_moov"}}),
    "matroska": ("mkv", {"options": x264(12)}),
    "transport stream": ("ts", {"options": x264(12)}),
    "program stream": ("mpg", {"codec": "mpeg2video", "options": {"g": "12", "bf": "2"}}),
    "mpeg4": ("mp4", {"codec": "mpeg4", "options": {"g": "12", "bf": "2"}}),
    "mpeg4, avi": ("avi", {"codec": "mpeg4", "options": {"g": "12"}}),
    "h264, avi": ("avi", {"options": x264(12)}),
    "vp8": ("webm", {"codec": "libvpx", "options": {"g": "12", "deadline": "realtime", "cpu-used": "8"}}),
    "vp9": ("webm", {"codec": "libvpx-vp9", "options": {"g": "12", "deadline": "realtime", "cpu-used": "8"}}),
    "ten bits": ("mp4", {"options": x264(12), "pixel_format": "yuv420p10le"}),
    "odd size": ("mp4", {"options": x264(12), "size": (35, 51), "pixel_format": "yuv444p"}),
    "odd size, ffv1": ("mkv", {"codec": "ffv1", "size": (35, 51), "options": {"g": "12"}}),
    "with sound": ("mp4", {"options": x264(12), "sound": True}),
    "with cover art": ("mp4", {"options": x264(12), "cover": True}),
}
# Timestamps made up in decoding order; no keyframe to start from; small frames that share a packet's timestamp.
SORTED = "its timestamps are not in the order in which its frames are shown: they were sorted"
WITHOUT_SEEKING = {"h264, avi", "gradual refresh", "program stream"}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return a function that gives the file of a kind, encoded once."""
    folder, made = tmp_path_factory.mktemp("videos"), {}

    def get(kind: str) -> Path:
        if kind not in made:
            suffix, how = KINDS[kind]
            made[kind] = encode(folder / f"{kind}.{suffix}", **how)  # type: ignore[arg-type]
        return made[kind]

    return get


def uniform(n: int, count: int) -> list[int]:
    return np.linspace(0, n - 1, count).round().astype(int).tolist()


def both_ways(path: Path, **asked: object) -> Video:
    """Read by seeking and in order, check that both give the same, and return what was read in order."""
    seeking, in_order = read_video(path, seek=True, **asked), read_video(path, seek=False, **asked)  # type: ignore[arg-type]
    assert np.array_equal(seeking.pixels, in_order.pixels)
    assert np.array_equal(seeking.timestamps, in_order.timestamps)
    assert [note for note in seeking.notes if not note.startswith("read from its start")] == list(in_order.notes)
    assert (seeking.duration, seeking.fps, seeking.num_frames) == (in_order.duration, in_order.fps, in_order.num_frames)
    return in_order


# --- the right frames, however the file is made ---------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_frames_and_timestamps_are_right_by_seeking_and_in_order(files, kind):
    path, how = files(kind), KINDS[kind][1]
    n, size = how.get("count", 60), how.get("size", (48, 80))
    for count in (1, 2, 7):
        video = both_ways(path, frames=count)
        assert numbers(video) == ([(n - 1) // 2] if count == 1 else uniform(n, count))
        assert np.allclose(video.timestamps, np.array(numbers(video)) / 25, atol=1e-9)
        assert video.pixels.shape == (count, *size, 3) and video.pixels.dtype == np.uint8 and video.size == size
        assert video.num_frames == n
        assert video.notes == ((SORTED,) if kind == "h264, avi" else ())
        assert video.duration == pytest.approx(n / 25) and video.fps == pytest.approx(25)


@pytest.mark.parametrize("kind", KINDS)
def test_every_frame_alone_is_what_plain_decoding_gives(files, kind):
    path = files(kind)
    with av.open(str(path)) as source:
        plain = [rgb(frame) for frame in source.decode(source.streams.video[0])]
    everything = both_ways(path, frames=1000)
    assert numbers(everything) == list(range(len(plain)))
    assert np.array_equal(everything.pixels, plain)
    for i in {0, 1, 11, 12, 13, 14, 15, 23, 24, 47, 48, 50, len(plain) - 1}:
        assert np.array_equal(both_ways(path, times=[everything.timestamps[i]]).pixels[0], plain[i]), i


@pytest.mark.parametrize("kind", sorted(KINDS.keys() - WITHOUT_SEEKING))
def test_seeking_really_seeks(files, kind, monkeypatch):
    ways = spied(monkeypatch, "land", "fill", "frames")
    assert numbers(read_video(files(kind), times=[0.12, 1.2, 2.2], seek=True)) == [3, 30, 55]
    assert ways == ["land", "fill"] * (len(ways) // 2) and 1 <= len(ways) // 2 <= 3  # fewer where groups are long


def spied(monkeypatch: pytest.MonkeyPatch, *names: str) -> list[str]:
    """Return the list to which the named steps of reading are added as they are taken."""
    taken: list[str] = []
    for name in names:
        step = getattr(module.File, name)
        monkeypatch.setattr(module.File, name, lambda *a, name=name, step=step: taken.append(name) or step(*a))
    return taken


def test_only_the_way_from_the_keyframes_is_decoded(files, monkeypatch):
    groups = []
    fill = module.File.fill
    monkeypatch.setattr(module.File, "fill", lambda *a: groups.append([row[0] // 512 for row in a[2]]) or fill(*a))
    for seek in (True, False):
        groups.clear()
        read_video(files("gop48"), times=[4.2, 2.0, 2.1, 0.0], seek=seek)
        assert [group[0] for group in groups] == [0, 48, 96]  # frames 50 and 52 share their way
        assert [max(group) for group in groups] in ([0, 52, 105], [0, 52, 108], [0, 52, 106], [0, 52, 107])


def test_without_word_it_jumps_only_where_that_passes_over_half_of_the_file(files, monkeypatch):
    ways = spied(monkeypatch, "land", "fill", "frames")
    read_video(files("gop250"), frames=40)
    assert ways == ["fill", "fill"]
    ways.clear()
    read_video(files("gop12"), frames=3)
    assert ways == ["land", "fill"] * 3


def test_landing_elsewhere_is_noticed(files, monkeypatch):
    land = module.File.land
    monkeypatch.setattr(module.File, "land", lambda file, rows, start: land(file, rows, max(0, start - 12)))
    ways = spied(monkeypatch, "land", "fill", "frames")
    assert numbers(read_video(files("gop12"), frames=7, seek=True)) == uniform(60, 7)
    assert ways == ["land", "fill"] * 2 + ["fill"] * 5  # frames 0 and 10 lie in the first group, read through then


@pytest.mark.parametrize("late", [1, 2, 30])
def test_landing_late_is_made_good_by_aiming_earlier(files, monkeypatch, late):
    """A container whose seeking overshoots still gives the frames, from an earlier keyframe or by reading through."""
    opened = av.open

    def altered(*a: object, **k: object) -> Altered:
        inner = opened(*a, **k)  # type: ignore[call-overload]
        return Altered(inner, seek=lambda offset, **how: inner.seek(offset + late * 12 * 3600, **how))

    monkeypatch.setattr(module.av, "open", altered)
    ways = spied(monkeypatch, "land", "fill", "frames")
    assert numbers(read_video(files("transport stream"), times=[1.6, 2.2], seek=True)) == [40, 55]
    assert ways == ["land", "fill"] * 2 if late < 3 else ["land", "fill", "fill", "fill"]


@pytest.mark.parametrize("kind", ["open groups", "open groups, hevc"])
def test_frames_shown_before_the_keyframe_they_follow_come_from_an_earlier_one(files, kind, monkeypatch):
    with av.open(str(files(kind))) as source:
        rows = [(packet.pts // 512, packet.is_keyframe) for packet in source.demux(video=0) if packet.size]
    keys = [position for position, (_, is_key) in enumerate(rows) if is_key]
    leading = [(rows[key][0], rows[key + 1][0]) for key in keys[1:-1] if rows[key + 1][0] < rows[key][0]]
    assert leading  # the groups are open
    ways = spied(monkeypatch, "land", "fill", "frames")
    for key, before in leading:
        assert numbers(read_video(files(kind), times=[before / 25], seek=True)) == [before]
        assert numbers(read_video(files(kind), times=[key / 25, before / 25], seek=True)) == [key, before]
    assert ways == ["land", "fill"] * 2 * len(leading)


def test_one_decoding_thread(files):
    with closing(module.File(VideoFile(files("gop12")))) as file:
        assert file.codec.thread_count == 1


# --- timestamps -----------------------------------------------------------------------------------------------

VARIABLE = [0, 10, 20, 500, 510, 2000, 2010, 2011, 5000]


@pytest.fixture(scope="module")
def variable(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("variable") / "vfr.mp4"
    return encode(path, count=9, milliseconds=VARIABLE, options=x264(4))


def test_variable_frame_rate(variable):
    video = both_ways(variable, frames=9)
    assert numbers(video) == list(range(9))
    assert np.allclose(video.timestamps, np.array(VARIABLE) / 1000)
    with av.open(str(variable)) as source:
        last = max((packet.pts, packet.duration) for packet in source.demux(video=0) if packet.size)[1]
        ends = 5 + (float(last * source.streams.video[0].time_base) or 0.01)  # as most others, where it does not say
    assert video.duration == pytest.approx(ends)
    assert video.fps == pytest.approx(9 / video.duration)
    asked = [0.0, 0.0095, 0.01, 0.499, 0.5, 1.9, 4.999, 5.0]
    assert numbers(both_ways(variable, times=asked)) == [0, 0, 1, 2, 3, 4, 7, 8]
    assert numbers(both_ways(variable, fps=2)) == [0, 3, 4, 5, 7, 8]  # 0 0.5 1(4) 1.5(4) 2 2.5…4.5(7) 5
    assert both_ways(variable, fps=2).notes == ("2 fps asks for 11 moments, with 6 different frames",)


def test_times_may_repeat_and_come_in_any_order(files):
    video = both_ways(files("gop12"), times=[2.0, 0.0, 1.999, 2.0])
    assert numbers(video) == [50, 0, 49, 50] and video.timestamps.tolist() == [2.0, 0.0, 1.96, 2.0]
    assert numbers(both_ways(files("gop12"), times=[0.28 - 1e-9, -1e-9, 2.4 + 1e-9])) == [7, 0, 59]  # rounding


def test_timestamps_given_back_return_the_same_frames(files):
    for kind in ("transport stream", "matroska", "gop12"):
        everything = read_video(files(kind), frames=60)
        again = read_video(files(kind), times=everything.timestamps.tolist())
        assert np.array_equal(again.pixels, everything.pixels)
        assert numbers(read_video(files(kind), times=[everything.duration])) == [59]


@pytest.mark.parametrize("wrong", [-0.1, 2.5, float("nan"), float("inf")])
def test_times_outside_are_refused(files, wrong):
    with pytest.raises(VideoError, match=r"gop12\.mp4 shows nothing at .*: give 0 to 2\.400 s"):
        read_video(files("gop12"), times=[0.0, wrong])


def test_rate(files):
    assert numbers(both_ways(files("gop12"), fps=5)) == list(range(0, 60, 5))
    assert numbers(both_ways(files("gop12"), fps=0.1)) == [0]
    assert numbers(both_ways(files("gop12"), fps=25)) == list(range(60))
    ntsc = read_video(files("gop12"), fps=10)
    assert numbers(ntsc) == [0, 2, 5, 7, 10, 12, 15, 17, 20, 22, 25, 27, 30, 32, 35, 37, 40, 42, 45, 47, 50, 52, 55, 57]


def test_rate_above_that_of_the_file_uses_each_frame_once(files):
    video = both_ways(files("gop12"), fps=100)
    assert numbers(video) == list(range(60)) and video.notes == (
        "100 fps asks for 240 moments, with 60 different frames",
    )


def test_rate_is_capped_by_uniform_frames(files):
    video = both_ways(files("gop12"), fps=5, max_frames=4)
    assert numbers(video) == uniform(60, 4)
    assert video.notes == ("5 fps asks for 12 moments: 4 uniform frames are used instead",)
    assert both_ways(files("gop12"), fps=5, max_frames=12).notes == ()


def test_more_frames_than_there_are(files):
    video = both_ways(files("gop12"), frames=61)
    assert numbers(video) == list(range(60)) and video.notes == ("asked for 61 frames, the video has 60: all are used",)


def test_file_without_timestamps_is_counted(tmp_path):
    video = both_ways(encode(tmp_path / "raw.h264", options=x264(12), file_format="h264"), frames=7)
    assert numbers(video) == uniform(60, 7) and np.allclose(video.timestamps, np.array(numbers(video)) / 25)
    assert video.notes == ("the file has no usable timestamps: 25 frames per second are assumed",)


def test_edit_list(tmp_path, monkeypatch):
    """A cut without encoding again: the packets before the cut are decoded but not shown."""
    whole, cut = encode(tmp_path / "whole.mp4", options=x264(24)), tmp_path / "cut.mp4"
    with av.open(str(whole)) as source, av.open(str(cut), "w") as out:
        stream = source.streams.video[0]
        copy = out.add_stream_from_template(stream)
        for packet in source.demux(stream):
            if packet.size and packet.pts >= 24 * 512:
                packet.pts, packet.dts, packet.stream = packet.pts - 31 * 512, packet.dts - 31 * 512, copy
                out.mux(packet)
    with av.open(str(cut)) as source:
        assert any(packet.is_discard for packet in source.demux(video=0)) and source.streams.video[0].frames == 36
    ways = spied(monkeypatch, "fill", "frames")
    video = both_ways(cut, frames=100)
    assert numbers(video) == list(range(31, 60)) and video.num_frames == 29
    assert np.allclose(video.timestamps, np.arange(29) / 25) and video.duration == pytest.approx(29 / 25)
    assert numbers(both_ways(cut, times=[0.0, 0.5, 1.0])) == [31, 43, 56]
    assert set(ways) == {"fill"}


def test_edit_list_that_ends_early(tmp_path, monkeypatch):
    """Its duration is shortened in place: frames of the last B-group that come later are decoded but not shown."""
    path = encode(tmp_path / "whole.mp4", options=x264(24))
    data = path.read_bytes()
    entry = data.index(b"elst") + 12
    assert struct.unpack(">II", data[entry : entry + 8]) == (2400, 1024)  # of 1000, of 12800 ticks a second
    path.write_bytes(data[:entry] + struct.pack(">I", 1080) + data[entry + 4 :])
    with av.open(str(path)) as source:
        assert any(packet.is_discard for packet in source.demux(video=0) if packet.size)
    ways = spied(monkeypatch, "fill", "frames")
    video = both_ways(path, frames=100)
    assert numbers(video) == list(range(27)) and video.duration == pytest.approx(27 / 25)
    assert set(ways) == {"fill"}


def test_repeated_timestamps_are_replaced(tmp_path):
    """A transport stream written twice into a file."""
    path = encode(tmp_path / "twice.ts", options=x264(12))
    path.write_bytes(path.read_bytes() * 2)
    video = both_ways(path, frames=1000)
    assert numbers(video)[:56] == list(range(56)) and numbers(video)[-60:] == list(range(60))  # one is lost at the seam
    assert np.allclose(video.timestamps, np.arange(video.num_frames) / 25)
    assert "the file has no usable timestamps: 25 frames per second are assumed" in video.notes


def test_stream_that_starts_between_keyframes(tmp_path, monkeypatch):
    """What comes before the first keyframe cannot be decoded: time starts with the first frame that can."""
    path = encode(tmp_path / "whole.ts", options=x264(24))
    with av.open(str(path)) as source:
        middle = [packet.pos for packet in source.demux(video=0) if packet.size][10]
    path.write_bytes(path.read_bytes()[middle // 188 * 188 :])
    ways = spied(monkeypatch, "fill", "frames")
    video = both_ways(path, frames=36)
    assert numbers(video) == list(range(24, 60)) and np.allclose(video.timestamps, np.arange(36) / 25)
    assert set(ways) == {"fill"}


@pytest.mark.parametrize(("suffix", "codec"), [("mp4", "libx264"), ("mkv", "libx264"), ("mp4", "mpeg4")])
def test_one_frame(tmp_path, suffix, codec):
    video = both_ways(encode(tmp_path / f"one.{suffix}", codec, 1, start=5), frames=4)
    assert numbers(video) == [5] and video.timestamps.tolist() == [0] and video.num_frames == 1
    assert video.duration == pytest.approx(1 / 25) and video.fps == pytest.approx(25)
    assert video.notes == ("asked for 4 frames, the video has 1: all are used",)


# --- which pictures are shown, and how ------------------------------------------------------------------------


def test_rotation_and_mirroring_are_applied(tmp_path):
    """The eight matrices of a track header, as players show them: x becomes a·x + c·y, y becomes b·x + d·y."""
    path = encode(tmp_path / "plain.mp4", count=12, options=x264(4))
    plain, data = read_video(path, frames=3), path.read_bytes()
    header = data.index(b"tkhd") + 4 + 40
    assert struct.unpack(">9i", data[header : header + 36]) == (1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30)
    shown: dict[tuple[int, int, int, int], Callable[[np.ndarray], np.ndarray]] = {
        (1, 0, 0, 1): lambda p: p,
        (0, 1, -1, 0): lambda p: np.rot90(p, -1),  # a phone held upright: a quarter turn clockwise
        (-1, 0, 0, -1): lambda p: np.rot90(p, 2),
        (0, -1, 1, 0): lambda p: np.rot90(p, 1),
        (-1, 0, 0, 1): np.fliplr,
        (1, 0, 0, -1): np.flipud,
        (0, 1, 1, 0): lambda p: p.transpose(1, 0, 2),
        (0, -1, -1, 0): lambda p: np.rot90(p, 2).transpose(1, 0, 2),
    }
    for (a, b, c, d), turn in shown.items():
        matrix = struct.pack(">9i", a << 16, b << 16, 0, c << 16, d << 16, 0, 0, 0, 1 << 30)
        path.write_bytes(data[:header] + matrix + data[header + 36 :])
        video = both_ways(path, frames=3)
        assert np.array_equal(video.pixels, [turn(pixels) for pixels in plain.pixels]), (a, b, c, d)
        assert video.size == video.pixels.shape[1:3]
        if (a, b, c, d) == (0, 1, -1, 0):
            assert video.notes == ("rotated by 90° clockwise",) and video.size == (80, 48)


def test_the_default_stream_is_read_and_size_counts_among_equals(tmp_path):
    for default, expected in ((0, 100), (1, 200), (None, 200)):
        path = tmp_path / f"{default}.mkv"
        with av.open(str(path), "w") as out:
            streams = []
            for size in ((48, 80), (64, 120)):
                stream = out.add_stream("mpeg4", rate=25)
                stream.height, stream.width, stream.pix_fmt = *size, "yuv420p"
                streams.append(stream)
            for i, stream in enumerate(streams):
                stream.disposition = Disposition.default.value if i == default else 0
            for i in range(12):
                for first, stream in zip((100, 200), streams, strict=True):
                    frame = av.VideoFrame.from_ndarray(picture(first + i, stream.height, stream.width), format="rgb24")
                    frame.pts = i
                    out.mux(stream.encode(frame))
            for stream in streams:
                out.mux(stream.encode(None))
        assert numbers(both_ways(path, frames=2)) == [expected, expected + 11]


def test_frames_of_another_size_are_scaled(tmp_path):
    """Two streams one after the other in a file, as a broadcast that changes its format."""
    path, second = tmp_path / "both.h264", tmp_path / "second.h264"
    encode(path, options=x264(12), count=20, file_format="h264")
    encode(second, options=x264(12), count=20, file_format="h264", start=20, size=(96, 160))
    path.write_bytes(path.read_bytes() + second.read_bytes())
    video = both_ways(path, frames=4)
    assert numbers(video) == uniform(40, 4) and video.size == (48, 80)
    assert "frames of another size were scaled to that of the earliest" in video.notes


def test_colours(tmp_path):
    """Red stays red, and grey is grey, within what yuv420p costs."""
    pixels = np.zeros((4, 32, 32, 3), np.uint8)
    pixels[:2] = (220, 30, 40)
    pixels[2:] = 128
    write_video(tmp_path / "c.mp4", pixels, 25)
    assert np.abs(read_video(tmp_path / "c.mp4", frames=4).pixels.astype(int) - pixels).max() <= 4


# --- damaged files --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("suffix", "container", "announced"),
    [
        ("mp4", {"movflags": "faststart"}, True),
        ("mp4", {"movflags": "frag_keyframe+empty_moov"}, False),
        ("mkv", {}, True),
        ("ts", {}, False),
    ],
)
def test_truncated_file_gives_what_decodes_with_a_note(tmp_path, monkeypatch, suffix, container, announced):
    path = encode(tmp_path / f"cut.{suffix}", options=x264(12), container=container, count=120)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * 0.6)])
    ways = spied(monkeypatch, "fill", "frames")
    video = both_ways(path, frames=500)
    n = video.num_frames
    assert set(ways) == {"fill"}
    assert 30 < n < 100 and numbers(video)[: n - 3] == list(range(n - 3))  # of the last, B-frames may be missing
    assert np.allclose(video.timestamps, np.array(numbers(video)) / 25)
    assert ("the file announces 4.8 s, its frames end at" in " ".join(video.notes)) == announced
    assert ("corrupt packets were skipped" in video.notes) == (suffix == "mp4")
    with av.open(str(path)) as source:
        sound = []
        for packet in source.demux(source.streams.video[0]):
            if not packet.is_corrupt:
                sound += [rgb(frame) for frame in packet.decode() if not frame.is_corrupt]
    assert np.array_equal(video.pixels, sound)
    assert numbers(both_ways(path, times=[1.0])) == [25]


def test_frames_that_the_decoder_marks_as_corrupt_are_left_out(tmp_path):
    """A transport stream is cut within a keyframe."""
    path = encode(tmp_path / "cut.ts", options=x264(12))
    with av.open(str(path)) as source:
        key = [packet for packet in source.demux(video=0) if packet.is_keyframe][3]
    path.write_bytes(path.read_bytes()[: key.pos + 188])
    with av.open(str(path)) as source:
        marks = [frame.is_corrupt for frame in source.decode(video=0)]
    assert marks[-1] and not any(marks[:-1])
    video = both_ways(path, frames=100)
    assert numbers(video) == list(range(len(marks) - 1)) and "corrupt frames were skipped" in video.notes


class Altered:
    """A container that behaves like another but for the methods given."""

    def __init__(self, inner: av.container.InputContainer, **methods: Callable[..., object]) -> None:
        self.__dict__.update(methods, inner=inner)

    def __getattr__(self, name: str) -> object:
        return getattr(self.inner, name)


@pytest.mark.parametrize("error", [av.error.InvalidDataError(1, "bad"), IndexError("list index out of range")])
def test_container_that_breaks_off(files, monkeypatch, error):
    opened = av.open

    def altered(*a: object, **k: object) -> Altered:
        inner = opened(*a, **k)  # type: ignore[call-overload]

        def demux(stream: av.VideoStream) -> Iterator[av.Packet]:
            for packet in inner.demux(stream):
                if packet.pts == 24 * 512:
                    raise error
                yield packet

        return Altered(inner, demux=demux)

    monkeypatch.setattr(module.av, "open", altered)
    video = both_ways(files("gop12"), frames=60)
    assert numbers(video) == list(range(24)) and any(note.startswith("the file breaks off") for note in video.notes)


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "ts"])
def test_damaged_files_give_equal_frames_or_a_video_error(tmp_path, suffix):
    """Random bytes are overwritten: nothing but VideoError comes out, and seeking never changes what is read."""
    data = encode(tmp_path / f"whole.{suffix}", options=x264(12), container={"movflags": "faststart"}).read_bytes()
    rng, path, read = np.random.default_rng(0), tmp_path / f"damaged.{suffix}", 0
    for _ in range(25):
        damaged = bytearray(data)
        for position in rng.integers(0, len(data), rng.integers(1, 12)):
            damaged[position] = rng.integers(256)
        path.write_bytes(damaged)
        try:
            in_order = read_video(path, frames=6, seek=False)
        except VideoError:
            with pytest.raises(VideoError):
                read_video(path, frames=6, seek=True)
        else:
            seeking = read_video(path, frames=6, seek=True)
            assert np.array_equal(seeking.pixels, in_order.pixels)
            assert np.array_equal(seeking.timestamps, in_order.timestamps)
            read += 1
    assert read > 5


# --- errors ---------------------------------------------------------------------------------------------------


def refused(path: Path, match: str, **asked: object) -> None:
    with pytest.raises(VideoError, match=match) as caught:
        read_video(path, **(asked or {"frames": 4}))  # type: ignore[arg-type]
    assert str(path) in str(caught.value)


def test_files_that_are_no_video(tmp_path, files):
    refused(tmp_path / "no.mp4", "does not exist")
    refused(tmp_path, "is not a file")
    (tmp_path / "empty.mp4").touch()
    refused(tmp_path / "empty.mp4", "is empty")
    for name in ("text.mp4", "text.txt"):
        (tmp_path / name).write_text("not a video\n" * 1000)
    refused(tmp_path / "text.mp4", "is not a video")
    refused(tmp_path / "text.txt", "no video stream")
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"http://127.0.0.1:{server.getsockname()[1]}/a.ts"
        (tmp_path / "list.m3u8").write_text(f"#EXTM3U\n#EXTINF:2,\n{address}\n#EXT-X-ENDLIST\n")
        refused(tmp_path / "list.m3u8", "is not a video")
        server.setblocking(False)
        with pytest.raises(BlockingIOError):  # no one has called
            server.accept()


def test_labels_that_are_not_text_do_not_matter(tmp_path):
    with av.open(str(tmp_path / "a.mkv"), "w") as out:
        out.metadata["title"] = "LABEL"
        stream = out.add_stream("mpeg4", rate=25)
        stream.height, stream.width, stream.pix_fmt = 48, 80, "yuv420p"
        out.mux(stream.encode(av.VideoFrame.from_ndarray(picture(3), format="rgb24")))
        out.mux(stream.encode(None))
    data = (tmp_path / "a.mkv").read_bytes()
    assert data.count(b"LABEL") == 1
    (tmp_path / "a.mkv").write_bytes(data.replace(b"LABEL", b"\xff\xfe\xfd\xfc\xfb"))
    assert numbers(read_video(tmp_path / "a.mkv", frames=1)) == [3]


def test_truncated_so_that_nothing_decodes(tmp_path, files):
    data = files("gop12").read_bytes()  # its header is at the end
    (tmp_path / "cut.mp4").write_bytes(data[: len(data) // 2])
    refused(tmp_path / "cut.mp4", r"is not a video or cut short \(Invalid data")
    data = files("matroska").read_bytes()
    with av.open(str(files("matroska"))) as source:
        first = next(source.demux(video=0)).pos
    (tmp_path / "cut.mkv").write_bytes(data[: first + 8])
    refused(tmp_path / "cut.mkv", "no frame of it can be decoded")


def test_video_stream_of_which_no_frame_decodes(tmp_path):
    path = encode(tmp_path / "noise.mp4", "mpeg4", 12)
    with av.open(str(path)) as source:
        places = [(packet.pos, packet.size) for packet in source.demux(video=0) if packet.size]
    data = bytearray(path.read_bytes())
    for position, size in places:
        data[position : position + size] = bytes(size)
    path.write_bytes(data)
    refused(path, "no frame of it can be decoded")


def test_codec_that_nothing_decodes(tmp_path, files):
    data = files("matroska").read_bytes()
    assert data.count(b"V_MPEG4/ISO/AVC") == 1
    (tmp_path / "odd.mkv").write_bytes(data.replace(b"V_MPEG4/ISO/AVC", b"V_QUICKENED/XYZ"))
    refused(tmp_path / "odd.mkv", "uses a codec that PyAV cannot decode")


def test_sound_alone_and_cover_art_alone(tmp_path):
    with av.open(str(tmp_path / "sound.mp4"), "w") as out:
        audio = out.add_stream("aac", rate=44100)
        silence = av.AudioFrame.from_ndarray(np.zeros((2, 44100), np.float32), format="fltp", layout="stereo")
        silence.sample_rate, silence.pts = 44100, 0
        out.mux(audio.encode(silence))
        out.mux(audio.encode(None))
    refused(tmp_path / "sound.mp4", "no video stream, only sound")
    with av.open(str(tmp_path / "art.mp4"), "w") as out:
        audio, art = out.add_stream("aac", rate=44100), out.add_stream("png", rate=1)
        art.width, art.height, art.pix_fmt, art.disposition = 96, 96, "rgb24", Disposition.attached_pic.value
        frame = av.VideoFrame.from_ndarray(np.zeros((96, 96, 3), np.uint8), format="rgb24")
        frame.pts = 0
        out.mux(art.encode(frame))
        silence.pts = 0
        out.mux(audio.encode(silence))
        out.mux(audio.encode(None))
    refused(tmp_path / "art.mp4", "no video stream, only cover art")


@pytest.mark.parametrize(
    ("asked", "match"),
    [
        ({}, "give one of frames, fps and times; got none"),
        ({"frames": 4, "fps": 1.0}, "got frames and fps"),
        ({"frames": 4, "fps": 1.0, "times": [0.0]}, "got frames and fps and times"),
        ({"frames": 0}, "frames must be a whole number of at least 1; got 0"),
        ({"frames": -3}, "frames must be"),
        ({"frames": 2.5}, "frames must be"),
        ({"frames": True}, "frames must be"),
        ({"fps": 0.0}, "fps must be a number above 0"),
        ({"fps": -1.0}, "fps must be"),
        ({"fps": float("nan")}, "fps must be"),
        ({"fps": float("inf")}, "fps must be"),
        ({"fps": 1.0, "max_frames": 0}, "max_frames must be"),
        ({"frames": 4, "max_frames": 2}, "max_frames limits fps; leave it out with frames"),
        ({"times": []}, "times must be a sequence of at least one number"),
        ({"times": 1.0}, "times must be a sequence"),
    ],
)
def test_requests_that_cannot_be_met(files, asked, match):
    with pytest.raises(VideoError, match=match) as caught:
        read_video(files("gop12"), **asked)
    assert "gop12.mp4" in str(caught.value)


@pytest.mark.parametrize("seek", [True, False])
def test_interrupt_is_not_swallowed(files, monkeypatch, seek):
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(module.Reel, "offer", interrupt)
    with pytest.raises(KeyboardInterrupt):
        read_video(files("gop12"), frames=3, seek=seek)


def test_names_that_look_like_protocols_and_text_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    encode(tmp_path / "plain.mp4", count=12).rename(tmp_path / "http:a.mp4")
    assert numbers(read_video("http:a.mp4", frames=2)) == [0, 11]


# --- writing --------------------------------------------------------------------------------------------------


def pictures(indices: Iterable[int], height: int = 48, width: int = 80) -> np.ndarray:
    return np.stack([picture(i, height, width) for i in indices])


def test_what_is_written_can_be_read(tmp_path):
    pixels = pictures(range(30))
    write_video(tmp_path / "new" / "a.mp4", pixels, 30000 / 1001)
    video = both_ways(tmp_path / "new" / "a.mp4", frames=30)
    assert numbers(video) == list(range(30)) and video.notes == ()
    assert video.fps == pytest.approx(30000 / 1001) and video.timestamps[29] == pytest.approx(29 * 1001 / 30000)
    assert np.abs(video.pixels[:, :24].astype(int) - pixels[:, :24]).mean() < 4
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["a.mp4"]


def test_quality_changes_the_size(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 255, (8, 64, 64, 3), dtype=np.uint8)
    write_video(tmp_path / "good.mp4", pixels, 8, crf=5)
    write_video(tmp_path / "poor.mp4", pixels, 8, crf=45)
    assert (tmp_path / "good.mp4").stat().st_size > 3 * (tmp_path / "poor.mp4").stat().st_size


@pytest.mark.parametrize(
    ("change", "how", "match"),
    [
        (lambda p: p.astype(np.float32), {}, "must be uint8"),
        (lambda p: p[0], {}, "must be uint8"),
        (lambda p: p[:0], {}, "T at least 1"),
        (lambda p: p[..., :1], {}, "must be uint8"),
        (lambda p: p[:, :-1], {}, "even height and width"),
        (lambda p: p[:, :, :-1], {}, "even height and width"),
        (lambda p: p, {"fps": 0.0}, "fps must be above 0"),
        (lambda p: p, {"fps": float("nan")}, "fps must be above 0"),
        (lambda p: p, {"crf": 52}, "crf between 0 and 51"),
    ],
)
def test_pixels_that_cannot_be_written(tmp_path, change, how, match):
    with pytest.raises(VideoError, match=match):
        write_video(tmp_path / "a.mp4", change(pictures(range(2))), **({"fps": 25.0} | how))
    assert list(tmp_path.iterdir()) == []


def test_paths_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="cannot write"):
        write_video(tmp_path / "file" / "a.mp4", pictures(range(2)), 25)
    (tmp_path / "folder").mkdir()
    with pytest.raises(OutputError, match="cannot write"):
        write_video(tmp_path / "folder", pictures(range(2)), 25)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder"]


@pytest.mark.parametrize("error", [av.error.OSError, av.error.ExternalError])
def test_failing_half_way_keeps_the_old_file(tmp_path, monkeypatch, error):
    path = tmp_path / "a.mp4"
    write_video(path, pictures(range(3)), 25)
    old, made = path.read_bytes(), []

    def fail(*arguments: object, **how: object) -> av.VideoFrame:
        made.append(1)
        if len(made) == 3:
            raise error(28, "No space left on device")
        return frame(*arguments, **how)

    frame = av.VideoFrame.from_ndarray
    monkeypatch.setattr("vidsieve.video.reading.VideoFrame", type("Failing", (), {"from_ndarray": staticmethod(fail)}))
    with pytest.raises(OutputError, match=r"cannot write .*a\.mp4: No space left"):
        write_video(path, pictures(range(5)), 25)
    assert path.read_bytes() == old and [p.name for p in tmp_path.iterdir()] == ["a.mp4"]


# --- files whose container says one thing and whose frames are another -----------------------------------------

FILES = Path(__file__).parent / "files"


def decoded(path: Path) -> list[np.ndarray]:
    """Return every frame of a file as it comes out of the decoder, from its start."""
    with av.open(str(path)) as container:
        container.streams.video[0].thread_count = 1
        return [rgb(frame) for frame in container.decode(video=0)]


def raw_palette(path: Path) -> Path:
    """Write ten 8-bit frames whose palette goes with the first packet, each frame of another colour."""
    palette = np.zeros((256, 4), np.uint8)
    palette[:, 0], palette[:, 1] = 255, np.arange(256)
    with av.open(str(path), "w") as out:
        stream = out.add_stream("rawvideo", rate=10)
        stream.width, stream.height, stream.pix_fmt = 32, 16, "pal8"
        for count in range(10):
            picture = np.full((16, 32), 20 * count + 10, np.uint8)
            out.mux(stream.encode(av.VideoFrame.from_ndarray((picture, palette), format="pal8")))
        out.mux(stream.encode(None))
    return path


@pytest.mark.parametrize("name", ["smc.mov", "raw.avi", "raw.mov"])
def test_a_palette_that_comes_once_is_not_lost_by_seeking(name, tmp_path):
    path = FILES / name if (FILES / name).exists() else raw_palette(tmp_path / name)
    plain, whole = decoded(path), read_video(path, frames=1000, seek=False)
    assert np.array_equal(whole.pixels, plain) and whole.pixels[-1].any()
    for seek in (None, True):
        for place in range(1, len(plain), 4):
            video = read_video(path, times=[float(whole.timestamps[place])], seek=seek)
            assert np.array_equal(video.pixels[0], plain[place])
            assert any(note.startswith("read from its start") for note in video.notes)


def test_false_keyframes_and_timestamps_out_of_order_do_not_change_the_frames():
    path = FILES / "packed.avi"  # XviD with packed B-frames: placeholders are flagged as keyframes
    plain, whole = decoded(path), read_video(path, frames=1000)
    assert len(plain) == 58 and np.array_equal(whole.pixels, plain)
    assert "its timestamps are not in the order in which its frames are shown: they were sorted" in whole.notes
    for place, second in enumerate(whole.timestamps):
        assert np.array_equal(read_video(path, times=[float(second)]).pixels[0], plain[place]), place
    assert np.array_equal(both_ways(path, frames=8).pixels, [plain[n] for n in uniform(58, 8)])


@pytest.mark.parametrize("codec", ["mpeg4", "mpeg2video", "libx265"])
def test_packets_flagged_as_keyframes_that_are_none(codec, tmp_path):
    """Every packet of a file is called a keyframe: jumping to one of them gives grey rubbish."""
    options = {"g": "24"} if codec != "libx265" else {"x265-params": "keyint=24:log-level=none:pools=none"}
    path = encode(tmp_path / "false.mp4", codec, options=options)
    data = path.read_bytes()
    assert data.count(b"stss") == 1  # the list of keyframes; without it all samples are some
    path.write_bytes(data.replace(b"stss", b"free"))
    with av.open(str(path)) as made:
        assert all(packet.is_keyframe for packet in made.demux(video=0) if packet.size)
    plain = decoded(path)
    for place in range(0, 60, 7):
        assert np.array_equal(read_video(path, times=[place / 25], seek=True).pixels[0], plain[place])
        assert np.array_equal(read_video(path, times=[place / 25]).pixels[0], plain[place])


def test_an_unknown_codec_is_read_through(tmp_path, monkeypatch):
    path = encode(tmp_path / "new.mp4", options=x264(12))
    monkeypatch.setattr(module, "SEEKABLE", frozenset())
    video = read_video(path, times=[1.0], seek=True)
    assert numbers(video) == [25]
    assert video.notes == ("read from its start: keyframes of h264 may need what lies before them",)
    assert read_video(path, times=[1.0], seek=False).notes == ()


def test_pixels_that_are_not_square_are_shown_as_wide_as_players_show_them(tmp_path):
    path = tmp_path / "wide.mp4"
    with av.open(str(path), "w") as out:
        stream = out.add_stream("libx264", rate=25, options=x264(12))
        stream.height, stream.width, stream.pix_fmt = 48, 80, "yuv420p"
        stream.codec_context.sample_aspect_ratio = Fraction(2, 1)
        for count in range(8):
            out.mux(stream.encode(av.VideoFrame.from_ndarray(picture(count), format="rgb24")))
        out.mux(stream.encode(None))
    video = both_ways(path, frames=8)
    assert video.size == (48, 160) and video.pixels.shape == (8, 48, 160, 3) and numbers(video) == list(range(8))
    assert video.notes == ("pixels are 2 times as wide as high: frames of 80×48 were scaled to 160×48",)


# --- images of other depths, and images that move --------------------------------------------------------------


def test_grey_of_sixteen_bits_and_floats_is_scaled_and_not_cut_off(tmp_path):
    ramp = np.linspace(0, 1, 256).reshape(16, 16)
    images = {
        "eight.png": Image.fromarray((ramp * 255).round().astype(np.uint8)),
        "sixteen.png": Image.fromarray((ramp * 65535).round().astype(np.uint16)),
        "float.tif": Image.fromarray(ramp.astype(np.float32)),
        "whole.tif": Image.fromarray((ramp * 65535).round().astype(np.int32)),
    }
    for name, image in images.items():
        image.save(tmp_path / name)
        assert np.array_equal(read_image(tmp_path / name)[..., 0], (ramp * 255).round()), name
    for name, values in {"depth.tif": ramp * 7, "signed.tif": ramp - 0.5, "nan.tif": ramp * np.nan}.items():
        Image.fromarray(values.astype(np.float32)).save(tmp_path / name)
        with pytest.raises(VideoError, match="nothing says which of them is white"):
            read_image(tmp_path / name)


def test_of_an_avif_with_a_still_image_the_track_is_read():
    video = read_video(FILES / "anim.avif", frames=4)
    assert video.num_frames == 20 and video.duration == pytest.approx(2) and len(video.pixels) == 4


def test_an_animated_webp_is_refused_by_name(tmp_path):
    path = tmp_path / "plain.webp"
    frames = [Image.fromarray(picture(n)) for n in range(4)]
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=100)
    with pytest.raises(VideoError, match=r"animated WebP, which FFmpeg does not read: save it as mp4"):
        read_video(path, frames=2)


def test_the_packets_of_a_video_in_parts_are_read_once(files, monkeypatch):
    asked, original = [], File.index
    monkeypatch.setattr(File, "index", lambda file: asked.append(1) or original(file))
    assert len(list(read_parts(files("gop48"), 25.0, frames=4))) > 3 and asked == [1]


@pytest.mark.parametrize("fps", [7.0, 40.0])
def test_parts_of_a_video_are_its_frames_a_few_at_a_time(files, fps):
    whole = read_video(files("gop48"), fps=fps)
    parts = [part for part, _ in read_parts(files("gop48"), fps, frames=8)]
    assert max(len(part.pixels) for part in parts) <= 8
    assert np.array_equal(np.concatenate([part.pixels for part in parts]), whole.pixels)
    assert np.array_equal(np.concatenate([part.timestamps for part in parts]), whole.timestamps)
    with pytest.raises(VideoError, match="fps must be a number above 0"):
        next(read_parts(files("gop48"), 0.0))
