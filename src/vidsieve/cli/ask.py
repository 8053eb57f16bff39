"""vidsieve ask: one question about one video."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from vidsieve.cli.shared import (
    Fps,
    Frames,
    Json,
    Layout,
    Model,
    NewTokens,
    Report,
    Retention,
    Seed,
    Threads,
    check_output,
    check_question,
    frames_asked,
    out,
    parse_retention,
    quiet,
    set_threads,
    write_json,
    write_report,
)
from vidsieve.errors import OutputError


def ask(
    video: Annotated[Path, typer.Argument(help="A video file.")],
    question: Annotated[str, typer.Argument(help="What to ask.")],
    model: Model = "testbed",
    method: Annotated[
        str, typer.Option(help="A method (vidsieve list), name:variant, a policy folder, or 'full'.")
    ] = "divprune",
    policy: Annotated[
        str | None,
        typer.Option(help="Folder of the trained policy; 'testbed' for the shipped ones.", show_default=False),
    ] = None,
    retention: Retention = "0.25",
    frames: Frames = None,
    fps: Fps = None,
    layout: Layout = None,
    max_new_tokens: NewTokens = 64,
    picture: Annotated[
        Path | None, typer.Option(help="Write a PNG of the kept tokens here.", show_default=False)
    ] = None,
    seed: Seed = 0,
    threads: Threads = 0,
    report: Report = None,
    json: Json = None,
) -> None:
    """Ask a question about a video, and see what was kept and where the time went."""
    amount = parse_retention(retention)
    check_question(question)
    check_output(json)
    check_output(picture)
    check_output(report)
    if method == "full" and picture is not None:
        raise OutputError("--picture shows what a method kept, and 'full' keeps all: leave --picture out")
    set_threads(threads)
    from vidsieve import pipeline
    from vidsieve.eval.methods import check_known, method_for

    quiet()
    check_known(method)
    compressor = None if method == "full" else method_for(method, model, policy, retention=amount)
    clock = pipeline.Clock()
    loaded = pipeline.read(video, clock, frames=frames_asked(frames, fps), fps=fps, max_frames=None)
    network, processor = pipeline.load_model(model, layout)
    result = pipeline.answer(
        network, processor, loaded, question, compressor, max_new_tokens=max_new_tokens, seed=seed, clock=clock
    )
    for note in loaded.notes:
        out.print(f"note: {escape(note)}")
    out.print(f"[bold]{escape(result.text)}[/]", highlight=False)
    before, after = result.prompt_tokens
    kept = ", ".join(f"{t.kept} of {t.total} video tokens ({t.real_retention:.1%}){t.inside}" for t in result.traces)
    out.print(f"{result.method}: {kept or 'all video tokens'}; prompt {before} → {after} tokens")
    out.print("  ".join(f"{part} {result.ms.get(part, 0.0):.1f} ms" for part in pipeline.PARTS), highlight=False)
    if picture is not None and result.traces:
        from vidsieve.report.pictures import kept_picture

        trace = result.traces[0]
        kept_picture(picture, loaded.pixels, trace.grid, {result.method: trace.indices}, title=question)
        out.print(f"picture: {picture}")
    from vidsieve.report.sections import answer_sections

    given = result.scores[0] if result.scores else None
    scores = None if given is None else given.float().cpu().numpy()
    write_report(
        report, question, lambda: answer_sections(loaded, question, result.as_dict(), scores, pipeline.PARTS),
        f"{video.name}, {model}",
    )  # fmt: skip
    write_json(json, result.as_dict() | {"video": str(video), "question": question, "model": model})
