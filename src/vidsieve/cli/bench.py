"""`vidsieve bench`: where the time goes, and what pruning saves."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from vidsieve import registry
from vidsieve.cli import options, output, shared
from vidsieve.errors import EvaluationError
from vidsieve.retention import parse_budget
from vidsieve.video import check_file


def bench(
    video: Annotated[
        Path | None, typer.Argument(help="A video file; default: a generated moving picture.", show_default=False)
    ] = None,
    model: Annotated[str, typer.Option(help=options.MODEL)] = "testbed",
    random_weights: Annotated[
        str | None,
        typer.Option(help="A published size instead, with random weights, such as qwen2.5-vl-7b.", show_default=False),
    ] = None,
    methods: Annotated[
        str, typer.Option(help="Names, name:variant, policies, or 'all' that need no further file.")
    ] = "divprune",
    retention: Annotated[
        str, typer.Option("--retention", help="Fractions kept, or counts as 512t, comma-separated.")
    ] = "0.25,0.1",
    earliest: options.Earliest = False,
    lengths: Annotated[
        str, typer.Option(help="Comma-separated frame counts; a repeated value is weighted accordingly.")
    ] = "16,32",
    clip: Annotated[str, typer.Option(help="Size of the generated picture: width x height x seconds.")] = "640x360x10",
    new_tokens: Annotated[int, typer.Option(help="Tokens of every answer.", min=1)] = 8,
    repeats: Annotated[int, typer.Option(help="Timed rounds, after one warm-up.", min=1)] = 3,
    attention: Annotated[
        str, typer.Option(help="Attention of transformers, the same for all: sdpa, eager, ….")
    ] = "sdpa",
    layout: options.Layout = None,
    dtype: options.Dtype = None,
    device: options.Device = "auto",
    folder: Annotated[
        Path | None,
        typer.Option("--out", help="Folder of the run, which the same command resumes.", show_default=False),
    ] = None,
    seed: options.Seed = 0,
    threads: options.Threads = 0,
    report: options.Report = None,
    json: options.Json = None,
) -> None:
    """Time every part from the file to the answer, methods in turns with all tokens, random and downsample."""
    output.check_output(json, reads=[video])
    output.check_output(report, output.PAGE, [video])
    if video is not None:
        check_file(video)
    counts = [_count(word, "--lengths") for word in options.words(lengths)]
    amounts = [parse_budget(word) for word in options.words(retention)]
    size = [_count(word, "--clip") for word in clip.split("x")]
    if len(size) != 3 or not counts or not amounts:
        raise EvaluationError("give --lengths as 16,32, --retention as 0.25,0.1 and --clip as 640x360x10")
    names = options.words(methods)
    names = [*(name for name in ("random", "downsample") if name not in names), *names]
    for name in names:
        registry.check_known(name)
    shared.set_threads(threads)
    from vidsieve.evaluation.conditions import conditions_of, named_methods

    shared.quiet()
    from vidsieve.adapters.pruning import adapter_for
    from vidsieve.evaluation.tasks.timing import TimingTask

    name = random_weights or model
    conditions = conditions_of(named_methods(names, name, earliest=earliest), amounts)
    network, prompts = _loaded(model, random_weights, layout, dtype, device, seed)
    network.set_attn_implementation(attention)
    about = {
        "model": name,
        "dtype": str(network.dtype).removeprefix("torch."),
        "attention": attention,
        "device": str(network.device),
        "video": str(video) if video is not None else clip,
    }
    with tempfile.TemporaryDirectory() as temporary:
        task = TimingTask(
            adapter=adapter_for(network),
            source=video if video is not None else made_clip(Path(temporary) / "clip.mp4", *size),
            lengths=counts,
            prompts=prompts,
            repeats=repeats,
            new_tokens=new_tokens,
            seed=seed,
            about=about,
        )
        lead = f"model {name}, on {about['device']}"
        shared.run_task(task, conditions, "rounds", folder=folder, report=report, lead=lead, json=json)


def _count(word: str, option: str) -> int:
    if not word.strip().isdigit() or int(word) < 1:
        raise EvaluationError(f"{option} takes whole numbers from 1 on, got {word!r}")
    return int(word)


def _loaded(
    model: str, random_weights: str | None, layout: str | None, dtype: str | None, device: str, seed: int
) -> tuple[Any, Callable[[Any], Mapping[str, Any]]]:
    """Return a model, and what makes its inputs of a video.

    Random weights have no files with a dtype: it is float32 on a CPU, bfloat16 elsewhere.
    """
    from vidsieve.answering import chat

    if random_weights is None:
        network, processor = shared.load_model(model, layout, dtype, device)
        return network, lambda video: chat(processor, video, "What happens in the video?")
    import torch

    from vidsieve.loading import own_device

    device = own_device() if device == "auto" else device
    usual = "float32" if device == "cpu" else "bfloat16"
    return timed_model(random_weights, getattr(torch, dtype or usual), device, seed, layout)


def timed_model(
    size: str, dtype: Any, device: str, seed: int, layout: str | None = None
) -> tuple[Any, Callable[[Any], Mapping[str, Any]]]:
    """Return a model of a published size with random weights, and what makes its inputs of a video."""
    from vidsieve.evaluation.blueprints import random_model

    blueprint = random_model(size, dtype=dtype, device=device, seed=seed)
    if layout is not None:
        blueprint.model.config.vidsieve_layout = layout
    return blueprint.model, lambda video: blueprint.inputs(video, 40, seed)


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
