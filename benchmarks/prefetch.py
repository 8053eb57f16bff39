"""Seconds per training prompt with videos read inline, read ahead in threads, and taken from a cache of encodings.

Each prompt is what CaCoVID's training does with it before the policy learns: the video read and prepared, encoded, and
the frozen testbed model run on 32 keep-masks. One pass over all clips per repeat, the ways in turn. Threads can hide
reading behind the model only as far as there are idle cores; a cache leaves decoding and encoding out. A model that
computes elsewhere, as on a GPU, is stood for by waiting.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch

from vidsieve.adapters.pruning import adapter_for
from vidsieve.io.files import writing
from vidsieve.io.machine import machine, spread, write_result
from vidsieve.loading import load_model
from vidsieve.training.data.encodings import EncodingCache
from vidsieve.training.data.prefetch import Prefetch
from vidsieve.training.data.prompts import FilePrompts
from vidsieve.training.data.samples import Choice
from vidsieve.training.rollouts import Rollouts

HEIGHT, WIDTH, FPS = 360, 640, 25
FRAMES, ROLLOUTS, KEPT = 16, 32, 0.1


def make_clip(path: Path, seed: int, seconds: int) -> None:
    """Write a clip in H.264: a texture that scrolls, another shot every five seconds, grain."""
    rng = np.random.default_rng(seed)
    grids = rng.integers(0, 256, (seconds // 5 + 1, 3, HEIGHT // 8 + 1, 2 * WIDTH // 8), dtype=np.uint8)
    textures = [np.repeat(np.repeat(grid, 8, 1), 8, 2).transpose(1, 2, 0) for grid in grids]
    grain = rng.integers(0, 8, (4, HEIGHT, WIDTH, 3), dtype=np.uint8)
    with writing(path) as temporary, av.open(str(temporary), "w", format="mp4") as out:
        stream = out.add_stream("libx264", rate=FPS, options={"preset": "veryfast", "crf": "26"})
        stream.width, stream.height, stream.pix_fmt, stream.thread_count = WIDTH, HEIGHT, "yuv420p", 1
        for i in range(seconds * FPS):
            x = 2 * i % WIDTH
            picture = textures[i // (5 * FPS)][:HEIGHT, x : x + WIDTH] // 2 + grain[i % 4]
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
            frame.pts = i
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))


def make_rows(folder: Path, clips: int, seconds: int) -> Path:
    """Write the clips and one question on each."""
    rows = []
    for number in range(clips):
        make_clip(folder / f"{number}.mp4", number, seconds)
        row = {"video": f"{number}.mp4", "question": "what colour is the home ?", "options": ["red", "blue"]}
        rows.append(json.dumps(row | {"answer": "red"}) + "\n")
    (folder / "rows.jsonl").write_text("".join(rows), encoding="utf-8")
    return folder / "rows.jsonl"


def work(adapter: Any, sample: Choice, number: int) -> torch.Tensor:
    """Return the rewards' logits (rollouts, options) of one prompt: encode, then run the LLM on the masks."""
    rollouts = Rollouts(adapter, sample.inputs)
    tokens = rollouts.encoded.videos[0].features.grid.num_tokens
    masks = torch.rand(ROLLOUTS, tokens, generator=torch.Generator().manual_seed(number)) < KEPT
    masks[:, 0] = True
    return rollouts.option_logits(masks, sample.option_ids)


def one_pass(adapter: Any, take: Callable[[int], Choice], clips: int) -> tuple[float, float, list[torch.Tensor]]:
    """Return seconds per prompt over all clips, those of all threads on a core, and what the model said."""
    start, busy = time.perf_counter(), time.process_time()
    said = [work(adapter, take(number), number) for number in range(clips)]
    return (time.perf_counter() - start) / clips, (time.process_time() - busy) / clips, said


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clips", type=int, default=8)
    parser.add_argument("--seconds", type=int, default=20, help="length of a clip")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1, help="torch's threads; what is left is for reading")
    parser.add_argument("--elsewhere", type=float, default=0.3, help="seconds that a model on a GPU is waited for")
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/prefetch.json"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model, processor = load_model("testbed")
    adapter = adapter_for(model)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        rows = make_rows(folder, options.clips, options.seconds)
        inline = FilePrompts(adapter, processor, rows, frames=FRAMES)
        cache = EncodingCache(folder / "cache", adapter, processor, FRAMES)
        cached = FilePrompts(adapter, processor, rows, frames=FRAMES, cache=cache)
        filling, _, expected = one_pass(adapter, cached.choice, options.clips)
        read = []
        for number in range(options.clips):
            start = time.perf_counter()
            inline.choice(number)
            read.append(time.perf_counter() - start)
        seconds: dict[str, list[float]] = {"inline": [], "prefetched": [], "cached": []}
        on_core: dict[str, list[float]] = {way: [] for way in seconds}
        elsewhere: dict[str, list[float]] = {"inline": [], "prefetched": []}
        for _ in range(options.repeats):
            for way, times in seconds.items():
                prompts = cached if way == "cached" else inline

                def load(number: int, prompts: FilePrompts = prompts) -> Any:  # a pass ends here, training goes on
                    return prompts.read_choice(number) if number < options.clips else None

                workers = options.workers if way == "prefetched" else 0
                with Prefetch(load, workers) as ahead:
                    took, busy, said = one_pass(adapter, lambda n, p=prompts, a=ahead: p.finished(a(n)), options.clips)
                times.append(took)
                on_core[way].append(busy)
                if not all(map(torch.equal, said, expected)):
                    raise SystemExit(f"{way}: other rewards")
                if way in elsewhere:
                    with Prefetch(load, workers) as ahead:
                        start = time.perf_counter()
                        for number in range(options.clips):
                            ahead(number)
                            time.sleep(options.elsewhere)
                        elsewhere[way].append((time.perf_counter() - start) / options.clips)
            print({way: round(times[-1], 3) for way, times in seconds.items()}, flush=True)
        size = sum(path.stat().st_size for path in (folder / "cache").glob("*.safetensors"))
        clip_bytes = sum(path.stat().st_size for path in folder.glob("*.mp4"))
    middle = {way: spread(times) for way, times in seconds.items()}
    result = {
        "what": f"{options.clips} clips of {options.seconds} s, {WIDTH}×{HEIGHT} H.264 at {FPS} fps, {FRAMES} frames "
        f"each; the testbed's model on {ROLLOUTS} masks of {KEPT:g} of the tokens",
        "note": f"{options.workers} threads read ahead on {os.cpu_count()} cores; the model takes {options.threads}. "
        "Reading and model overlap as far as cores are idle, so the gain ends where the longer of the two does; a "
        "process that others leave less than one core (cores_had) gains nothing beside a model on the same cores",
        "machine": machine(),
        "load": os.getloadavg(),
        "seconds_per_prompt": middle,
        "cores_had": {way: spread(times)["median"] / middle[way]["median"] for way, times in on_core.items()},
        "seconds_on_a_core_per_prompt": {way: spread(times) for way, times in on_core.items()},
        "seconds_reading_one_clip": spread(read),
        "seconds_per_prompt_filling_the_cache": filling,
        "seconds_per_prompt_with_the_model_elsewhere": {
            "model": options.elsewhere,
            **{way: spread(times) for way, times in elsewhere.items()},
        },
        "times_faster": {
            "prefetched_than_inline": middle["inline"]["median"] / middle["prefetched"]["median"],
            "prefetched_than_inline_with_the_model_elsewhere": spread(elsewhere["inline"])["median"]
            / spread(elsewhere["prefetched"])["median"],
            "cached_than_inline": middle["inline"]["median"] / middle["cached"]["median"],
            "cached_than_prefetched": middle["prefetched"]["median"] / middle["cached"]["median"],
        },
        "bytes_per_video": {"clip": clip_bytes / options.clips, "encoded": size / options.clips},
    }
    write_result(options.json, result)
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
