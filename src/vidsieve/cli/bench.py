"""vidsieve bench: where the time goes, and what pruning saves."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from vidsieve.cli.progress import Bar
from vidsieve.cli.shared import (
    PAGE,
    Earliest,
    Figures,
    Json,
    Layout,
    Report,
    Seed,
    Threads,
    check_output,
    out,
    quiet,
    set_threads,
    table,
    words,
    write_json,
    write_report,
)
from vidsieve.errors import EvaluationError, UnknownNameError
from vidsieve.retention import parse_retention
from vidsieve.video import check_file

app = typer.Typer(no_args_is_help=True, help="Measure time and memory: the whole pipeline, or selecting alone.")
DTYPES = ("float32", "bfloat16", "float16")
Methods = Annotated[str, typer.Option(help="Names, name:variant, policy folders, or 'all' that need no further file.")]
Retentions = Annotated[str, typer.Option("--retention", help="Fractions kept, or counts as 512t, comma-separated.")]
Dtype = Annotated[str, typer.Option(help="What the model computes in: float32, bfloat16 or float16.")]
Device = Annotated[str, typer.Option(help="A device of torch; 'auto': a GPU where there is one.")]


@app.command("pipeline")
def bench_pipeline(
    video: Annotated[
        Path | None, typer.Argument(help="A video file; default: a moving picture made for it.", show_default=False)
    ] = None,
    model: Annotated[str, typer.Option(help="Folder or hub id of a model; 'testbed' for ours.")] = "testbed",
    random_weights: Annotated[
        str | None,
        typer.Option(help="A published size instead, its weights random: qwen2.5-vl-7b, ….", show_default=False),
    ] = None,
    methods: Methods = "divprune",
    retention: Retentions = "0.25,0.1",
    earliest: Earliest = False,
    lengths: Annotated[str, typer.Option(help="Frames of the videos, comma-separated; twice counts twice.")] = "16,32",
    clip: Annotated[str, typer.Option(help="Size of the picture made: width x height x seconds.")] = "640x360x10",
    new_tokens: Annotated[int, typer.Option(help="Tokens of every answer.", min=1)] = 8,
    repeats: Annotated[int, typer.Option(help="Counted rounds.", min=1)] = 3,
    warm_up: Annotated[int, typer.Option(help="Rounds before them.", min=0)] = 1,
    attention: Annotated[
        str, typer.Option(help="Attention of transformers, the same for all: sdpa, eager, ….")
    ] = "sdpa",
    layout: Layout = None,
    dtype: Dtype = "float32",
    device: Device = "auto",
    seed: Seed = 0,
    threads: Threads = 0,
    report: Report = None,
    figures: Figures = None,
    json: Json = None,
) -> None:
    """Time every part from the file to the answer, methods in turns beside all tokens, random and downsample."""
    check_output(json, reads=[video])
    check_output(report, PAGE, [video])
    if video is not None:
        check_file(video)
    counts = [_count(word, "--lengths") for word in words(lengths)]
    amounts = [parse_retention(word) for word in words(retention)]
    size = [_count(word, "--clip") for word in clip.split("x")]
    if len(size) != 3 or not counts or not amounts:
        raise EvaluationError("give --lengths as 16,32, --retention as 0.25,0.1 and --clip as 640x360x10")
    if dtype not in DTYPES:
        raise UnknownNameError("dtype", dtype, DTYPES)
    set_threads(threads)
    import torch

    from vidsieve.adapters.pruning import adapter_for
    from vidsieve.evaluation.measuring import conditions_of
    from vidsieve.evaluation.methods import check_known, named_methods
    from vidsieve.evaluation.runs import versions
    from vidsieve.evaluation.stopwatch import measure
    from vidsieve.io.machine import machine

    names = [*(name for name in ("random", "downsample") if name not in words(methods)), *words(methods)]
    for name in names:
        check_known(name)
    quiet()
    asked = "testbed" if model == "testbed" and random_weights is None else random_weights or model
    found = named_methods(names, asked, earliest=earliest)
    network, prompts = _loaded(model, random_weights, layout, getattr(torch, dtype), device, seed)
    network.set_attn_implementation(attention)
    conditions = conditions_of([0], found, amounts)
    with tempfile.TemporaryDirectory() as folder:
        path = video if video is not None else made_clip(Path(folder) / "clip.mp4", *size)
        with Bar("passes", (warm_up + repeats) * len(counts) * len(conditions)) as advance:
            result = measure(
                adapter_for(network),
                path,
                counts,
                prompts,
                conditions,
                repeats=repeats,
                warm_up=warm_up,
                new_tokens=new_tokens,
                seed=seed,
                progress=advance,
            )
    result |= {
        "model": asked,
        "dtype": dtype,
        "attention": attention,
        "device": str(network.device),
        "machine": machine(),
        "versions": versions(),
        "video": str(video) if video is not None else clip,
    }
    print_pipeline(result)
    from vidsieve.report.sections import pipeline_sections

    write_report(report, f"Where the time goes: {asked}", lambda: pipeline_sections(result), result["device"], figures)
    write_json(json, result)


def _count(word: str, option: str) -> int:
    if not word.strip().isdigit() or int(word) < 1:
        raise EvaluationError(f"{option} takes whole numbers from 1 on, got {word!r}")
    return int(word)


def _loaded(
    model: str, random_weights: str | None, layout: str | None, dtype: Any, device: str, seed: int
) -> tuple[Any, Callable[[Any], Mapping[str, Any]]]:
    """Return a model, and what makes its inputs of a video."""
    from vidsieve.answering import chat
    from vidsieve.loading import load_model

    if random_weights is None:
        network, processor = load_model(model, layout, dtype, device)
        return network, lambda video: chat(processor, video, "What happens in the video?")
    return timed_model(random_weights, dtype, device, seed, layout)


def timed_model(
    size: str, dtype: Any, device: str, seed: int, layout: str | None = None
) -> tuple[Any, Callable[[Any], Mapping[str, Any]]]:
    """Return a model of a published size with random weights, and what makes its inputs of a video."""
    from vidsieve.evaluation.blueprints import random_model
    from vidsieve.loading import own_device

    made = random_model(size, dtype=dtype, device=own_device() if device == "auto" else device, seed=seed)
    if layout is not None:
        made.model.config.vidsieve_layout = layout
    return made.model, lambda video: made.inputs(video, 40, seed)


def made_clip(path: Path, width: int, height: int, seconds: int) -> Path:
    """Write a video of soft waves that move, 24 frames a second."""
    import numpy as np

    from vidsieve.video.reading import write_video

    height, width = height // 2 * 2, width // 2 * 2
    down, across = np.linspace(0, 6, height)[:, None, None], np.linspace(0, 9, width)[None, :, None]
    colours = np.array([0.0, 2.1, 4.2])
    frames = [127 + 120 * np.sin(down + across * (1 + colours / 9) + colours + t / 8) for t in range(24 * seconds)]
    write_video(path, np.asarray(frames, np.uint8), 24.0)
    return path


def _named(row: Mapping[str, Any]) -> str:
    from vidsieve.report.sections import named

    return escape(named(row))


SHORT = {"decode": "read", "preprocess": "prep", "vision encoder": "tower", "projector": "proj.", "decode-text": "text"}
"""Parts of the work as narrow columns call them."""


def print_pipeline(result: Mapping[str, Any]) -> None:
    """Print milliseconds of every part, and what each method saves."""
    parts = list(result["rows"][0]["ms"])
    lines = []
    for row in result["rows"]:
        faster = row["times_faster"]
        pays = "–" if row["method"] == "full" else row["pays_from"] or "no"
        lines.append(
            (
                _named(row),
                row["retention"],
                *(f"{row['ms'][part]['mean']:.1f}" for part in parts),
                f"{faster['prefill']:.2f}×",
                f"{faster['all']:.2f}×",
                pays,
                f"{row['peak_MiB']:.0f}",
            )
        )
    columns = ("method", "kept", *(SHORT.get(part, part) for part in parts), "× LLM", "× all", "pays", "MiB")
    lengths = ", ".join(map(str, result["lengths"]))
    title = f"{result['model']}, {lengths} frames, {result['device']}: ms, means over lengths"
    out.print(table(title, columns, lines, right=range(1, len(columns))))
    out.print("× LLM: selecting and prefill against all tokens; pays: from so many frames on it takes less in all")
    full = result["rows"][0]
    lines = [
        (
            _named(row),
            row["retention"],
            f"{row['visual'][1]:.0f}",
            f"{row['prompt'][1]:.0f}",
            *(f"{row['flops'][way] / 1e12:.4g}" for way in ("paper", "counted")),
            f"{full['flops']['counted'] / row['flops']['counted']:.2f}×",
            f"{full['ms']['prefill']['mean'] / row['ms']['prefill']['mean']:.2f}×",
            *(f"{row['ms']['all'][which]:.0f}" for which in ("p50", "p95")),
        )
        for row in result["rows"]
    ]
    columns = (
        "method",
        "kept",
        "video tokens",
        "prompt",
        "TFLOP, papers' formula",
        "TFLOP, counted",
        "fewer",
        "prefill faster",
        "all p50 ms",
        "p95",
    )
    out.print(table("the LLM's work", columns, lines, right=range(1, len(columns))))
    for row in result["refused"]:
        out.print(f"{_named(row)}: {row['reason']}", markup=False, highlight=False)


@app.command("select")
def bench_select(
    methods: Methods = "all",
    grid: Annotated[str, typer.Option(help="Frames x height x width in tokens.")] = "32x14x14",
    width: Annotated[int, typer.Option(help="Width of the tokens.", min=8)] = 3584,
    retention: Annotated[str, typer.Option(help="Fraction kept, or a count such as 512t.")] = "0.1",
    repeats: Annotated[int, typer.Option(help="Counted runs, after one that is not.", min=1)] = 5,
    dtype: Dtype = "float32",
    device: Device = "auto",
    threads: Threads = 0,
    json: Json = None,
) -> None:
    """Time selecting alone, of methods before the LLM that need no policy, on random video tokens."""
    check_output(json)
    sides = [_count(word, "--grid") for word in grid.split("x")]
    if len(sides) != 3:
        raise EvaluationError(f"--grid is frames x height x width, as 32x14x14; got {grid!r}")
    if dtype not in DTYPES:
        raise UnknownNameError("dtype", dtype, DTYPES)
    amount = parse_retention(retention)
    set_threads(threads)
    import torch

    from vidsieve.evaluation.methods import check_known, named_methods
    from vidsieve.evaluation.selecting import select_times
    from vidsieve.io.machine import machine
    from vidsieve.loading import own_device
    from vidsieve.types import TokenGrid

    for name in words(methods):
        check_known(name)
    found = named_methods(words(methods), "none", prefill=True)
    where = own_device() if device == "auto" else device
    with Bar("methods", len(found)) as advance:
        rows, refused = select_times(
            found,
            TokenGrid(*sides),
            width,
            amount,
            repeats=repeats,
            dtype=getattr(torch, dtype),
            device=where,
            progress=advance,
        )
    lines = [
        (escape(row["name"]), row["kept"], *(f"{row['ms'][key]:.2f}" for key in ("min", "median", "max")))
        for row in rows
    ]
    lines += [(escape(row["name"]), *"––––") for row in refused]
    columns = ("method", "tokens kept", "min ms", "median", "max")
    title = f"{grid} tokens of {width}, {dtype}, {where}, {torch.get_num_threads()} threads"
    out.print(table(title, columns, lines, right=(1, 2, 3, 4)))
    for row in refused:
        out.print(f"{row['name']}: {row['reason']}", markup=False, highlight=False)
    write_json(
        json,
        {
            "grid": sides,
            "width": width,
            "retention": retention,
            "dtype": dtype,
            "device": where,
            "machine": machine(),
            "rows": rows,
            "refused": refused,
        },
    )
