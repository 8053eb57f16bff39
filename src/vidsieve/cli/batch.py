"""vidsieve batch: questions about many videos, from one file of JSON lines into another."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vidsieve.cli.progress import Bar
from vidsieve.cli.shared import (
    Earliest,
    Fps,
    Json,
    Layout,
    Model,
    NewTokens,
    Retention,
    Seed,
    Threads,
    check_output,
    err,
    out,
    quiet,
    set_threads,
    write_json,
)
from vidsieve.errors import ModelError, OutputError
from vidsieve.retention import parse_retention

if TYPE_CHECKING:
    from vidsieve.serving.batch import BatchReport, Paths
    from vidsieve.serving.batching.cluster import Cluster


def batch(
    source: Annotated[Path, typer.Argument(metavar="IN.jsonl", help='Rows {"video", "question", "options"?, …}.')],
    target: Annotated[Path, typer.Argument(metavar="OUT.jsonl", help="The rows in their order, with answers.")],
    model: Model = "testbed",
    method: Annotated[
        str, typer.Option(help="A method (vidsieve list), name:variant, a policy folder, or 'full'.")
    ] = "divprune",
    policy: Annotated[
        str | None,
        typer.Option(help="Folder of the trained policy; 'testbed' for the shipped ones.", show_default=False),
    ] = None,
    retention: Retention = "0.25",
    earliest: Earliest = False,
    frames: Annotated[int, typer.Option(help="Frames taken evenly; with --fps at most so many.", min=1)] = 16,
    fps: Fps = None,
    layout: Layout = None,
    max_new_tokens: NewTokens = 64,
    size: Annotated[int, typer.Option("--batch", help="Prompts in one call of the LLM.", min=1)] = 1,
    readers: Annotated[
        int, typer.Option(help="Decoding threads; at most twice as many decoded videos wait.", min=1)
    ] = 2,
    device: Annotated[str, typer.Option(help="Where the model runs: cpu, cuda, cuda:1; auto: a GPU if any.")] = "auto",
    video_root: Annotated[
        Path | None, typer.Option(help="Folder that the rows' paths start from.", show_default="that of the file")
    ] = None,
    ray: Annotated[bool, typer.Option("--ray", help="Answer on workers of Ray Data.")] = False,
    ray_address: Annotated[
        str | None, typer.Option(help="A Ray cluster that runs; default: one of its own here.", show_default=False)
    ] = None,
    workers: Annotated[int, typer.Option(help="Ray's workers, each with a model.", min=1)] = 1,
    seed: Seed = 0,
    threads: Threads = 0,
    json: Json = None,
) -> None:
    """Answer questions about many videos, pruned, however often the run is stopped or killed on the way.

    Rows that cannot be answered are in OUT.failed.jsonl with the reason. OUT.journal.jsonl holds what is settled: the
    same command goes on from there. OUT is written at the end.
    """
    from vidsieve.serving.batch import Paths

    amount, paths = parse_retention(retention), Paths(target)
    if target.suffix != ".jsonl":
        raise OutputError(f"cannot write {target}: its name ends in .jsonl")
    for path in (target, paths.failed, paths.journal, json):
        check_output(path, reads=[source])
    if (ray_address is not None or workers > 1) and not ray:
        raise OutputError("--ray-address and --workers are for --ray: give it too")
    if ray and device not in ("auto", "cpu", "cuda"):
        raise ModelError(f"Ray gives each worker its GPU: --device is auto, cuda or cpu, got {device!r}")
    set_threads(threads)
    from vidsieve.evaluation.conditions import check_known
    from vidsieve.serving.batch import answer_file, as_dict
    from vidsieve.serving.batching.settings import BatchSettings

    quiet()
    check_known(method)
    settings = BatchSettings(
        model, method, policy, amount, earliest, frames, fps, max_new_tokens, size, seed, layout, device
    )
    with _stoppable() as stop, Bar("rows", None) as update:
        report = answer_file(
            source,
            target,
            settings,
            root=video_root,
            readers=readers,
            cluster=_cluster(ray, ray_address, workers),
            progress=update,
            stop=stop,
        )
    _print(report, paths)
    write_json(json, as_dict(report, paths, settings))
    if report.stopped:
        raise typer.Exit(130)


def _cluster(ray: bool, address: str | None, workers: int) -> Cluster | None:
    if not ray:
        return None
    from vidsieve.serving.batching.cluster import Cluster, imported

    imported()
    return Cluster(address, workers)


@contextmanager
def _stoppable() -> Iterator[Callable[[], bool]]:
    """Note Ctrl-C and let the call in work end; a second one ends it at once."""
    pressed: list[int] = []

    def note(number: int, frame: Any) -> None:
        if pressed:
            raise KeyboardInterrupt
        pressed.append(number)
        err.print("stopping when the rows in work are answered; Ctrl-C once more stops at once", soft_wrap=True)

    before = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: bool(pressed)
    except KeyboardInterrupt:
        err.print("stopped; what was answered is in the journal: the same command goes on from there", soft_wrap=True)
        raise typer.Exit(130) from None
    finally:
        signal.signal(signal.SIGINT, before)


def _print(report: BatchReport, paths: Paths) -> None:
    failed = f", {report.failed:,} failed" if report.failed else ""
    settled = f"{report.answered:,} of {report.rows:,} rows answered{failed}"
    if report.stopped:
        said = f"stopped: {settled}; they are in {paths.journal}, and the same command goes on from there"
    elif not report.written:
        said = f"{paths.out} is finished already: {settled}; nothing was done"
    else:
        earlier = f" ({report.before:,} of them by earlier runs)" if report.before else ""
        reasons = f"; the reasons are in {paths.failed}" if report.failed else ""
        said = f"{settled}{earlier}: {paths.out}{reasons}"
    out.print(said, soft_wrap=True, markup=False, highlight=False)
