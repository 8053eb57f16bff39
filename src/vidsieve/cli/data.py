"""vidsieve data: make files of training prompts better."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, get_args

import typer

from vidsieve.cli.progress import Bar
from vidsieve.cli.shared import Json, Threads, check_output, out, quiet, set_threads, write_json
from vidsieve.errors import OutputError, TrainingError, UnknownNameError

app = typer.Typer(no_args_is_help=True, help="Prepare files of training prompts.")


@app.callback()
def _root() -> None:
    """Prepare files of training prompts."""


@app.command("filter")
def filter_prompts(
    source: Annotated[Path, typer.Argument(help="JSON lines of prompts, or Video-R1's .json.")],
    target: Annotated[Path, typer.Argument(help="Where the rows that are left go, as JSON lines.")],
    model: Annotated[
        list[str] | None,
        typer.Option(
            help="Model that answers without the video; give it twice for two models.", show_default="testbed"
        ),
    ] = None,
    rule: Annotated[
        str, typer.Option(help="A question goes when 'any' of the models answers it blindly, or 'all'.")
    ] = "any",
    threads: Threads = 0,
    json: Json = None,
) -> None:
    """Leave out questions that a model answers without seeing the video: they teach nothing of its tokens."""
    check_output(json)
    check_output(target)
    if target.resolve() == source.resolve():
        raise OutputError(f"{target} would overwrite the file that is read: name another one")
    set_threads(threads)
    from vidsieve.data.filtering import Rule, filter_file
    from vidsieve.pipeline import load_model

    if rule not in get_args(Rule):
        raise UnknownNameError("rule", rule, get_args(Rule))
    quiet()
    names = model or ["testbed"]
    with Bar("questions", 1) as update:
        found = filter_file(source, target, [load_model(name) for name in names], rule, progress=update)  # type: ignore[arg-type]
    for name, share in zip(names, found.blind_accuracy, strict=True):
        out.print(f"{name} answers {share:.1%} of {found.questions} questions without the video")
    out.print(f"{found.kept} of {found.questions} questions are left in {target}")
    if found.captions:
        out.print(f"{found.captions} rows without a question were kept as they are")
    if found.others:
        out.print(f"{found.others} questions of other kinds were kept as they are: they have no options to guess from")
    write_json(json, vars(found) | {"models": names, "rule": rule})


@app.command("pseudo")
def pseudo_videos(
    source: Annotated[Path, typer.Argument(help='JSON lines of {"image": path, "caption": …}, paths from the file.')],
    target: Annotated[Path, typer.Argument(help="Where the pseudo-videos go, as JSON lines for `train score --data`.")],
    count: Annotated[
        int | None,
        typer.Option(help="Videos.", min=1, show_default="each image about once: images // 3 for 2-4"),
    ] = None,
    images: Annotated[str, typer.Option(help="Images of a video, least-most.")] = "2-4",
    frames: Annotated[str, typer.Option(help="Frames that an image stays, least-most.")] = "3-6",
    seed: Annotated[int, typer.Option(help="The same seed gives the same file.", min=0)] = 0,
    preview: Annotated[
        Path | None, typer.Option(help="Draw the first few videos into this PNG.", show_default=False)
    ] = None,
    json: Json = None,
) -> None:
    """Make pseudo-videos of captioned images, for the first stage of SCORE's training."""
    for path in (json, target, preview):
        check_output(path)
        if path is not None and path.resolve() == source.resolve():
            raise OutputError(f"{path} would overwrite the file that is read: name another one")
    from vidsieve.data.pseudo import pseudo_file

    with Bar("images", 1) as update:
        made = pseudo_file(
            source, target, count=count, images=_bounds("images", images), frames=_bounds("frames", frames), seed=seed,
            progress=update,
        )  # fmt: skip
    result = made.as_dict()
    length = result["frames"]
    out.print(
        f"{result['videos']} pseudo-videos of {length['min']} to {length['max']} frames from {made.images} images "
        f"are in {target}"
    )
    for reason, number in result["skipped"].items():
        first = [row for row in made.left_out if row.reason == reason][:3]
        lines = ", ".join(f"line {row.line}" + (f" ({row.image})" if row.image else "") for row in first)
        out.print(f"left out: {number} × {reason}: {lines}{', …' if number > len(first) else ''}", markup=False)
    if preview is not None:
        from vidsieve.data.video import read_frames
        from vidsieve.report.pictures import contact_sheet

        shown = made.videos[:6]
        contact_sheet(preview, [(read_frames(video.frames).pixels, video.caption) for video in shown])
        out.print(f"the first {len(shown)} are drawn in {preview}")
    write_json(json, result | {"seed": seed})


def _bounds(name: str, text: str) -> tuple[int, int]:
    """Return the numbers in ``2-4``, or in ``3`` for exactly three."""
    least, dash, most = text.partition("-")
    try:
        return int(least), int(most if dash else least)
    except ValueError:
        raise TrainingError(f"{name} must be two numbers, as 2-4, or one; got {text!r}") from None
