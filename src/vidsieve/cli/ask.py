"""vidsieve ask: one question about one video."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from vidsieve.cli.progress import Bar
from vidsieve.cli.shared import (
    MOVIE,
    PAGE,
    PICTURES,
    Earliest,
    Figures,
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
    quiet,
    set_threads,
    write_json,
    write_pictures,
    write_report,
)
from vidsieve.errors import OutputError
from vidsieve.retention import parse_retention
from vidsieve.video import check_file


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
    earliest: Earliest = False,
    frames: Frames = None,
    fps: Fps = None,
    layout: Layout = None,
    max_new_tokens: NewTokens = 64,
    picture: Annotated[
        Path | None, typer.Option(help="Write a picture of the kept tokens here: .png, .svg.", show_default=False)
    ] = None,
    overlay: Annotated[
        Path | None, typer.Option(help="Write the frames with kept tokens lit here, as an mp4.", show_default=False)
    ] = None,
    contributions: Annotated[
        int,
        typer.Option(
            help="In the report, also measure what each token contributes to the answer, on so many random subsets.",
            min=0,
        ),
    ] = 0,
    seed: Seed = 0,
    threads: Threads = 0,
    report: Report = None,
    figures: Figures = None,
    json: Json = None,
) -> None:
    """Ask a question about a video, and see what was kept and where the time went."""
    check_file(video)
    amount = parse_retention(retention)
    check_question(question)
    check_output(json, reads=[video])
    check_output(picture, PICTURES, [video])
    check_output(overlay, MOVIE, [video])
    check_output(report, PAGE, [video])
    for option, path in (("--picture", picture), ("--overlay", overlay)):
        if method == "full" and path is not None:
            raise OutputError(f"{option} shows what a method kept, and 'full' keeps all: leave {option} out")
    if contributions and report is None and figures is None:
        raise OutputError("--contributions are drawn in the report: give --report out.html too")
    set_threads(threads)
    from vidsieve import answering, loading
    from vidsieve.evaluation.methods import check_known, known_fields, method_for

    quiet()
    check_known(method)
    compressor = None
    if method != "full":
        moved = known_fields(method, earliest=earliest)
        compressor = method_for(method, model, policy, retention=amount, **moved)
    clock = answering.Clock()
    loaded = answering.read(video, clock, frames=frames_asked(frames, fps), fps=fps, max_frames=None)
    network, processor = loading.load_model(model, layout)
    result = answering.answer(
        network, processor, loaded, question, compressor, max_new_tokens=max_new_tokens, seed=seed, clock=clock
    )
    for note in loaded.notes:
        out.print(f"note: {escape(note)}")
    out.print(f"[bold]{escape(result.text)}[/]", highlight=False)
    before, after = result.prompt_tokens
    kept = ", ".join(f"{t.kept} of {t.total} video tokens ({t.real_retention:.1%}){t.inside}" for t in result.traces)
    out.print(f"{result.method}: {kept or 'all video tokens'}; prompt {before} → {after} tokens")
    out.print("  ".join(f"{part} {result.ms.get(part, 0.0):.1f} ms" for part in answering.PARTS), highlight=False)
    if result.traces:
        trace = result.traces[0]
        write_pictures(loaded, trace.grid, {result.method: trace.indices}, question, picture, overlay)
    from vidsieve.report.sections import answer_sections

    measured = _contributions(network, processor, loaded, question, contributions, seed) if contributions else None
    given = result.scores[0] if result.scores else None
    scores = None if given is None else given.float().cpu().numpy()
    write_report(
        report,
        question,
        lambda: answer_sections(loaded, question, result.as_dict(), scores, answering.PARTS, measured),
        f"{video.name}, {model}",
        figures,
    )
    write_json(json, result.as_dict() | {"video": str(video), "question": question, "model": model})


def _contributions(network: Any, processor: Any, video: Any, question: str, subsets: int, seed: int) -> Any:
    from vidsieve.adapters.pruning import adapter_for
    from vidsieve.answering import chat
    from vidsieve.evaluation.contributions import contributions

    with Bar("subsets", subsets) as advance:
        return contributions(
            adapter_for(network), chat(processor, video, question), subsets=subsets, seed=seed, progress=advance
        )
