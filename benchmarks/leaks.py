"""Memory and open files over long work: 2,000 reads of videos, 500 sessions, 300 generations.

Every part does its work in a process of its own, one turn after another, and notes the resident memory and the open
file descriptors 40 times. Files are of several containers, sound and damaged. What leaks grows with the turns: the
growth is that of the median of the last quarter over the median of the second quarter, after what is allocated once.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from statistics import median
from typing import Any

import av
import numpy as np
import torch
from PIL import Image

import vidsieve
from vidsieve.answering import chat
from vidsieve.errors import VideoError
from vidsieve.io.machine import machine, write_result
from vidsieve.loading import load_model
from vidsieve.testbed.files import write_scene
from vidsieve.video.reading import read_frames, read_video, write_video

TURNS = {"reads": 2000, "sessions": 500, "generations": 300}
METHODS = ("cacovid", "score", "divprune", "fastv", "dycoke", "framefusion")
SAMPLES = 40


def state() -> dict[str, int]:
    """Return resident memory in KiB, without what the allocator could give back, and the number of open files."""
    gc.collect()
    with suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    resident = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS"))
    return {"kib": int(resident.split()[1]), "fds": len(os.listdir("/proc/self/fd"))}


def containers(folder: Path) -> list[Path]:
    """Write the same clip in several containers, and damaged files."""
    pixels = np.random.default_rng(0).integers(0, 255, (24, 48, 64, 3), np.uint8)
    write_video(folder / "sound.mp4", pixels, 8.0)
    paths = [folder / "sound.mp4"]
    for ending, codec in (("mkv", "libx264"), ("avi", "mpeg4"), ("mov", "mjpeg"), ("gif", "gif"), ("ts", "mpeg2video")):
        path = folder / f"sound.{ending}"
        with av.open(str(path), "w") as file:
            stream = file.add_stream(codec, rate=25)
            stream.width, stream.height = 64, 48
            stream.pix_fmt = {"mjpeg": "yuvj420p", "gif": "rgb8"}.get(codec, "yuv420p")
            for picture in pixels:
                file.mux(stream.encode(av.VideoFrame.from_ndarray(picture, "rgb24")))
            file.mux(stream.encode(None))
        paths.append(path)
    whole = (folder / "sound.mp4").read_bytes()
    for name, data in (("short.mp4", whole[: len(whole) // 2]), ("noise.mp4", os.urandom(4096)), ("empty.mp4", b"")):
        (folder / name).write_bytes(data)
        paths.append(folder / name)
    Image.fromarray(pixels[0]).save(folder / "still.png")
    return [*paths, folder / "missing.mp4", folder / "still.png"]


def reads(folder: Path) -> Callable[[int], None]:
    paths = containers(folder)

    def turn(number: int) -> None:
        path = paths[number % len(paths)]
        with suppress(VideoError):
            if path.suffix == ".png":
                read_frames([(path, 4)])
            else:
                read_video(path, frames=1 + number % 8)

    return turn


def prompt(folder: Path) -> tuple[Any, Any, Any]:
    model, processor = load_model("testbed")
    write_scene(folder / "scene.mp4", world="dense", seed=7, index=0)
    inputs = chat(processor, read_video(folder / "scene.mp4", frames=8), "What colour is the square?")
    return model, processor, inputs


def sessions(folder: Path) -> Callable[[int], None]:
    model, _, inputs = prompt(folder)

    @torch.no_grad()
    def turn(number: int) -> None:
        name = METHODS[number % len(METHODS)]
        policy = ("testbed",) if name in ("cacovid", "score") else ()
        method = vidsieve.load(name, *policy, retention=0.5)
        with vidsieve.attach(model, method) as session:
            model.generate(**inputs, max_new_tokens=1, do_sample=False)
            assert session.trace is not None

    return turn


def generations(folder: Path) -> Callable[[int], None]:
    model, _, inputs = prompt(folder)
    session = vidsieve.attach(model, vidsieve.load("divprune", retention=0.25))
    session.__enter__()

    @torch.no_grad()
    def turn(number: int) -> None:
        model.generate(**inputs, max_new_tokens=4 + number % 5, do_sample=False)

    return turn


PARTS: dict[str, Callable[[Path], Callable[[int], None]]] = {
    "reads": reads,
    "sessions": sessions,
    "generations": generations,
}


def worked(part: str, turns: int) -> dict[str, Any]:
    """Do a part's turns in this process and return what was seen."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        turn, seen = PARTS[part](Path(folder)), []
        for number in range(turns):
            turn(number)
            if (number + 1) % max(1, turns // SAMPLES) == 0:
                seen.append({"turns": number + 1, **state()})
    return summary(turns, seen)


def summary(turns: int, seen: list[dict[str, int]]) -> dict[str, Any]:
    """Return the growth from the second quarter of the samples to the last."""
    quarter = len(seen) // 4
    early, late = seen[quarter : 2 * quarter], seen[-quarter:]
    growth = {key: median(s[key] for s in late) - median(s[key] for s in early) for key in ("kib", "fds")}
    kib = median(s["kib"] for s in early)
    return {"turns": turns, "growth_kib": growth["kib"], "growth_fds": growth["fds"], "resident_kib": kib, "seen": seen}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/leaks.json"))
    parser.add_argument("--part", choices=PARTS)
    parser.add_argument("--share", type=float, default=1.0, help="of the turns")
    options = parser.parse_args()
    if options.part:
        print(json.dumps(worked(options.part, int(options.share * TURNS[options.part]))))
        return
    result: dict[str, Any] = {"machine": machine(), "parts": {}}
    for part in PARTS:
        run = [sys.executable, __file__, "--part", part, "--share", str(options.share)]
        done = subprocess.run(run, capture_output=True, text=True, check=True)
        result["parts"][part] = seen = json.loads(done.stdout.splitlines()[-1])
        write_result(options.json, result)
        print(part, {key: value for key, value in seen.items() if key != "seen"}, flush=True)


if __name__ == "__main__":
    main()
