"""Time to first token with stages before and inside the vision encoder, on still, slow and busy clips.

Models of 0.1 billion parameters with random weights; conditions take turns, round after round, and every ratio is of
passes of the same round. Then, on the testbed, what a tolerance above 0 costs in accuracy.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import torch

import vidsieve
from vidsieve.adapters.pruning import adapter_for
from vidsieve.cli.bench import timed_model
from vidsieve.cli.shared import quiet
from vidsieve.compressors.base import Compressor
from vidsieve.evaluation import experiment
from vidsieve.evaluation.conditions import Condition
from vidsieve.evaluation.stats import paired_difference
from vidsieve.evaluation.tasks import testbed as scenes
from vidsieve.evaluation.tasks.timing import TimingTask
from vidsieve.io.machine import machine, write_result
from vidsieve.loading import load_model
from vidsieve.video.reading import Video

MODELS = ("llava-onevision-0.1b", "qwen2.5-vl-0.1b")
HEIGHT, WIDTH = 360, 640
TOLERANCES = (0.05, 0.2, 0.5)
"""In units of the preprocessed pixels."""


def moving() -> tuple[slice, slice]:
    """Return the rows and columns of the tenth of the picture that moves in the slow clip."""
    side = round((0.1 * HEIGHT * WIDTH) ** 0.5)
    return slice(100, 100 + side), slice(200, 200 + side)


def clip(kind: str, frames: int, seed: int = 0) -> Video:
    """Return a clip: ``still``, four of five frames equal to the one before; ``slow``, a tenth of the picture moves.

    ``busy`` is smooth noise that is new in every frame.
    """
    draw = np.random.default_rng(seed)

    def picture() -> Any:
        coarse = draw.integers(0, 256, (HEIGHT // 40, WIDTH // 40, 3), dtype=np.uint8)
        return coarse.repeat(40, 0).repeat(40, 1)

    if kind == "still":
        slides = [picture() for _ in range(-(-frames // 5))]
        pixels = np.stack([slides[t // 5] for t in range(frames)])
    elif kind == "slow":
        still, (down, across) = picture(), moving()
        side, texture = down.stop - down.start, picture()
        pixels = np.stack([still] * frames)
        for t in range(frames):
            pixels[t, down, across] = np.roll(texture, 7 * t, 1)[:side, :side]
    else:
        pixels = np.stack([picture() for _ in range(frames)])
    times = np.arange(frames, dtype=np.float64)
    return Video(pixels, times, (), float(frames), 1.0, frames, (HEIGHT, WIDTH))


def methods(retention: float) -> dict[str, Compressor]:
    """Return the methods of the table by name."""
    return {
        "reuse": vidsieve.load("reuse"),
        "earlytom": vidsieve.load("earlytom", retention=retention, inner=False),
        "vcast": vidsieve.load("vcast", retention=retention),
        "reuse + vcast": vidsieve.load("reuse+vcast", retention=retention),
    }


def timed(size: str, kind: str, frames: int, retention: float, repeats: int) -> list[dict[str, Any]]:
    """Return a row for every condition on one clip."""
    model, prompts = timed_model(size, torch.float32, "cpu", 0)
    adapter = adapter_for(model)
    named = {"all tokens": None, **methods(retention)}
    conditions = {name: Condition(method, label=name) for name, method in named.items()}
    video = clip(kind, frames)
    task = TimingTask(
        adapter=adapter, source=video, lengths=[frames], prompts=prompts, repeats=repeats, warm_up=1, new_tokens=1
    )
    results = experiment.measured(task, list(conditions.values()))
    first = [sum(run["ms"].values()) for run in results.turns(conditions["all tokens"].key)]
    rows: list[dict[str, Any]] = []
    for name, condition in conditions.items():
        runs = results.turns(condition.key)
        if not runs:
            rows.append({"method": name, "refused": results.refused[condition.key][0]})
            continue
        ratios = sorted(before / sum(run["ms"].values()) for before, run in zip(first, runs, strict=True))
        row: dict[str, Any] = {"method": name}
        rows.append(
            row
            | {
                "tokens": runs[0]["visual"][1],
                "ms": {part: statistics.median(run["ms"][part] for run in runs) for part in runs[0]["ms"]},
                "all": statistics.median(sum(run["ms"].values()) for run in runs),
                "faster": {"min": ratios[0], "median": statistics.median(ratios), "max": ratios[-1]},
            }
        )
    return rows


@torch.no_grad()
def differences(size: str, frames: int) -> list[dict[str, Any]]:
    """Return, for tolerances on the slow clip, frames that are encoded and the largest difference of a feature."""
    model, prompts = timed_model(size, torch.float32, "cpu", 0)
    adapter = adapter_for(model)
    inputs = dict(prompts(clip("slow", frames)))
    (whole,) = adapter.features(inputs)
    scale = float(whole.embeds.std())
    rows = []
    for tolerance in (0.0, *TOLERANCES):
        front = vidsieve.Reuse(tolerance)
        (part,) = adapter.features(inputs, front=front)
        apart = float((part.embeds - whole.embeds).abs().max()) / scale
        encoded = len(torch.unique(part.embeds.reshape(part.grid.frames, -1), dim=0))
        rows.append({"tolerance": tolerance, "encoded": encoded, "of": part.grid.frames, "difference": apart})
    return rows


@torch.no_grad()
def accuracy(questions: int, retention: float, seed: int = 9601) -> list[dict[str, Any]]:
    """Return the accuracy of `divprune` on the testbed behind each tolerance, and the paired difference to none."""
    model, processor = load_model("testbed")
    adapter = adapter_for(model)
    asked = scenes.scene_questions("dense", seed, questions)
    method = vidsieve.load("divprune", retention=retention)
    marks: dict[float | None, list[bool]] = {}
    clusters: list[int] = []
    for tolerance in (None, 0.0, *TOLERANCES):
        front = None if tolerance is None else vidsieve.Reuse(tolerance)
        marks[tolerance] = []
        for index, some in enumerate(asked):
            scene = scenes.read_scene(adapter, processor, "dense", seed, index, len(some), front=front)
            condition = scenes.SceneCondition(method)
            marks[tolerance] += scenes.answers(adapter, scene, condition, seed + index)[0]
            if tolerance is None:
                clusters += [index] * len(some)
    rows = []
    for tolerance, right in marks.items():
        values = [float(mark) for mark in right]
        apart = paired_difference(values, [float(mark) for mark in marks[None]], clusters)
        rows.append(
            {"tolerance": tolerance, "accuracy": statistics.mean(values), "difference": [apart.mean, *apart.interval]}
        )
    return rows


ABOUT = """# Stages before and inside the vision encoder

Pruning before the LLM leaves the vision encoder as it is; after it the encoder is most of the time to the first token.
[`reuse`](methods/reuse.md) does not encode frames that repeat the last encoded one, and
[`earlytom`](methods/earlytom.md) merges frames between the encoder's layers, so that later layers run on fewer. Both
are timed here beside a method before the LLM, [`vcast`](methods/vcast.md) at 25 %, and `reuse` together with it.

Written by `python benchmarks/encoder_stages.py --page docs/encoder.md`. Models of 0.1 billion parameters with random
weights, so that times mean something and answers do not; `earlytom` runs without its part inside the LLM. Clips of
640 × 360 that are made for this: *still* is a screen recording in which four of five frames equal the one before, in
*slow* a tenth of the picture moves in every frame, *busy* is new in every frame. Passes take turns, and each ratio is
of two passes of one round. Reading a file is not in the times.

Qwen encodes pairs of frames. In *still* every fifth frame is new, so more than one pair in five is.
"""


def windows_alone() -> dict[str, float]:
    """Return what encoding only changed windows would save, in shares of the encoder's multiplications, by count.

    The encoder is that of Qwen2.5-VL-7B: 32 blocks 1280 wide with an MLP of 3420, windows of 8 × 8 patches, and
    attention to the whole frame in every eighth block. Until the first of those a window depends on its own pixels
    alone; in it, queries, keys and values of unchanged windows are known; behind it every patch depends on all.

    Returns
    -------
    dict
        ``ahead``: of a patch in an unchanged window; ``unchanged``: the share of such patches in the slow clip;
        ``slow``: in the slow clip, the product; ``most``: were windows cut to the tenth that changes.
    """
    width, inner, blocks, every, merged = 1280, 3420, 32, 8, 3584
    rows, columns = round(HEIGHT / 28), round(WIDTH / 28)  # tokens, of 2 × 2 patches of 14 pixels
    square = width * width
    block = 4 * square + 3 * width * inner + 2 * width * 64
    whole = 2 * width * (4 * rows * columns - 64)  # what attention to the frame takes beyond a window's
    projected = (4 * width) * (4 * width + merged) / 4
    embedded = width * 3 * 2 * 14 * 14
    total = embedded + blocks * block + blocks // every * whole + projected
    ahead = (embedded + (every - 1) * block + 3 * square) / total

    def touched(part: slice, pixels: int, tokens: int) -> int:
        scale = tokens / pixels / 4  # windows of 4 tokens a side
        first, last = int(part.start * scale), int((part.stop - 1) * scale)
        return min(tokens, 4 * (last + 1)) - 4 * first

    down, across = moving()
    unchanged = 1 - touched(down, HEIGHT, rows) * touched(across, WIDTH, columns) / (rows * columns)
    return {"ahead": ahead, "unchanged": unchanged, "slow": ahead * unchanged, "most": 0.9 * ahead}


def page(result: dict[str, Any]) -> str:
    """Return the document of a result."""
    lines = [ABOUT]
    for size, clips in result["clips"].items():
        lines += [f"**{size}**, {result['frames']} frames, medians of {result['repeats']} rounds, in milliseconds:", ""]
        lines += ["| clip | method | tokens | encode | select | prefill | first token | faster, min – max |"]
        lines += ["|---|---|---|---|---|---|---|---|"]
        for kind, rows in clips.items():
            for row in rows:
                if "refused" in row:
                    lines.append(f"| {kind} | {row['method']} | – | – | – | – | – | refused |")
                    continue
                ms, faster = row["ms"], row["faster"]
                encode = ms["encode"] if "encode" in ms else ms["vision encoder"] + ms["projector"]
                parts = " | ".join(f"{spent:,.0f}" for spent in (encode, ms["select"], ms["prefill"]))
                lines.append(
                    f"| {kind} | {row['method']} | {row['tokens']:,} | {parts} | {row['all']:,.0f} | "
                    f"{faster['median']:.2f}×, {faster['min']:.2f} – {faster['max']:.2f} |"
                )
        lines += [""]
    lines += [
        "In the slow clip a tenth of the picture moves in every frame. The largest cell of a frame decides, so that",
        "something small that moves, such as a cursor, makes a new frame, and nothing is saved where all frames are",
        "encoded. That is meant: a tolerance is for the noise of cameras and codecs, and a mean over the whole frame",
        "would lose what moves in a small part of it. For clips like this take fewer frames, `earlytom`, or a method",
        "before the LLM:",
        "",
    ]
    lines += ["| model | tolerance | frames encoded | largest difference of a feature, in standard deviations |"]
    lines += ["|---|---|---|---|"]
    for size, rows in result["differences"].items():
        for row in rows:
            lines.append(
                f"| {size} | {row['tolerance']:g} | {row['encoded']} of {row['of']} | {row['difference']:.2f} |"
            )
    saved = {name: f"{100 * share:.0f} %" for name, share in windows_alone().items()}
    lines += [
        "",
        "**Changed windows alone are not encoded.** Towers of SigLIP's kind attend to the whole frame in every block:",
        "after the first one every patch depends on the change, and nothing exact can be saved. Qwen2.5-VL attends in",
        "windows, but in every eighth of its 32 blocks to the whole frame, so that an unchanged window is known only",
        f"up to block 7: {saved['ahead']} of its multiplications, by count, in the 7B model. The windows that the slow",
        f"clip's moving tenth touches leave {saved['unchanged']} of the patches unchanged, which would save",
        f"{saved['slow']} of the encoder; with windows cut to the change it would be {saved['most']}. It would need",
        "the states of every window before block 7 of each video, packed sequences with windows left out, and products",
        "of other shapes, which are not equal to the bit. Fewer frames, or merged ones, save more for less.",
    ]
    lines += ["", f"`divprune` at 25 % on the testbed ({result['questions']:,} questions):", ""]
    lines += ["| tolerance | accuracy | difference, 95 % interval |", "|---|---|---|"]
    for row in result["accuracy"]:
        name = "without reuse" if row["tolerance"] is None else f"{row['tolerance']:g}"
        mean, low, high = row["difference"]
        lines.append(f"| {name} | {row['accuracy']:.3f} | {mean:+.3f} ({low:+.3f} to {high:+.3f}) |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run the command line; a run that broke off goes on."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--frames", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--questions", type=int, default=1200)
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/encoder_stages.json"))
    parser.add_argument("--page", type=Path, help="also write the document of the result")
    given = parser.parse_args()
    quiet()
    empty: dict[str, Any] = {
        "machine": machine(),
        "frames": given.frames,
        "repeats": given.repeats,
        "questions": given.questions,
        "clips": {},
        "differences": {},
        "accuracy": [],
    }
    known = json.loads(given.json.read_text()) if given.json.exists() else empty
    same = all(known[name] == empty[name] for name in ("machine", "frames", "repeats", "questions"))
    result = known if same else empty
    for size in MODELS:
        for kind in ("still", "slow", "busy"):
            if kind in result["clips"].get(size, {}):
                continue  # of a run that broke off
            result["clips"].setdefault(size, {})[kind] = timed(size, kind, given.frames, 0.25, given.repeats)
            write_result(given.json, result)
            print(f"{size}, {kind}: done", flush=True)
        if size not in result["differences"]:
            result["differences"][size] = differences(size, given.frames)
        write_result(given.json, result)
    result["accuracy"] = result["accuracy"] or accuracy(given.questions, 0.25)
    write_result(given.json, result)
    print(page(result))
    if given.page is not None:
        given.page.write_text(page(result), encoding="utf-8")


if __name__ == "__main__":
    main()
