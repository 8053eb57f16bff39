"""vidsieve compare: every method on one question about one video."""

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
    table,
    words,
    write_json,
    write_pictures,
    write_report,
)
from vidsieve.retention import parse_retention
from vidsieve.video import check_file


def compare(
    video: Annotated[Path, typer.Argument(help="A video file.")],
    question: Annotated[str, typer.Argument(help="What to ask.")],
    model: Model = "testbed",
    methods: Annotated[
        str, typer.Option(help="Names, name:variant, policy folders, or 'all' that need no further file.")
    ] = "all",
    retention: Retention = "0.25",
    earliest: Earliest = False,
    frames: Frames = None,
    fps: Fps = None,
    layout: Layout = None,
    max_new_tokens: NewTokens = 64,
    repeats: Annotated[int, typer.Option(help="Counted rounds, after one that is not.", min=1)] = 3,
    picture: Annotated[
        Path | None, typer.Option(help="Write a picture of what each keeps here: .png, .svg.", show_default=False)
    ] = None,
    overlay: Annotated[
        Path | None,
        typer.Option(help="Write the frames with kept tokens lit here, side by side, as an mp4.", show_default=False),
    ] = None,
    seed: Seed = 0,
    threads: Threads = 0,
    report: Report = None,
    figures: Figures = None,
    json: Json = None,
) -> None:
    """Ask one question under every method: what each keeps, answers and costs, beside the model with all tokens."""
    check_file(video)
    amount = parse_retention(retention)
    check_question(question)
    check_output(json, reads=[video])
    check_output(picture, PICTURES, [video])
    check_output(overlay, MOVIE, [video])
    check_output(report, PAGE, [video])
    set_threads(threads)
    from vidsieve import answering, loading
    from vidsieve.evaluation import comparing
    from vidsieve.evaluation.methods import check_known, named_methods

    names = words(methods)
    for name in names:
        check_known(name)
    quiet()
    chosen = {
        name: method.with_retention(amount) for name, method in named_methods(names, model, earliest=earliest).items()
    }
    loaded = answering.read(video, answering.Clock(), frames=frames_asked(frames, fps), fps=fps, max_frames=None)
    network, processor = loading.load_model(model, layout)
    with Bar("answers", (repeats + 1) * (len(chosen) + 1)) as advance:
        result = comparing.compare(
            network,
            processor,
            loaded,
            question,
            chosen,
            max_new_tokens=max_new_tokens,
            seed=seed,
            repeats=repeats,
            progress=advance,
        )
    for note in loaded.notes:
        out.print(f"note: {escape(note)}")
    print_comparison(result)
    shown = {row["name"]: row["indices"] for row in result["rows"] if row["indices"] is not None}
    if shown:
        from vidsieve.types import TokenGrid

        write_pictures(loaded, TokenGrid(*result["grid"]), shown, question, picture, overlay)
    elif picture is not None:
        out.print("picture: none, as no method of the list could run")
    from vidsieve.report.sections import comparison_sections

    write_report(report, question, lambda: comparison_sections(loaded, result), f"{video.name}, {model}", figures)
    rows = [{name: value for name, value in row.items() if name != "scores"} for row in result["rows"]]
    write_json(json, result | {"rows": rows, "video": str(video), "model": model})


def print_comparison(result: dict[str, Any]) -> None:
    """Print a comparison as a table, the fastest way to the same answer easy to see."""
    whole = result["rows"][0]["ms"]["total"]["median"]
    lines = []
    for row in result["rows"]:
        spent = row["ms"]["total"]["median"]
        lines.append(
            (
                escape(row["name"]),
                f"{row['layer_retention']:.3f}",
                f"{row['real_retention']:.3f}",
                ("= " if row["same"] else "≠ ") + escape(row["answer"]),
                f"{row['select_ms']['median']:.1f}",
                f"{row['ms']['prefill']['median']:.1f}",
                f"{spent:.1f}",
                f"{whole / spent:.2f}×",
            )
        )
    lines += [(escape(row["name"]), *"–––––––") for row in result["refused"]]
    columns = (
        "method",
        "of layers",
        "left",
        "answer (= all tokens')",
        "choosing ms",
        "prefill ms",
        "total ms",
        "speed",
    )
    tokens = f", {result['tokens']} video tokens" if result["tokens"] else ""
    title = f"{result['frames']} frames{tokens}; medians of {result['repeats']}"
    out.print(table(title, columns, lines, right=(1, 2, 4, 5, 6, 7)))
    for row in result["refused"]:
        out.print(f"{row['name']}: {row['reason']}", markup=False, highlight=False)
