"""Reads 32 uniform frames of ten minutes of 1080p, by seeking and by decoding whole, and compares the times.

    python benchmarks/video_seek.py [--cache FOLDER] [--json benchmarks/results/video_seek.json]

Makes one H.264 file with a keyframe every 250 frames and one with a keyframe every 48 (libx264 veryfast, 25 fps):
100 seconds of moving texture with the frame number drawn into it, repeated six times without encoding again.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from pathlib import Path

import av
import numpy as np
from av.video.reformatter import VideoReformatter

from vidsieve.io.files import writing
from vidsieve.video.decoding import ONE_THREAD
from vidsieve.video.reading import read_video

HEIGHT, WIDTH, FPS = 1080, 1920, 25
CYCLE, CYCLES = 2500, 6  # frames that are encoded, and how often they follow each other in the file
FRAMES = 32
BITS, CELL = 12, 48  # of the frame number drawn into the picture; width of one bit in pixels


def texture(rng: np.random.Generator) -> np.ndarray:
    """Return a grey picture larger than the frame, with detail at all scales."""
    height, width = HEIGHT + 256, WIDTH + 512
    out = np.full((height, width), 128, np.float32)
    for cell, strength in ((128, 60), (32, 35), (8, 18), (2, 8)):
        grid = rng.standard_normal((height // cell + 2, width // cell + 2)).astype(np.float32)
        y, x = np.arange(height) / cell, np.arange(width) / cell
        top, left = y.astype(int), x.astype(int)
        down, right = (y - top)[:, None].astype(np.float32), (x - left)[None].astype(np.float32)
        upper = grid[top][:, left] * (1 - right) + grid[top][:, left + 1] * right
        lower = grid[top + 1][:, left] * (1 - right) + grid[top + 1][:, left + 1] * right
        out += strength * (upper * (1 - down) + lower * down)
    return out.clip(16, 232).astype(np.uint8)


class Scene:
    """Frames in yuv420p: a scrolling texture, patches of another that cross it, grain and the frame number."""

    def __init__(self) -> None:
        rng = np.random.default_rng(0)
        self.textures = [texture(rng) for _ in range(4)]
        self.colours = [np.ascontiguousarray(t[::2, ::2]) for t in self.textures]
        self.grain = [rng.integers(0, 3, (HEIGHT, WIDTH), dtype=np.uint8) for _ in range(5)]

    def frame(self, i: int) -> np.ndarray:
        """Return frame `i`, (1.5·H, W) uint8."""
        shot, k = divmod(i, 250)
        back, front = self.textures[shot % 4], self.textures[(shot + 1) % 4]
        y, x = abs(2 * k % 256 - 128) // 2 * 2, 2 * k
        out = np.empty((HEIGHT * 3 // 2, WIDTH), np.uint8)
        luma = out[:HEIGHT]
        np.add(back[y : y + HEIGHT, x : x + WIDTH], self.grain[i % 5], out=luma)
        for j in range(3):
            top, left = (173 * j + 2 * k * (j + 1)) % (HEIGHT - 200), (311 * j + 2 * k * (7 - j)) % (WIDTH - 300)
            luma[top : top + 200, left : left + 300] = front[20 * j : 20 * j + 200, 50 * j : 50 * j + 300]
        luma[:CELL, : BITS * CELL] = np.repeat([235 if i >> bit & 1 else 16 for bit in range(BITS)], CELL)
        for plane, shift in ((out[HEIGHT : HEIGHT * 5 // 4], 0), (out[HEIGHT * 5 // 4 :], 2)):
            colour = self.colours[(shot + shift) % 4][y // 2 : (y + HEIGHT) // 2, x // 2 : (x + WIDTH) // 2]
            plane[:] = colour.reshape(HEIGHT // 4, WIDTH)
        return out


def make(path: Path, gop: int) -> None:
    """Write the file with a keyframe every `gop` frames, unless it is there."""
    if path.exists():
        return
    length = CYCLE // gop * gop  # whole groups, so that the last frame of a cycle can be followed by its first
    scene = Scene()
    with writing(path) as temporary, av.open(str(temporary), "w", format="mp4") as out:
        parameters = f"keyint={gop}:min-keyint={gop}:scenecut=0:threads=1"
        stream = out.add_stream(
            "libx264", rate=FPS, options={"preset": "veryfast", "x264-params": parameters, "crf": "28"}
        )
        stream.width, stream.height, stream.pix_fmt, stream.thread_count = WIDTH, HEIGHT, "yuv420p", 1
        packets = []
        for i in range(length):
            frame = av.VideoFrame.from_ndarray(scene.frame(i), format="yuv420p")
            frame.pts = i
            packets += stream.encode(frame)
        packets += stream.encode(None)
        kept = [(bytes(p), p.pts, p.dts, p.duration, p.is_keyframe, p.time_base) for p in packets]
        for cycle in range(CYCLES):
            for data, pts, dts, duration, is_keyframe, time_base in kept:
                packet = av.Packet(data)
                shift = round(cycle * length / FPS / time_base)
                packet.pts, packet.dts, packet.duration = pts + shift, dts + shift, duration
                packet.time_base, packet.is_keyframe, packet.stream = time_base, is_keyframe, stream
                out.mux(packet)


def number(picture: np.ndarray) -> int:
    """Return the frame number drawn into an RGB picture."""
    row = picture[CELL // 4 : CELL * 3 // 4, : BITS * CELL].reshape(CELL // 2, BITS, CELL, 3)
    return sum(int(bit) << i for i, bit in enumerate(row[:, :, CELL // 4 : CELL * 3 // 4].mean((0, 2, 3)) > 128))


def whole(path: Path) -> np.ndarray:
    """Return the same frames (T, H, W, 3) by decoding every frame in order, as one would without an index."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1
        wanted = np.linspace(0, stream.frames - 1, FRAMES).round().astype(int).tolist()
        convert, pixels = VideoReformatter().reformat, np.empty((FRAMES, HEIGHT, WIDTH, 3), np.uint8)
        for i, frame in enumerate(container.decode(stream)):
            if i in wanted:
                pixels[wanted.index(i)] = convert(frame, format="rgb24", **ONE_THREAD).to_ndarray()
        return pixels


def jumped(path: Path) -> np.ndarray:
    return read_video(path, frames=FRAMES, seek=True).pixels


def read_through(path: Path) -> np.ndarray:
    return read_video(path, frames=FRAMES, seek=False).pixels


def measure(path: Path, gop: int, seeks: int, wholes: int) -> dict[str, object]:
    """Return the times of all ways, run in turn, after checking that they give the same and the right frames."""
    length = CYCLE // gop * gop
    video = read_video(path, frames=FRAMES)  # warms the page cache, too
    expected = np.linspace(0, length * CYCLES - 1, FRAMES).round().astype(int)
    right = [number(picture) for picture in video.pixels] == (expected % length).tolist()
    if not right or video.notes or not np.allclose(video.timestamps, expected / FPS):
        raise SystemExit(f"{path}: wrong frames")
    ways = {"seek": (jumped, seeks), "read_through": (read_through, seeks), "whole": (whole, wholes)}
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for turn in range(max(seeks, wholes)):
        for way, (read, count) in ways.items():
            if turn < count:
                start = time.perf_counter()
                pixels = read(path)
                seconds[way].append(time.perf_counter() - start)
                if not np.array_equal(pixels, video.pixels):
                    raise SystemExit(f"{path}: {way} gives other frames")
                del pixels
    summary = {
        way: {"min": min(s), "median": statistics.median(s), "max": max(s), "runs": len(s)}
        for way, s in seconds.items()
    }
    return {
        "gop": gop,
        "frames_in_file": video.num_frames,
        "megabytes": path.stat().st_size / 1e6,
        "seconds": summary,
        "times_faster_than_whole": summary["whole"]["median"] / summary["seek"]["median"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cache", type=Path, help="folder that keeps the files; default: a temporary one")
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/video_seek.json"))
    parser.add_argument("--seeks", type=int, default=7, help="runs of each way of read_video")
    parser.add_argument("--wholes", type=int, default=3, help="runs that decode the whole file")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.cache or Path(temporary)
        files = []
        for gop in (250, 48):
            path, start = folder / f"gop{gop}.mp4", time.perf_counter()
            make(path, gop)
            print(
                f"{path}: {path.stat().st_size / 1e6:.0f} MB, made in {time.perf_counter() - start:.0f} s", flush=True
            )
            files.append(measure(path, gop, options.seeks, options.wholes))
            print(json.dumps(files[-1], indent=2), flush=True)
    result = {
        "what": f"{FRAMES} uniform frames of {CYCLE * CYCLES // FPS} s of {HEIGHT}p H.264, one decoding thread",
        "versions": {"av": av.__version__, "numpy": np.__version__, "python": platform.python_version()},
        "machine": {"processor": platform.machine(), "cores": os.cpu_count(), "load": os.getloadavg()[0]},
        "files": files,
    }
    with writing(options.json) as path:
        path.write_text(json.dumps(result, indent=2, sort_keys=True) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
