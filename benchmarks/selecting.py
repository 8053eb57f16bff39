"""How long selecting takes and how much memory it needs, for every method, beside its published form; one JSON file.

Everything from what the model hands over to the kept tokens, in float32 and in bfloat16. Methods before the LLM get
embeddings (VisionZip also queries and keys of the encoder's layer). A stage inside the LLM gets the states that enter
the layer before it, of the shape of a 7B model, and computes the attention it reads; the published form gets that
layer's queries and keys and computes what its release computes, for most the whole attention. Times of ours and of the
published form alternate in one process; memory is the rise of a fresh process's peak.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from fractions import Fraction
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import plain.aot
import plain.divprune
import plain.dycoke
import plain.earlytom
import plain.evs
import plain.fastv
import plain.fastvid
import plain.flashvid
import plain.framefusion
import plain.holitom
import plain.prunevid
import plain.pyramiddrop
import plain.sparsevlm
import plain.vcast
import plain.vidcom2
import plain.visionzip
import vidsieve
from plain._shared import eager_attention
from vidsieve import registry
from vidsieve.adapters.decoder_layer import attention_rows, block_shape, rotated
from vidsieve.adapters.probe import received
from vidsieve.compressors.base import Compressor
from vidsieve.compressors.framefusion import excess
from vidsieve.compressors.inside import LayerCompressor, Rows
from vidsieve.io.machine import machine, peak_memory, spread, write_result
from vidsieve.selection import exact_ratio
from vidsieve.testing import GivenView, make_video
from vidsieve.types import EncoderOutputs, Stage, TokenGrid, VideoTokens

WIDTH, RETENTION = 3584, 0.1
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
BEFORE, TEXT = 14, 20
"""Text tokens before the video, and behind it."""
SMALL, LARGE = TokenGrid(32, 14, 14), TokenGrid(64, 19, 35)
GROWING = (8, 16, 32, 64)
"""Thousands of tokens, in frames of 196, on which memory is measured."""
LATE = ("topv", "sparsevlm", "pyramiddrop")
"""Begin too late in the LLM for a tenth: 30 % are kept."""
SLOW = ("divprune",)
"""Quadratic in tokens at a fixed share: on more than 10,000 a hundredth is kept."""
FLOAT32 = ("prunevid, outer part",)
"""Published forms that torch cannot run in bfloat16 on a processor."""
AIMS = {"sparsevlm": 5.0, "fastv": 5.0, "visionzip": 5.0, "divprune": 2.0}
"""How many times faster than the published form; all others: not slower."""


def video_of(grid: TokenGrid, dtype: str) -> VideoTokens:
    """Return random drifting tokens, smooth in time."""
    return make_video(grid, WIDTH, dtype=DTYPES[dtype])


@cache
def decoder_layer(dtype: str) -> tuple[Any, Any]:
    """Return a random decoder layer of a 7B model, and its configuration."""
    from transformers import Qwen2Config
    from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer

    config = Qwen2Config(
        hidden_size=WIDTH, intermediate_size=18944, num_attention_heads=28, num_key_value_heads=4, num_hidden_layers=28
    )
    torch.manual_seed(0)
    layer = Qwen2DecoderLayer(config, 0).eval().to(DTYPES[dtype])
    layer.mlp = None  # not needed, and large
    return layer, config


Case = tuple[Callable[[], Any], Callable[[], Any] | None]
"""Ours, and the published form."""


def methods() -> dict[str, Compressor]:
    """Return every method without training, at the retention of the benchmark or the least it can keep."""
    found = {}
    for name in registry.compressors:
        kind = registry.compressors.get(name)
        if kind.trained:
            continue
        least = {"dycoke": 0.3}.get(name, RETENTION)
        method = vidsieve.load(name, retention=least)
        if hasattr(method, "inner"):
            found[f"{name}, outer part"] = replace(method, inner=False)  # type: ignore[call-arg]
        if method.acts is Stage.LAYER:
            label = f"{name}, inside" if hasattr(method, "inner") else name
            found[label] = vidsieve.load(name, retention=0.3 if name in LATE else least)
        elif not hasattr(method, "inner"):
            found[name] = method
    return found


def before_llm(name: str, method: Compressor, grid: TokenGrid, dtype: str) -> Case:
    """Return what selects before the LLM."""
    video = video_of(grid, dtype)
    frames = video.embeds.reshape(grid.frames, grid.per_frame, -1)
    assert video.encoder is not None and video.encoder.attention is not None
    attention = video.encoder.attention.reshape(grid.frames, grid.per_frame)
    ratio, budget = float(method.budget_ratio(grid.num_tokens)), method.budget(video)

    def ours() -> Tensor:
        return method.compress(video, generator=torch.Generator().manual_seed(0)).indices

    forms: dict[str, Callable[[], Any]] = {
        "divprune": lambda: plain.divprune.picks(video.embeds, budget).sort().values,
        "aot": lambda: plain.aot.select(frames, attention, ratio),
        "earlytom": lambda: plain.earlytom.select(attention, plain.earlytom.segments(frames), ratio, grid.frames),
        "vcast": lambda: plain.vcast.select(frames, ratio),
        "vidcom2": lambda: plain.vidcom2.select(frames, ratio),
        "evs": lambda: plain.evs.select(frames, budget),
        "dycoke": lambda: plain.dycoke.select(frames, 0.9),
        "fastvid": lambda: plain.fastvid.select(frames, frames.mean(1), attention, ratio)[0],
        "flashvid": lambda: plain.flashvid.select(frames, attention, ratio)[0],
        "holitom": lambda: plain.holitom.select(frames, attention, ratio)[0],
        "prunevid": lambda: plain.prunevid.select(frames, cluster=ratio),
        "framefusion": lambda: plain.framefusion.merge(
            video.embeds, torch.arange(grid.per_frame).repeat(grid.frames), 0.6, 1 - ratio
        )[0],
    }
    if name.startswith("visionzip"):
        return visionzip(method, video)
    return ours, forms.get(name.partition(",")[0])


def visionzip(method: Compressor, video: VideoTokens) -> Case:
    """Return VisionZip on a tower with a class token, from the queries and keys of its layer."""
    grid, (heads, size) = video.grid, (16, 64)
    draw = torch.Generator().manual_seed(1)
    drawn = torch.randn(2, grid.frames, heads, grid.per_frame + 1, size, generator=draw)
    query, key = drawn.to(video.embeds.dtype).unbind(0)
    frames = video.embeds.reshape(grid.frames, grid.per_frame, -1)
    hidden = torch.cat([frames[:, :1], frames], 1)
    each = method.budget(video) // grid.frames
    contextual = round(0.16 * each)

    def ours() -> Tensor:
        found, keys = received(query, key, size**-0.5, cls_token=True)
        encoder = EncoderOutputs(found.flatten(), keys.flatten(0, 1))
        return method.compress(replace(video, encoder=encoder)).indices

    def published() -> Any:
        attention = eager_attention(query, key, causal=False)
        return plain.visionzip.select(attention, key.mean(1), hidden, each - contextual, contextual)

    return ours, published


def inside_llm(name: str, method: LayerCompressor, grid: TokenGrid, dtype: str) -> Case:
    """Return what a method's first stage does, all tokens alive; FrameFusion's has four fifths, and merges."""
    tokens, (layer, config) = video_of(grid, dtype).embeds, decoder_layer(dtype)
    draw = torch.Generator().manual_seed(2)
    alive = torch.arange(grid.num_tokens)
    if name.startswith("framefusion"):  # which merges again only where the step before has merged a tenth or more
        alive = alive[(torch.rand(grid.num_tokens, generator=draw) < 0.8) | (alive < grid.per_frame)]
        tokens = tokens[alive]
    count = len(alive)
    text = torch.randn(BEFORE + TEXT, WIDTH, generator=draw).to(tokens.dtype)
    hidden = torch.cat([text[:BEFORE], tokens, text[BEFORE:]])
    positions = torch.arange(len(hidden))[None]
    words = torch.arange(BEFORE + count, len(hidden))
    stages = dict(method.stages(config.num_hidden_layers, count))
    at = min(stages)
    keep, span = stages[at], slice(BEFORE, BEFORE + count)
    history = (count,) * at
    tensors = {"hidden": tokens, "before": tokens + 0.01, "video": tokens, "text": text[BEFORE:]}

    def attention(rows: Tensor) -> Tensor:
        return attention_rows(layer, config, hidden, positions, rows)[..., span]

    def ours() -> Tensor:
        kinds: dict[Rows, Tensor] = {"last": words[-1:], "text": words}
        rows = {(kind, at + by): partial(attention, places) for kind, places in kinds.items() for by in (-1, 0)}
        depth = config.num_hidden_layers
        return method.step(GivenView(at, depth, grid, alive, history, rows=rows, tensors=tensors), keep).indices

    shape = block_shape(config, layer)
    normed, seen = layer.input_layernorm(hidden), Fraction(count, grid.num_tokens)

    def heads(kind: str) -> Tensor:
        made = rotated(layer.self_attn, kind, shape, normed, positions)
        return made.repeat_interleave(28 // made.shape[0], 0)

    query, key = heads("q"), heads("k")

    def fastv() -> Any:
        return plain.fastv.select(eager_attention(query, key), BEFORE, count, keep)

    def pyramiddrop() -> Any:
        return plain.pyramiddrop.select(heads("q"), heads("k"), BEFORE, count, keep)

    def sparsevlm() -> Any:
        raters = plain.sparsevlm.raters(tokens, text[BEFORE:]) + BEFORE + count
        scores, kept = plain.sparsevlm.select(eager_attention(query, key), BEFORE, count, raters, keep)
        rest = (~torch.isin(torch.arange(count), kept)).nonzero().flatten()
        recycled = rest[scores[rest].topk(int(0.3 * len(rest)) + 1).indices]
        return plain.sparsevlm.clusters(tokens[recycled], int((int(len(rest) * 0.3) + 1) / 10) + 1)

    def holitom() -> Any:
        return plain.holitom.inside(tokens, eager_attention(query, key).mean(0)[-1, span], keep)

    def prunevid() -> Any:
        return plain.prunevid.inside(eager_attention(query, key), BEFORE, count, words, [count], keep / count)

    def framefusion() -> Any:
        over = excess([seen] * at, exact_ratio(method.retention, grid.num_tokens), config.num_hidden_layers)
        return plain.framefusion.merge(tokens, alive % grid.per_frame, 0.6, float(over))

    forms = {
        "fastv": fastv,
        "flashvid": fastv,
        "pyramiddrop": pyramiddrop,
        "sparsevlm": sparsevlm,
        "holitom": holitom,
        "earlytom": holitom,
        "prunevid": prunevid,
        "framefusion": framefusion,
    }
    return ours, forms.get(name.partition(",")[0])


def case_of(name: str, grid: TokenGrid, dtype: str) -> Case:
    """Return ours and the published form of a method on a grid."""
    method = methods()[name]
    if name in SLOW and grid.num_tokens > 10_000:
        method = method.with_retention(0.01)
    if isinstance(method, LayerCompressor) and method.acts is Stage.LAYER:
        ours, form = inside_llm(name, method, grid, dtype)
    else:
        ours, form = before_llm(name, method, grid, dtype)
    return ours, None if dtype != "float32" and name in FLOAT32 else form


@torch.no_grad()
def timed(name: str, grid: TokenGrid, repeats: int, published: bool, dtype: str = "float32") -> dict[str, Any]:
    """Return seconds of ours and of the published form, in turns after one that is not counted."""
    ours, form = case_of(name, grid, dtype)
    forms = {"ours": ours} | ({"published": form} if published and form is not None else {})
    spent: dict[str, list[float]] = {which: [] for which in forms}
    for turn in range(repeats + 1):
        for which, run in forms.items():
            start = time.perf_counter()
            run()
            if turn:
                spent[which].append(time.perf_counter() - start)
    found: dict[str, Any] = {which: spread(values) for which, values in spent.items()}
    if "published" in found:
        found["times_faster"] = found["published"]["median"] / found["ours"]["median"]
        found["aim"] = aim(name)
    return found


@torch.no_grad()
def risen(name: str, grid: TokenGrid, which: str, dtype: str) -> int:
    """Return by how many bytes the peak of this process rises while selecting."""
    ours, form = case_of(name, grid, dtype)
    run = ours if which == "ours" else form
    if run is None:
        return -1
    run()  # what torch and its threads take once, and pages that the system had put away
    before = peak_memory(reset=True)
    run()
    return peak_memory() - before


@cache
def processes() -> ProcessPoolExecutor:
    """Return what runs every call in a fresh process, forked from one that has imported what takes long."""
    # Freed blocks go back to the system at once, so that none of them hides in what the process had before.
    os.environ.update(MALLOC_MMAP_THRESHOLD_="65536", MALLOC_TRIM_THRESHOLD_="65536")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["transformers.models.qwen2.modeling_qwen2", "vidsieve.testing", "vidsieve.io.machine"]
    )
    return ProcessPoolExecutor(1, context, torch.set_num_threads, (torch.get_num_threads(),), max_tasks_per_child=1)


def memory(name: str, grid: TokenGrid, which: str = "ours", dtype: str = "float32") -> float:
    """Return what selecting adds to the memory of a fresh process, in MiB."""
    return processes().submit(risen, name, grid, which, dtype).result() / 2**20


def in_memory(name: str, dtype: str) -> dict[str, float]:
    """Return what selecting adds on the small grid, and what its published form adds where there is one."""
    found = {str(SMALL): memory(name, SMALL, "ours", dtype)}
    if case_of(name, SMALL, dtype)[1] is not None:
        found[f"{SMALL}, published form"] = memory(name, SMALL, "published", dtype)
    return found


def factor_of(row: dict[str, Any]) -> float:
    """Return how many times as fast as the published form ours is on the small grid; infinity without one."""
    found: float = row.get("seconds", {}).get(str(SMALL), {}).get("times_faster", float("inf"))
    return found


def page(result: dict[str, Any]) -> str:
    """Return the document: times, how many times the published form's, and memory."""

    def times(found: dict[str, Any] | None) -> str:
        if found is None:
            return "–"
        scale, unit = (1, "s") if found["median"] >= 1 else (1e3, "ms")
        return " / ".join(f"{scale * found[key]:.3g}" for key in ("min", "median", "max")) + f" {unit}"

    small, large = str(SMALL), str(LARGE)
    rows = {name: row for name, row in result["rows"].items() if "seconds" in row}
    half = {name: row["bfloat16"] for name, row in rows.items() if "bfloat16" in row}
    held = {name: row for name, row in rows.items() if "growing_MiB" in row}
    setup = result["machine"]
    lines = [
        "# What selecting takes",
        "",
        "Written by `python benchmarks/selecting.py`; every figure is in `benchmarks/results/selecting.json`.",
        "",
        f"From what the model hands over to the kept tokens: {small} = {SMALL.num_tokens:,} and {large} = "
        f"{LARGE.num_tokens:,} tokens, {WIDTH} wide, float32, {setup['threads']} threads of {setup['processor']}. "
        "Seconds are min / median / max. **published**: a vectorised plain transcription of the release's steps "
        "(`benchmarks/plain/`, equal to the recorded cases), in turns with ours in one process. Methods inside the LLM "
        "get what enters a 7B model's layer and compute the attention they read; the published form starts from "
        "queries and keys, and computes what its release does, for most the whole attention. `topv` has no official "
        f"code. Kept: {100 * RETENTION:g} %, of methods that cannot, the least they can; `divprune`, whose time is the "
        f"product of tokens and tokens kept, keeps a hundredth of {large}.",
        "",
        f"| method | {small} | published | times as fast | {large} |",
        "|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        near, far = row["seconds"][small], row["seconds"].get(large)
        factor = f"{near['times_faster']:.1f}" if "times_faster" in near else "–"
        far = far and far["ours"]
        lines.append(f"| `{name}` | {times(near['ours'])} | {times(near.get('published'))} | {factor} | {times(far)} |")
    missed = [name for name, row in rows.items() if factor_of(row) < aim(name)]
    lines += [
        "",
        "Aims, as times of the published form: "
        + ", ".join(f"`{name}` {value:g}" for name, value in AIMS.items())
        + "; all others 1. Missed: "
        + (", ".join(f"`{name}`" for name in missed) or "none")
        + ".",
        "",
        "## Memory",
        "",
        "What selecting adds to a fresh process, in MiB, beside the tokens themselves "
        f"({SMALL.num_tokens * WIDTH * 4 / 2**20:.0f} and {LARGE.num_tokens * WIDTH * 4 / 2**20:.0f} MiB), and on "
        f"{', '.join(f'{k}k' for k in GROWING)} tokens.",
        "",
        f"| method | {small} | published | {large} | " + " | ".join(f"{k}k" for k in GROWING) + " |",
        "|---|---|---|---|" + "---|" * len(GROWING),
    ]
    for name, row in held.items():
        extra = [row["extra_MiB"].get(key) for key in (small, f"{small}, published form", large)]
        cells = ["–" if value is None else f"{value:.0f}" for value in (*extra, *row["growing_MiB"].values())]
        lines.append(f"| `{name}` | " + " | ".join(cells) + " |")
    if open_ := [f"`{name}`" for name in rows if name not in held]:
        lines += ["", f"Not measured yet (`--parts memory`): {', '.join(open_)}."]
    lines += [
        "",
        "## In bfloat16",
        "",
        f"Times, and MiB that selecting adds beside the tokens, on {small}; the published form in bfloat16 too, as a "
        "model hands over.",
        "",
        f"| method | {small} | published | times as fast | MiB | MiB, published |",
        "|---|---|---|---|---|---|",
    ]
    above = []
    for name, row in half.items():
        near, extra = row.get("seconds", {}).get(small, {}), row.get("extra_MiB", {})
        factor = f"{near['times_faster']:.1f}" if "times_faster" in near else "–"
        mine, theirs = extra.get(small), extra.get(f"{small}, published form")
        cells = ["–" if value is None else f"{value:.0f}" for value in (mine, theirs)]
        cells = [times(near.get("ours")), times(near.get("published")), factor, *cells]
        lines.append(f"| `{name}` | " + " | ".join(cells) + " |")
    for name, row in rows.items():
        for dtype, part in (("float32", row), ("bfloat16", half.get(name, {}))):
            extra = part.get("extra_MiB", {})
            if round(extra.get(small, 0)) > extra.get(f"{small}, published form", float("inf")) + 0.5:
                above.append(f"`{name}` in {dtype}")
    slower = [f"`{name}`" for name, row in half.items() if factor_of(row) < aim(name)]
    lines += [
        "",
        f"Slower than the aim in bfloat16: {', '.join(slower) or 'none'}. A processor with matrix units for",
        "bfloat16 multiplies the published forms' tokens on them; ours compares tokens in float32, in which a",
        "cosine has seven digits and not three.",
    ]
    lines += ["", f"More memory than the published form: {', '.join(above) or 'none'}."]
    if open_ := [f"`{name}`" for name in rows if name not in half]:
        lines += ["", f"Not measured yet (`--dtypes bfloat16`): {', '.join(open_)}."]
    return "\n".join(lines) + "\n"


def aim(name: str) -> float:
    """Return how many times faster than its published form a method is to be."""
    return AIMS.get(name, 1.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--methods", default="", help="names, semicolon-separated; all")
    parser.add_argument("--parts", default="seconds,memory", help="memory does not mind what else the machine does")
    parser.add_argument("--dtypes", default="float32,bfloat16", help="comma-separated; bfloat16 on the small grid")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/selecting.json"))
    parser.add_argument("--page", type=Path, default=Path("docs/selecting.md"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    # Methods can be measured one by one, and their memory apart from their time: what was measured before stays.
    whole = not options.methods and (options.parts, options.dtypes) == ("seconds,memory", "float32,bfloat16")
    goes_on = not whole and options.json.exists()
    rows = json.loads(options.json.read_text())["rows"] if goes_on else {}
    for name in options.methods.split(";") if options.methods else methods():
        row: dict[str, Any] = rows.setdefault(name, {})
        if "bfloat16" in options.dtypes:
            half = row.setdefault("bfloat16", {})
            if "seconds" in options.parts:
                half["seconds"] = {str(SMALL): timed(name, SMALL, options.repeats, True, "bfloat16")}
            if "memory" in options.parts:
                half["extra_MiB"] = in_memory(name, "bfloat16")
        if "seconds" in options.parts and "float32" in options.dtypes:
            row["seconds"] = {str(SMALL): timed(name, SMALL, options.repeats, True)}
            row["seconds"][str(LARGE)] = timed(name, LARGE, options.repeats, False)
        if "memory" in options.parts and "float32" in options.dtypes:
            row["extra_MiB"] = in_memory(name, "float32") | {str(LARGE): memory(name, LARGE)}
            row["growing_MiB"] = {f"{k}k": memory(name, TokenGrid(round(1000 * k / 196), 14, 14)) for k in GROWING}
        print(name, json.dumps(row), flush=True)
        result = {"machine": machine(), "retention": RETENTION, "width": WIDTH, "rows": rows}
        write_result(options.json, result)
        options.page.write_text(page(result), encoding="utf-8")


if __name__ == "__main__":
    main()
