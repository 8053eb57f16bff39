"""Predictions of `vidsieve plan` for this CPU, and the times of models of three sizes on it; one JSON file.

Random weights, float32, one request at a time. Nothing is fitted: the machine is its own best rate of plain matrix
products and of a plain copy, taken before and after each model, all of it counted as reached.

    python benchmarks/plan.py --json benchmarks/results/plan.json --page docs/plan.md
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

import vidsieve
from pages import inserted, table
from vidsieve.adapters import adapter_for
from vidsieve.answering import Clock, generated
from vidsieve.evaluation.blueprints import random_model
from vidsieve.io.files import writing
from vidsieve.io.machine import machine as setup
from vidsieve.io.machine import spread, write_result
from vidsieve.serving.plan import Gpu, plan, read_gpu
from vidsieve.video.reading import Video

CASES = (("llava-onevision-0.1b", 16), ("qwen2.5-vl-0.1b", 32), ("llava-onevision-0.5b", 3))
"""Sizes, and frames that take seconds."""
RETENTIONS = (1.0, 0.25, 0.1)
WORDS, HEIGHT, WIDTH = 40, 360, 640
PARTS = ("encoder", "prefill", "decode")
WORKED = {"qwen2.5-vl-7b": (32, 64), "llava-onevision-7b": (32, 64)}


def noise(frames: int) -> Video:
    """Return a video of noise."""
    pixels = np.random.default_rng(0).integers(0, 256, (frames, HEIGHT, WIDTH, 3), np.uint8)
    return Video(pixels, np.arange(frames, dtype=float), (), float(frames), 1.0, frames, (HEIGHT, WIDTH))


@torch.no_grad()
def measured(name: str, frames: int, repeats: int) -> dict[str, Any]:
    """Return seconds of the encoder, and by retention tokens and seconds of prefill and one step, one run not counted.

    Retentions take turns, so that what else the machine does falls on all alike.
    """
    made = random_model(name)
    adapter, inputs = adapter_for(made.model), made.inputs(noise(frames), WORDS)
    spent: dict[str, list[float]] = {"encoder": []}
    lengths = {}
    for turn in range(repeats + 1):
        start = time.perf_counter()
        encoded = adapter.encode(inputs)
        if turn:
            spent["encoder"].append(time.perf_counter() - start)
        for retention in RETENTIONS:
            method = None if retention == 1 else vidsieve.load("uniform", retention=retention)
            done = generated(adapter, encoded, method, Clock(), tokens=2, exactly=True)
            lengths[retention] = int(done.plan.inputs["input_ids"].shape[1])
            for part, key in (("prefill", "prefill"), ("decode", "generate")) if turn else ():
                spent.setdefault(f"{part} {retention}", []).append(done.ms[key] / 1e3)
    return {"tokens": lengths, "seconds": {part: spread(values) for part, values in spent.items()}}


def predicted(name: str, frames: int, lengths: dict[float, int], machine: Gpu) -> list[dict[str, Any]]:
    """Return the plan's row for each retention, for as much text as the measured prompt had."""
    load = {"frames": frames, "size": (HEIGHT, WIDTH), "answer_tokens": 2, "batch": 1}
    whole = plan(name, machine, [1.0], prompt_tokens=0, **load)["rows"][0]
    result = plan(name, machine, RETENTIONS, prompt_tokens=lengths[1.0] - whole["llm_tokens"], **load)
    for row in result["rows"]:
        if row["llm_tokens"] != lengths[row["retention"]]:
            raise SystemExit(f"{name}: {row['llm_tokens']} tokens predicted, {lengths[row['retention']]} measured")
    return [{"parameters": result["parameters"], **row} for row in result["rows"]]


def measured_cpu(side: int = 1536, megabytes: int = 256, repeats: int = 5) -> Gpu:
    """Return this CPU in float32 at torch's present threads: its best rates of some matrix products and copies."""
    left, right = torch.randn(2, side, side)
    source = torch.ones(megabytes * 10**6, dtype=torch.uint8)
    target = torch.empty_like(source)

    def best(run: Callable[[], object]) -> float:
        spent = []
        for _ in range(repeats + 1):  # the first touches fresh memory
            start = time.perf_counter()
            run()
            spent.append(time.perf_counter() - start)
        return min(spent)

    operations = 2 * side**3 / best(lambda: left @ right)
    copied = 2 * len(source) / best(lambda: target.copy_(source))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Gpu("cpu", operations / 1e12, copied / 1e9, memory / 1e9, 1.0, 1.0, width=4)


def better(one: Gpu | None, other: Gpu) -> Gpu:
    """Return the best rates of two measurements."""
    if one is None:
        return other
    return replace(one, tflops=max(one.tflops, other.tflops), bandwidth=max(one.bandwidth, other.bandwidth))


def compared(case: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return predicted and measured seconds of every part, and predicted over the least measured."""
    found = []
    for one in rows:
        entry: dict[str, Any] = {"retention": one["retention"], "llm_tokens": one["llm_tokens"]}
        for part in PARTS:
            seen = case["seconds"][part if part == "encoder" else f"{part} {one['retention']}"]
            guess = one[f"{part}_s"]
            entry[part] = {"predicted": guess, "measured": seen, "ratio": guess / seen["min"]}
        found.append(entry)
    return {"parameters": rows[0]["parameters"], "rows": found}


def page(result: dict[str, Any]) -> list[str]:
    """Return the measured part of the document."""
    machine, loads = result["machine"], result["load_average"]
    lines = [
        f"float32, {machine['threads']} thread of {machine['processor']} that does "
        f"{1e3 * result['measured']['tflops']:.0f} GFLOP/s in plain products and copies "
        f"{result['measured']['bandwidth']:.1f} GB/s (read and written); shared with other work: load average "
        f"{loads[0]:.1f} before, {loads[1]:.1f} after, on {machine['cores']} cores. Milliseconds; measured: min / "
        f"median / max of {result['repeats']}; **ratio**: predicted over the least measured.",
        "",
    ]
    cells = []
    for name, case in result["models"].items():
        for number, one in enumerate(case["rows"]):
            head = (f"`{name}`, {case['frames']} frames", f"{case['parameters'] / 1e9:.2f}") if not number else ("", "")
            for part in PARTS if not number else PARTS[1:]:
                seen = one[part]["measured"]
                spans = " / ".join(f"{1e3 * seen[key]:,.0f}" for key in ("min", "median", "max"))
                kept = "–" if part == "encoder" else f"{100 * one['retention']:g} %, {one['llm_tokens']:,}"
                guess = f"{1e3 * one[part]['predicted']:,.0f}"
                cells.append((*head, part, kept, guess, spans, f"{one[part]['ratio']:.2f}"))
                head = ("", "")
    heads = ("model", "10⁹ parameters", "part", "kept, LLM tokens", "predicted", "measured", "ratio")
    return ["## Predicted against measured", "", *lines, *table(heads, cells), "", *worked()]


def worked() -> list[str]:
    """Return the worked example: a million videos a day, predicted alone."""
    cells = []
    for name, lengths in WORKED.items():
        for frames in lengths:
            for row in plan(name, read_gpu("H100"), RETENTIONS, frames=frames)["rows"]:
                busy = 3600 / row["per_hour"]
                hours = 1e6 / row["per_hour"]
                cells.append(
                    (
                        f"`{name}`",
                        frames,
                        f"{100 * row['retention']:g} %",
                        f"{row['llm_tokens']:,}",
                        f"{row['kv_bytes'] / 1e6:.0f}",
                        *(f"{1e3 * row[key]:.1f}" for key in ("encoder_s", "prefill_s", "decode_s")),
                        f"{100 * row['encoder_s'] / busy:.0f} %",
                        f"{1 / busy:.2f}",
                        f"{hours:.0f}",
                        math.ceil(hours / 24),
                    )
                )
    heads = (
        "model",
        "frames",
        "kept",
        "LLM tokens",
        "cache, MB",
        "encoder, ms",
        "prefill, ms",
        "decode step, ms",
        "encoder's share",
        "requests/s",
        "GPU hours",
        "H100s",
    )
    title = "## 10⁶ videos a day on H100: predicted, never measured on a GPU here"
    return [title, "", *table(heads, [[str(cell) for cell in line] for line in cells])]


def main() -> None:
    """Measure, compare, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--page", type=Path, help="document whose measured part is written")
    parser.add_argument("--read", type=Path, help="write the document from this result, and measure nothing")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    result = json.loads(arguments.read.read_text("utf-8")) if arguments.read else run(arguments.repeats)
    if arguments.json:
        write_result(arguments.json, result)
    if arguments.page:
        text = inserted(arguments.page.read_text("utf-8"), "\n".join(["", *page(result), ""]))
        with writing(arguments.page) as temporary:
            temporary.write_text(text, encoding="utf-8")


def run(repeats: int) -> dict[str, Any]:
    """Return what all models take on this machine, beside what is predicted for it."""
    before, best, cases = os.getloadavg()[0], None, {}
    for name, frames in CASES:
        best = better(best, measured_cpu())
        cases[name] = measured(name, frames, repeats) | {"frames": frames}
        best = better(best, measured_cpu())
        print(name, {part: round(seen["min"], 3) for part, seen in cases[name]["seconds"].items()}, flush=True)
    assert best is not None
    models = {}
    for name, case in cases.items():
        rows = predicted(name, case["frames"], case["tokens"], best)
        models[name] = {"frames": case["frames"], **compared(case, rows)}
        for one in models[name]["rows"]:
            print(name, one["retention"], {part: round(one[part]["ratio"], 3) for part in PARTS})
    return {
        "machine": setup(),
        "load_average": [before, os.getloadavg()[0]],
        "repeats": repeats,
        "measured": asdict(best),
        "models": models,
    }


if __name__ == "__main__":
    main()
