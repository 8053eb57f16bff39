"""Videos, playlists and images that strangers send: each attack, and the answer that is expected."""

from __future__ import annotations

import json
import os
import re
import socket
import struct
import subprocess
import sys
import weakref
from contextlib import closing
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from vidsieve.cli import app
from vidsieve.errors import VideoError
from vidsieve.serving.batch_groups import read_row
from vidsieve.training.data.layouts import confined_records
from vidsieve.video import limits, opening, reading
from vidsieve.video.decoding import File
from vidsieve.video.opening import VideoFile, claimed_samples
from vidsieve.video.reading import read_frames, read_image, read_video, write_video


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a folder with a video in two containers, below another one with the same."""
    inner = tmp_path / "inner"
    for place in (tmp_path, inner):
        write_video(place / "a.mp4", np.full((8, 32, 48, 3), 90, np.uint8), 8)
        with av.open(str(place / "a.mp4")) as source, av.open(str(place / "a.ts"), "w") as out:
            copy = out.add_stream_from_template(source.streams.video[0])
            for packet in source.demux(video=0):
                if packet.size:
                    packet.stream = copy
                    out.mux(packet)
    (inner / "out.mp4").symlink_to(tmp_path / "a.mp4")
    (inner / "out.ts").symlink_to(tmp_path / "a.ts")
    os.mkfifo(inner / "fifo.ts")
    return inner


def hls(member: str, tag: str = "", end: str = "#EXT-X-ENDLIST\n") -> str:
    return f"#EXTM3U\n#EXT-X-TARGETDURATION:2\n{tag}#EXTINF:2.0,\n{member}\n{end}"


def script(member: str) -> str:
    return f"ffconcat version 1.0\nfile {member}\n"


def refused(path: Path, match: str, **how: Any) -> None:
    with pytest.raises(VideoError, match=match) as caught:
        read_video(path, **({"frames": 4} | how))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["x.mp4", "x.m3u8", "x.ffconcat", "x.mpd", "x.txt"])
@pytest.mark.parametrize(
    ("text", "what"),
    [
        (hls("a.ts"), "is not a video but an HLS playlist, which names other files"),
        ("\ufeff\n" + hls("a.ts"), "an HLS playlist"),
        (script("a.mp4"), "an ffconcat script, which names other files"),
        ('<?xml version="1.0"?>\n<MPD><BaseURL>a.mp4</BaseURL></MPD>', "a DASH manifest, which names other files"),
        ("v=0\nm=video 5004 RTP/AVP 96\n", "an SDP description, which names other files"),
    ],
)
def test_a_file_that_names_others_is_refused_by_name(folder, name, text, what):
    (folder / name).write_text(text, encoding="utf-8")
    refused(folder / name, what)


@pytest.mark.parametrize(
    "name",
    [
        *("concat:a.mp4|a.mp4", "file:a.mp4", "subfile,,start,0,end,99,,:a.mp4", "http://127.0.0.1:1/a.mp4", "pipe:0"),
        *("data:,x", "tcp://127.0.0.1:1", "testsrc", "lavfi:testsrc", "*.mp4", "a%03d.mp4", "a.mp4\0", "\ud800.mp4"),
    ],
)
def test_a_path_is_a_path(folder, monkeypatch, name):
    monkeypatch.chdir(folder)
    refused(Path(name), "does not exist")


def test_an_image_sequence_is_none_though_a_file_has_its_name(folder):
    for name in ("p%03d.png", "p000.png", "p001.png"):
        Image.new("RGB", (16, 16)).save(folder / name)
    refused(folder / "p%03d.png", "is not a video")


@pytest.mark.parametrize(
    ("name", "match"),
    [
        *(
            ("fifo.ts", "is not a file"),
            (".", "is not a file"),
            ("socket", "is not a file"),
            ("/dev/zero", "is not a file"),
        ),
        *(("/dev/stdin", "is not a file|does not exist|is empty"), ("/proc/self/mem", "is empty|does not exist")),
    ],
)
def test_pipes_devices_and_folders_are_not_opened(folder, monkeypatch, name, match):
    monkeypatch.chdir(folder)
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind("socket")
        refused(Path(name), match)
        for read in (lambda: read_image(name), lambda: read_frames([(name, 1)])):
            with pytest.raises(VideoError, match=match):
                read()


@pytest.mark.parametrize("text", [hls("a.ts"), script("a.mp4"), script("'a.mp4'")])
def test_a_playlist_is_read_if_asked_for(folder, text):
    kind = "m3u8" if text.startswith("#EXTM3U") else "ffconcat"
    (folder / f"x.{kind}").write_text(text)
    video = read_video(folder / f"x.{kind}", frames=4, allow_playlists=True)
    assert video.pixels.shape == (4, 32, 48, 3)


@pytest.mark.parametrize("member", ["../a", "{above}/a", "out", "fifo.ts#", "http://127.0.0.1:1/a", "x", "x.m3u8#"])
@pytest.mark.parametrize("kind", ["m3u8", "ffconcat"])
def test_members_of_a_playlist_are_files_below_it(folder, kind, member):
    """Absolute paths, `..`, links, pipes, addresses and other playlists are refused before they are opened."""
    member = member.format(above=folder.parent)
    member = member[:-1] if member.endswith("#") else f"{member}.{'ts' if kind == 'm3u8' else 'mp4'}"
    (folder / "x.m3u8").write_text(hls("a.ts"))
    path = folder / f"list.{kind}"
    path.write_text((hls if kind == "m3u8" else script)(member))
    refused(path, "outside its folder|is not a file|does not exist|HLS playlist", allow_playlists=True)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        (hls("a.ts", end=""), "has no end"),
        (hls("a.ts", '#EXT-X-KEY:METHOD=AES-128,URI="../a.ts"\n'), "outside its folder"),
        (hls("a.ts", '#EXT-X-MAP:URI="../a.mp4"\n'), "outside its folder"),
        (hls("a.ts").replace("#EXTINF:2.0,\na.ts", "#EXT-X-STREAM-INF:BANDWIDTH=1\nx.m3u8"), "names .*HLS playlist"),
        (script("a.mp4\n#\0file fifo.ts"), "is not a file"),
        (script("x.m3u8"), "an ffconcat script"),
        (script("a.mp4\noption safe 0"), "is not a video"),
    ],
)
def test_a_playlist_leads_nowhere_else(folder, text, match):
    (folder / "x.m3u8").write_text(text)
    refused(folder / "x.m3u8", match, allow_playlists=True)


def boxes(name: bytes, *parts: bytes) -> bytes:
    body = b"".join(parts)
    return struct.pack(">I4s", 8 + len(body), name) + body


def mp4(path: Path, samples: int, width: int = 64, height: int = 64, tracks: int = 1) -> Path:
    """Write a small file whose header claims any number of samples of one byte, all in one place."""
    head = boxes(b"ftyp", b"isom\0\0\2\0isomiso2mp41") + boxes(b"mdat", bytes(1000))
    matrix = struct.pack(">9I", 1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30)
    entry = bytes(7) + b"\1" + bytes(16) + struct.pack(">HHIIIH", width, height, 72 << 16, 72 << 16, 0, 1)
    entry = boxes(b"mp4v", entry + bytes(32) + struct.pack(">Hh", 24, -1))
    table = boxes(
        b"stbl",
        boxes(b"stsd", struct.pack(">II", 0, 1), entry),
        boxes(b"stts", struct.pack(">IIII", 0, 1, samples, 1)),
        boxes(b"stsc", struct.pack(">5I", 0, 1, 1, samples, 1)),
        boxes(b"stsz", struct.pack(">III", 0, 1, samples)),
        boxes(b"stco", struct.pack(">III", 0, 1, 32)),
    )
    media = boxes(
        b"mdia",
        boxes(b"mdhd", struct.pack(">5I", 0, 0, 0, 1000, samples), b"\x55\xc4\0\0"),
        boxes(b"hdlr", bytes(8) + b"vide" + bytes(13)),
        boxes(b"minf", boxes(b"vmhd", b"\0\0\0\1" + bytes(8)), table),
    )
    size = struct.pack(">II", width << 16, height << 16)
    track = boxes(b"trak", boxes(b"tkhd", struct.pack(">6I", 3, 0, 0, 1, 0, samples), bytes(16), matrix, size), media)
    start = struct.pack(">5IIHH", 0, 0, 0, 1000, samples, 1 << 16, 0x100, 0)
    path.write_bytes(
        head + boxes(b"moov", boxes(b"mvhd", start, bytes(8), matrix, bytes(24), struct.pack(">I", 2)), track * tracks)
    )
    return path


def peak() -> int:
    """Return the most memory that this process has ever claimed, in bytes."""
    return 1024 * int(re.findall(r"VmPeak:\s+(\d+)", Path("/proc/self/status").read_text())[0])


@pytest.mark.parametrize(("samples", "size"), [(10**9, 64), (80_000_000, 64), (50, 65535)])
def test_a_header_that_claims_too_much_costs_nothing(tmp_path, samples, size):
    before = peak()
    message = "claims millions of samples" if samples > 10**6 else "would take 1 × 65535 × 65535 pixels|no frame of it"
    refused(mp4(tmp_path / "a.mp4", samples, size, size), message)
    assert peak() < before + 2**29


def test_tracks_together_claim_no_more_than_one_may(tmp_path):
    before = peak()
    refused(mp4(tmp_path / "a.mp4", 10**6, tracks=20), "claims millions of samples")
    refused(mp4(tmp_path / "b.mp4", 10**5, tracks=8), "no frame of it can be decoded")
    whole = (tmp_path / "a.mp4").read_bytes()
    for name, data in (("moved", whole.replace(b"moov", b"mooo")), ("packed", whole.replace(b"mvhd", b"dcom"))):
        (tmp_path / f"{name}.mp4").write_bytes(data)
        refused(tmp_path / f"{name}.mp4", "claims millions of samples")
    assert peak() < before + 2**29


def test_runs_of_a_fragment_and_sounds_are_counted_as_ffmpeg_does(tmp_path):
    path = tmp_path / "a.mp4"
    run = boxes(b"moof", boxes(b"traf", boxes(b"trun", struct.pack(">II", 0, 10**9))))
    path.write_bytes(boxes(b"ftyp", b"isom\0\0\2\0") + run)
    assert claimed_samples(path) == 10**9
    path.write_bytes(mp4(path, 10**9).read_bytes().replace(b"vide", b"soun"))  # PCM of six hours
    assert claimed_samples(path) == 0
    path.write_bytes(b"\x1a\x45\xdf\xa3" + bytes(4000))
    assert claimed_samples(path) == 0


def test_segments_of_a_playlist_together_claim_no_more_than_one_may(folder):
    for samples, match in (
        (10**9, "claims millions of samples"),
        (10**6, "no frame of it|claims millions"),
    ):
        mp4(folder / "part.mp4", samples)
        text = hls("part.mp4").replace("part.mp4\n", "part.mp4\n" + "#EXTINF:2.0,\npart.mp4\n" * 5)
        (folder / "list.m3u8").write_text(text)
        before = peak()
        refused(folder / "list.m3u8", match, allow_playlists=True)
        assert peak() < before + 2**29
    whole = (folder / "part.mp4").read_bytes()
    (folder / "hidden.mp4").write_bytes(boxes(b"free", mp4(folder / "part.mp4", 10**9).read_bytes()))
    ranges = hls("hidden.mp4").replace("hidden", f"#EXT-X-BYTERANGE:{len(whole)}@8\nhidden")
    (folder / "list.m3u8").write_text(ranges)
    refused(folder / "list.m3u8", "claims millions of samples", allow_playlists=True)


def test_a_manifest_says_that_it_cannot_be_allowed(folder):
    (folder / "x.mpd").write_text("<MPD></MPD>")
    refused(
        folder / "x.mpd", "a DASH manifest, .*only HLS playlists and ffconcat scripts can be read", allow_playlists=True
    )


def test_frames_times_pixels_are_limited_before_decoding(folder, monkeypatch):
    monkeypatch.setattr(limits, "pixels", 50 * 32 * 48)
    times = [0.0] * 51
    assert len(read_video(folder / "a.mp4", times=times[1:]).pixels) == 50
    monkeypatch.setattr(reading, "decode_groups", None)  # would raise TypeError
    refused(
        folder / "a.mp4", r"51 × 48 × 32 pixels, .*past the limit of 76800: .*--max-pixels", frames=None, times=times
    )
    monkeypatch.setattr(limits, "pixels", 14 * 32 * 48)  # H.264 may hold 17 frames, of 1.5 bytes a pixel and tables
    refused(folder / "a.mp4", "would take 8 × 48 × 32 pixels, and 0 MiB to decode them", frames=8)
    refused(folder / "a.mp4", "would take 8 × 48 × 32 pixels", frames=None, fps=1e9)
    refused(folder / "a.mp4", "would take 1000 × 48 × 32 pixels", frames=None, times=[0.0] * 1000)
    refused(folder / "a.mp4", "fps must be a number above 0, up to", frames=None, fps=1e300)
    monkeypatch.setattr(limits, "pixels", 7 * 32 * 48)
    refused(folder / "a.mp4", "would take 1 × 48 × 32 pixels", frames=1)


def test_frames_that_grow_within_a_stream_are_not_decoded(tmp_path, monkeypatch):
    for name, size in (("small", 32), ("large", 256)):
        with av.open(str(tmp_path / f"{name}.h264"), "w") as out:
            stream = out.add_stream("libx264", rate=8)
            stream.height, stream.width, stream.pix_fmt = size, size, "yuv420p"
            for _ in range(4):
                out.mux(stream.encode(av.VideoFrame.from_ndarray(np.zeros((size, size, 3), np.uint8), format="rgb24")))
            out.mux(stream.encode(None))
    path = tmp_path / "both.h264"
    path.write_bytes((tmp_path / "small.h264").read_bytes() + (tmp_path / "large.h264").read_bytes())
    assert read_video(path, frames=2).size == (32, 32)
    monkeypatch.setattr(limits, "pixels", 8 * 128 * 128)
    refused(path, "has frames of more than 16384 pixels", frames=2)


@pytest.mark.parametrize(
    ("name", "value", "match"), [("seconds", 0.0, "was not read within 0 s"), ("packets", 5, "more than 5 packets")]
)
def test_time_and_packets_are_limited(folder, monkeypatch, name, value, match):
    monkeypatch.setattr(limits, name, value)
    refused(folder / "a.mp4", match)


def test_time_is_limited_between_packets(folder):
    with closing(File(VideoFile(folder / "a.mp4", end=0.0))) as file, pytest.raises(VideoError, match="was not read"):
        next(file.packets())


def test_images_are_limited_and_of_formats_that_run_nothing(tmp_path, monkeypatch):
    Image.new("RGB", (100, 100)).save(tmp_path / "a.png")
    (tmp_path / "eps.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n%%EOF\n")
    with pytest.raises(VideoError, match="EPS is not read"):
        read_image(tmp_path / "eps.png")
    Image.new("RGB", (16, 16)).save(tmp_path / "a.ico")
    with pytest.raises(VideoError, match="ICO is not read"):
        read_image(tmp_path / "a.ico")
    with pytest.raises(VideoError, match="at least one frame and at most"):
        read_frames([(tmp_path / "a.png", 10**12)], frames=4)
    with pytest.raises(VideoError, match=r"would take 100000 × 100 × 100 pixels"):
        read_frames([(tmp_path / "a.png", 100_000)])
    assert len(read_frames([(tmp_path / "a.png", 10**8)], frames=4).pixels) == 4
    monkeypatch.setattr(limits, "pixels", 38_000)
    with pytest.raises(VideoError, match="would take 1 × 100 × 100 pixels"):
        read_image(tmp_path / "a.png")


PEAK = """
import resource, sys
from vidsieve.video.reading import read_image, read_video
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    read_image(sys.argv[1]) if sys.argv[2] == "image" else read_video(sys.argv[1], frames=1)
finally:
    print(1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before))
"""


def cost(path: Path, how: str = "video") -> tuple[int, str]:
    """Return the memory that reading takes in a process of its own, and its error."""
    small = "import subprocess, sys; sys.exit(subprocess.run([sys.executable, *sys.argv[1:]]).returncode)"
    run = [sys.executable, "-S", "-c", small, "-c", PEAK, str(path), how]
    done = subprocess.run(
        run, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    )
    return int(done.stdout), (done.stderr.splitlines() or [""])[-1]


def encoded(path: Path, codec: str, form: str, size: int, frames: int, **options: str) -> Path:
    with av.open(str(path), "w") as out:
        stream = out.add_stream(codec, rate=8, options=options)
        stream.width, stream.height, stream.pix_fmt, stream.thread_count = size, size, form, 1
        for count in range(frames):
            frame = av.VideoFrame(size, size, form)
            frame.pts = count
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    return path


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "codec", "form", "size", "message"),
    [
        ("a.apng", "apng", "rgba", 8000, "frames of more than 33554432 pixels"),
        ("b.apng", "apng", "rgba", 4000, "would take 1 × 4000 × 4000 pixels, and .* MiB to decode"),
        ("c.apng", "apng", "rgba", 3400, ""),
        ("d.mp4", "libx264", "yuv444p", 3600, ""),
    ],
)
def test_frames_that_a_decoder_holds_are_counted(tmp_path, name, codec, form, size, message):
    how = {"pred": "none"} if codec == "apng" else {"preset": "ultrafast", "x264-params": "ref=16:keyint=99:bframes=0"}
    taken, error = cost(encoded(tmp_path / name, codec, form, size, 6 if codec == "apng" else 24, **how))
    assert taken < 2**30 and (re.search(message, error) if message else not error), (taken, error)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "size"), [("jpg", 8192), ("tif", 8192), ("webp", 5792), ("jp2", 5792), ("jp2", 5936)])
def test_an_image_within_the_limit_takes_less_than_a_gibibyte(tmp_path, kind, size):
    Image.new("CMYK" if kind == "jpg" else "RGBA", (size, size)).save(tmp_path / f"a.{kind}")
    taken, error = cost(tmp_path / f"a.{kind}", "image")
    assert taken < 2**30 and ("would take 1 × 5936" in error if size == 5936 else not error), (taken, error)


def test_a_closed_file_frees_its_decoder(folder):
    file = File(VideoFile(folder / "a.mp4"))
    codec = weakref.ref(file.codec) if hasattr(file.codec, "__weakref__") else None
    file.close()
    assert not hasattr(file, "codec") and (codec is None or codec() is None)


def element(name: str, *parts: bytes) -> bytes:
    body = b"".join(parts)
    return bytes.fromhex(name) + (len(body) | 1 << 56).to_bytes(8, "big") + body


def matroska(path: Path, tracks: int = 1, attached: int = 0) -> Path:
    """Write tracks of one VP8 keyframe each, and an attachment of zeros."""
    with av.open(str(encoded(path.with_suffix(".ivf"), "libvpx", "yuv420p", 64, 1))) as source:
        data = next(bytes(packet) for packet in source.demux(video=0))
    size = element("e0", element("b0", b"\x40"), element("ba", b"\x40"))
    entries = [
        element("ae", element("d7", number.to_bytes(2, "big")), element("83", b"\1"), element("86", b"V_VP8"), size)
        for number in range(1, tracks + 1)
    ]
    blocks = [
        element("a3", (number | 1 << 14).to_bytes(2, "big") + b"\0\0\x80", data) for number in range(1, tracks + 1)
    ]
    font = element("466e", b"a.ttf") + element("4660", b"font/ttf") + element("46ae", b"\x7f")
    files = element("1941a469", element("61a7", font, element("465c", bytes(attached)))) if attached else b""
    body = element("1654ae6b", *entries) + files + element("1f43b675", element("e7", b"\0"), *blocks)
    path.write_bytes(element("1a45dfa3", element("4282", b"matroska")) + element("18538067", body))
    return path


def test_streams_and_headers_are_limited_before_a_decoder_sees_them(tmp_path, monkeypatch):
    assert read_video(matroska(tmp_path / "a.mkv", 8, 1000), frames=1).size == (64, 64)
    monkeypatch.setattr(VideoFile, "check_time", lambda file: None)
    refused(matroska(tmp_path / "b.mkv", 9), "has 9 streams, 9 of them videos, past the limits of 256 and 8", frames=1)
    refused(matroska(tmp_path / "c.mkv", 10_000), "of them videos, past the limits of 256 and 8", frames=1)
    monkeypatch.setattr(opening._Counted, "left", 2**20)
    refused(matroska(tmp_path / "d.mkv", 1, 2**21), "has a header of more than", frames=1)


@pytest.mark.parametrize(
    ("tick", "times", "match"),
    [
        ((1, 1), (0, 2**62 - 1), "damaged timestamps"),
        ((1, 1), (0, 2**31), ""),
        ((2**31 - 1, 1), (0, 2**62), "damaged timestamps"),
        ((1000, 1), (0, 2**63 - 10), "damaged timestamps"),
        ((1, 2**31), (0, 2**62), ""),
        ((1, 0), (0, 1), "is not a video"),
        ((0, 1), (0, 2**61), "is not a video"),
        ((1, 1), (-(2**62), 2**62), "damaged timestamps"),
    ],
)
def test_absurd_times_are_right_or_refused(tmp_path, tick, times, match):
    """A second has tick[1] / tick[0] of the units in which an IVF file counts."""
    with av.open(str(encoded(tmp_path / "a.ivf", "libvpx", "yuv420p", 64, 2))) as source:
        data = [bytes(packet) for packet in source.demux(video=0) if packet.size]
    head = struct.pack("<4sHH4sHHIIII", b"DKIF", 0, 32, b"VP80", 64, 64, tick[1], tick[0], 2, 0)
    frames = [struct.pack("<Iq", len(one), time) + one for one, time in zip(data, times, strict=True)]
    (tmp_path / "b.ivf").write_bytes(head + b"".join(frames))
    try:
        video = read_video(tmp_path / "b.ivf", frames=2)
    except VideoError as error:
        assert match and match.split("|")[0] in str(error)
        return
    assert not match or match.endswith("|")
    assert (video.timestamps >= 0).all() and video.duration >= video.timestamps[1]
    assert match or video.timestamps[1] == pytest.approx((times[1] - times[0]) * tick[0] / tick[1])


@pytest.mark.parametrize("kind", ["tif", "jpg"])
def test_an_image_with_exif_data_is_turned_as_a_video(tmp_path, kind):
    exif, pixels = Image.Exif(), np.zeros((32, 64, 3), np.uint8)
    exif[0x112], pixels[:, 32:] = 6, 255
    Image.fromarray(pixels).save(tmp_path / f"a.{kind}", exif=exif)
    video, image = read_video(tmp_path / f"a.{kind}", frames=1), read_image(tmp_path / f"a.{kind}")
    assert np.abs(video.pixels[0].astype(int) - image).max() < 20


OUTSIDE = ["../a.mp4", "{above}/a.mp4", "out.mp4", "no/../../a.mp4"]


@pytest.mark.parametrize("name", OUTSIDE)
def test_rows_stay_inside_the_root_that_is_given(folder, name):
    name = name.format(above=folder.parent)
    rows, good = folder.parent / "rows.jsonl", {"video": "a.mp4", "caption": "x"}
    rows.write_text("".join(f"{json.dumps(row)}\n" for row in (good, good | {"video": name})))
    first, second = confined_records(rows, folder)
    assert first.rows and not second.rows and f"lies outside {folder}" in second.fault
    assert len(list(confined_records(rows))[1].rows) == 1  # without a root, paths are the user's
    asked = [json.dumps({"video": video, "question": "What?"}).encode() for video in ("a.mp4", name)]
    assert not read_row(asked[0], 1, folder, True).fault
    assert "lies outside" in read_row(asked[1], 1, folder, True).fault and not read_row(asked[1], 1, folder).fault


def test_rows_past_a_limit_are_counted_and_passed_over(folder):
    write_video(folder / "large.mp4", np.zeros((8, 64, 96, 3), np.uint8), 8)
    (folder / "list.m3u8").write_text(hls("a.ts"))
    names = ("a.mp4", "large.mp4", "list.m3u8", "fifo.ts", "../a.mp4")
    rows = folder / "rows.jsonl"
    rows.write_text("".join(json.dumps({"video": name, "caption": "x"}) + "\n" for name in names))
    asked = ["data", "check", str(rows), "--frames", "8", "--max-pixels", "70000", "--video-root", str(folder)]
    try:
        result = CliRunner().invoke(app, asked)
    finally:
        limits.pixels = type(limits).pixels
    text = " ".join(result.output.split())
    assert result.exit_code == 0 and "1 of 4 well-formed rows can be used" in text
    for reason in ("1 malformed record", "1 missing video", "2 broken videos", "would take 8 × 96 × 64 pixels"):
        assert reason in text
