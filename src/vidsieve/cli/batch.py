"""vidsieve batch: questions about many videos, from one file of JSON lines into another."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vidsieve.cli.options import (
    Device,
    Dtype,
    Earliest,
    Fps,
    Frames,
    Layout,
    MaxPixels,
    MaxRow,
    Model,
    NewTokens,
    Retention,
    Threads,
    frames_by_rule,
    named_model,
)
from vidsieve.cli.output import check_output, err, out
from vidsieve.cli.progress import Bar
from vidsieve.cli.shared import quiet, set_threads, stoppable
from vidsieve.errors import ModelError, OutputError
from vidsieve.io.limits import Limits
from vidsieve.io.stopping import stop_on_signal
from vidsieve.registry import check_known
from vidsieve.retention import parse_budget, parse_frames

if TYPE_CHECKING:
    from vidsieve.serving.batch import BatchReport


def batch(
    source: Annotated[Path, typer.Argument(metavar="IN.jsonl", help='Rows {"video", "question", "options"?, …}.')],
    target: Annotated[Path, typer.Argument(metavar="OUT.jsonl", help="The rows in their order, with answers.")],
    model: Model = None,
    method: Annotated[str, typer.Option(help="Method (vidsieve list), name:variant, policy or 'full'.")] = "divprune",
    policy: Annotated[
        str | None,
        typer.Option(help="Folder of the policy, or OWNER/NAME on the hub; 'testbed' for ours.", show_default=False),
    ] = None,
    retention: Retention = "0.25",
    earliest: Earliest = False,
    frames: Frames = None,
    fps: Fps = None,
    layout: Layout = None,
    max_new_tokens: NewTokens = 64,
    size: Annotated[int, typer.Option("--batch", help="Prompts in one call of the LLM.", min=1)] = 1,
    readers: Annotated[
        int, typer.Option(help="Decoding threads; at most twice as many decoded videos wait.", min=1)
    ] = 2,
    device: Device = "auto",
    dtype: Dtype = None,
    video_root: Annotated[
        Path | None, typer.Option(help="Folder that the rows' paths start from.", show_default="that of the file")
    ] = None,
    max_row: MaxRow = Limits.row,
    ray: Annotated[
        int | None,
        typer.Option(
            metavar="WORKERS",
            help="Answer on this many workers of Ray Data, each with a model.",
            min=1,
            show_default=False,
        ),
    ] = None,
    max_pixels: MaxPixels = Limits.pixels,
    threads: Threads = 0,
) -> None:
    """Answer questions about many videos with pruned prompts; a run that was stopped or killed can be resumed.

    Rows that cannot be answered are written to OUT.failed.jsonl with the reason, and the exit code is 1.
    OUT.journal.jsonl holds the rows done so far: the same command resumes from it. OUT is written at the end.
    """
    name = named_model(model)
    check_known(method)
    if target.suffix != ".jsonl":
        raise OutputError(f"cannot write {target}: its name must end in .jsonl")
    from vidsieve.serving.batch import answer_file, side_files
    from vidsieve.serving.batch_groups import BatchSettings, answer_groups

    amount, (failed, journal) = parse_budget(retention), side_files(target)
    for path in (target, failed, journal):
        check_output(path, reads=[source])
    answer = answer_groups
    if ray is not None:
        from vidsieve.serving.ray_batch import answer_on_ray, import_ray

        if device not in ("auto", "cpu", "cuda"):
            raise ModelError(f"Ray gives each worker its GPU: --device must be auto, cuda or cpu, got {device!r}")
        import_ray()
        answer = partial(answer_on_ray, workers=ray)
    set_threads(threads)
    quiet()
    settings = BatchSettings(
        name,
        method,
        policy,
        amount,
        earliest,
        fps=fps,
        max_new_tokens=max_new_tokens,
        batch=size,
        layout=layout,
        device=device,
        dtype=dtype,
    )
    count = parse_frames(frames or "16")
    if not isinstance(count, int):
        chosen = settings.compressor()
        count = frames_by_rule(str(frames), fps, [] if chosen is None else [chosen])["frames"]
    settings = replace(settings, frames=count)
    note = partial(err.print, "stopping after the current group; Ctrl-C again stops at once", soft_wrap=True)
    with stoppable(journal), stop_on_signal(note) as flag, Bar("rows", None) as update:
        report = answer_file(
            source,
            target,
            settings,
            root=video_root,
            readers=readers,
            answer=answer,
            progress=update,
            stop=lambda: flag.stop,
        )
    _print(report, target, failed, journal)
    if report.stopped or report.failed:
        raise typer.Exit(130 if report.stopped else 1)


def _print(report: BatchReport, target: Path, failed: Path, journal: Path) -> None:
    failures = f", {report.failed:,} failed" if report.failed else ""
    done = f"{report.answered:,} of {report.rows:,} rows answered{failures}"
    if report.stopped:
        text = f"stopped: {done}; they are in {journal}: the same command resumes"
    elif not report.written:
        text = f"{target} is finished already: {done}; nothing was done"
    else:
        earlier = f" ({report.before:,} of them by earlier runs)" if report.before else ""
        reasons = f"; the reasons are in {failed}" if report.failed else ""
        text = f"{done}{earlier}: {target}{reasons}"
    out.print(text, soft_wrap=True, markup=False, highlight=False)
