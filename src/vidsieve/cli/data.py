"""vidsieve data: check files of training prompts, and prepare them for training."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer
from rich.markup import escape

from vidsieve.cli.annotate import annotate
from vidsieve.cli.options import Device, Dtype, Json, MaxPixels, MaxRow, Share, Threads, named_model, parse_share
from vidsieve.cli.output import PICTURES, check_free, check_output, err, note, out, table, write_json
from vidsieve.cli.progress import Bar
from vidsieve.cli.shared import load_model, quiet, set_threads, stoppable
from vidsieve.errors import TrainingError, UnknownNameError
from vidsieve.io.files import beside, writing
from vidsieve.io.journal import shard_path
from vidsieve.io.limits import Limits
from vidsieve.io.texts import percent

if TYPE_CHECKING:
    from vidsieve.training.data.skipped import Skipped

app = typer.Typer(no_args_is_help=True, help="Check and prepare files of training prompts.")
app.command("annotate")(annotate)

say = partial(out.print, markup=False, highlight=False, soft_wrap=True)
VideoRoot = Annotated[
    Path | None,
    typer.Option(help="Folder that paths in the file start from; default: that of the file.", show_default=False),
]


@app.callback()
def _root() -> None:
    """Check and prepare files of training prompts."""


@app.command("check")
def check(
    source: Annotated[
        Path,
        typer.Argument(help="Video-R1, LLaVA-Video, LLaVA-OneVision, Koala-36M, or JSON lines, as published."),
    ],
    video_root: VideoRoot = None,
    frames: Annotated[int, typer.Option(help="Frames read from each video, as in training.", min=1)] = 16,
    quick: Annotated[bool, typer.Option("--quick", help="Only look for the videos, and read none of them.")] = False,
    listed: Annotated[
        Path | None, typer.Option("--list", help="List every fault here, as JSON lines.", show_default=False)
    ] = None,
    readers: Annotated[int, typer.Option(help="Videos read at a time.", min=1)] = 2,
    max_pixels: MaxPixels = Limits.pixels,
    max_row: MaxRow = Limits.row,
    json: Json = None,
) -> None:
    """Report the contents of a file of prompts, and the part of it that can be used, before anything runs."""
    check_output(json, reads=(source,))
    check_output(listed, (".jsonl",), reads=(source,))
    from vidsieve.training.data.checking import check_file
    from vidsieve.training.data.skipped import Skipped

    if listed is not None:  # a list without lines: nothing is wrong
        with writing(listed):
            pass
    skipped = Skipped(listed)
    with Bar("videos", None) as update:
        result = check_file(
            source, video_root, frames=frames, decode=not quick, threads=readers, skipped=skipped, progress=update
        )
    say(f"{source}: {result.title}")
    lines = [
        (escape(group["source"] or "–"), group["kind"], f"{group['rows']:,}", f"{group['usable']:,}")
        for group in result.groups
    ]
    out.print(table("", ("source", "kind", "rows", "usable"), lines, right=(2, 3)))
    videos = ""
    if result.videos:
        good, hours = result.videos - skipped.videos.total(), result.seconds / 3600
        length = f", {hours:.1f} hours of video" if hours >= 1 else f", {result.seconds:.0f} s of video"
        state = "there" if quick else f"readable{length}"
        videos = f"; {good:,} of {result.videos:,} videos and images are {state}"
    out.print(f"{result.usable:,} of {result.rows:,} well-formed rows can be used{videos}", highlight=False)
    _print_skipped(skipped)
    if listed is not None and skipped.faults:
        say(f"listed in {listed}")
    if result.example is not None:
        fields = ("question", "options", "answer", "prompt", "caption")
        row = "; ".join(f"{key}: {value!r:.160}" for key, value in result.example.items() if key in fields)
        say(f"first row: {row}")
    write_json(json, vars(result) | counts_of(skipped))


def counts_of(skipped: Skipped) -> dict[str, Any]:
    """Return what was left out, for JSON."""
    counts = skipped.as_dict()
    return {"faulty_videos": counts.pop("videos"), **counts}


def _print_skipped(skipped: Skipped) -> None:
    for line in skipped.reasons():
        say(f"left out: {line}")


@app.command("filter")
def filter_prompts(
    source: Annotated[Path, typer.Argument(help="A file of prompts, as `vidsieve data check` reads it.")],
    target: Annotated[Path, typer.Argument(help="File of JSON lines to write, with the rows that are left.")],
    model: Annotated[
        list[str] | None,
        typer.Option(help="Model that answers without the video; give it twice for two models.", show_default=False),
    ] = None,
    rule: Annotated[
        str, typer.Option(help="Drop a question when 'any' of the models answers it blindly, or 'all'.")
    ] = "any",
    seeds: Annotated[
        int,
        typer.Option(help="Answers of each model: the first the likeliest, others drawn, options reordered.", min=1),
    ] = 1,
    right_in: Annotated[
        int | None,
        typer.Option(help="Correct answers that make a model answer blindly.", min=1, show_default="all of them"),
    ] = None,
    temperature: Annotated[float, typer.Option(help="Of drawn answers.")] = 1.0,
    batch: Annotated[int, typer.Option(help="Questions in one call of a model.", min=1)] = 16,
    video_root: VideoRoot = None,
    share: Share = None,
    device: Device = "auto",
    dtype: Dtype = None,
    threads: Threads = 0,
    max_row: MaxRow = Limits.row,
    json: Json = None,
) -> None:
    """Leave out questions that a model answers without seeing the video: they teach nothing of its tokens.

    Answers are kept in TARGET.blind, 32 questions at a time: the same command resumes there, with --share or torchrun
    in several processes at once, and asks nothing again when only --rule or --right-in changes.
    """
    names = model or [named_model(None)]
    check_output(json, reads=(source,))
    check_output(target, (".jsonl",), reads=(source,))
    mine, work = parse_share(share), beside(target, "blind")
    check_free(shard_path(work, mine))
    set_threads(threads)
    from vidsieve.training.data.filtering import Rule, filter_file
    from vidsieve.training.data.skipped import Skipped

    if rule not in get_args(Rule):
        raise UnknownNameError("rule", rule, get_args(Rule))
    quiet()
    skipped = Skipped()
    with stoppable(work), Bar("answers") as update:
        result = filter_file(
            source,
            target,
            [partial(load_model, name, dtype=dtype, device=device) for name in names],
            rule,  # type: ignore[arg-type]
            root=video_root,
            seeds=seeds,
            right_in=right_in,
            temperature=temperature,
            batch=batch,
            work=work,
            names=names,
            share=mine,
            skipped=skipped,
            progress=update,
        )
    if result is None:
        err.print(f"share {mine[0] + 1} of {mine[1]} is done; the last one to end writes {target}", highlight=False)
        return
    columns = ("source", "type", "questions", "dropped", *(f"{name}, blind" for name in names))
    lines = []
    for group in result.groups:
        accuracies = map(percent, group["blind_accuracy"])
        numbers = (f"{group['questions']:,}", f"{group['dropped']:,}", *accuracies)
        lines.append((escape(group["source"] or "–"), escape(group["type"]), *numbers))
    out.print(table(f"{source}: without the video", columns, lines, right=range(2, len(columns))))
    for name, accuracy in zip(names, result.blind_accuracy, strict=True):
        out.print(
            f"{name}: {percent(accuracy)} of blind answers are correct, guessing would come to {percent(result.chance)}"
        )
    out.print(
        f"{result.kept:,} of {result.questions:,} questions are kept in {target}; "
        f"the others are in {beside(target, 'dropped.jsonl')}",
        highlight=False,
    )
    if seeds == 1 and result.chance > 0.05:
        lost = percent(result.chance)
        note(f"with one answer each, guesses drop about {lost} of the good questions too; try --seeds 3")
    if result.captions or result.others:
        out.print(
            f"kept as they are: {result.captions:,} rows with captions, {result.others:,} questions of other kinds"
        )
    _print_skipped(skipped)
    settings = {"models": names, "rule": rule, "seeds": seeds, "right_in": right_in}
    write_json(json, vars(result) | counts_of(skipped) | settings)


@app.command("merge")
def merge(
    sources: Annotated[
        list[Path], typer.Argument(help="Files of prompts, as `vidsieve data check` reads them; the last is written.")
    ],
    only: Annotated[str, typer.Option(help="'captions', 'questions', or 'all' rows.")] = "all",
    count: Annotated[
        int | None, typer.Option(help="Rows in all, drawn from all files together.", min=1, show_default="every row")
    ] = None,
    seed: Annotated[int, typer.Option(help="The same seed draws the same rows.", min=0)] = 0,
    video_root: Annotated[
        list[Path] | None,
        typer.Option(
            help="Folder that paths start from, once for each file; default: that of each.",
            show_default=False,
        ),
    ] = None,
    max_row: MaxRow = Limits.row,
    json: Json = None,
) -> None:
    """Write one file of prompts from several, whatever their layouts: vidsieve data merge A.json B.csv OUT.jsonl."""
    *files, target = sources
    roots = [*video_root] if video_root else [None] * len(files)
    if not files or len(roots) != len(files):
        raise TrainingError("name the files to merge and, last, the one to write; --video-root once for each, or never")
    check_output(json, reads=files)
    check_output(target, (".jsonl",), reads=files)
    from vidsieve.training.data.merging import Only, merge_files
    from vidsieve.training.data.skipped import Skipped

    if only not in get_args(Only):
        raise UnknownNameError("kind of row", only, get_args(Only))
    skipped, places = Skipped(), list(zip(files, roots, strict=True))
    with Bar("records", None) as update:
        rows = merge_files(places, target, only=only, count=count, seed=seed, skipped=skipped, progress=update)  # type: ignore[arg-type]
    for name, number in rows.items():
        say(f"{number:,} rows of {name}")
    _print_skipped(skipped)
    say(f"{sum(rows.values()):,} rows are in {target}")
    write_json(json, {"rows": rows, "seed": seed} | counts_of(skipped))


@app.command("pseudo")
def pseudo_videos(
    sources: Annotated[
        list[Path],
        typer.Argument(
            help='Captioned images (LLaVA-OneVision, or JSON lines of "image", "caption"); last, the target.'
        ),
    ],
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
    image_root: Annotated[
        Path | None,
        typer.Option(help="Folder that paths in SOURCE start from; default: that of the file.", show_default=False),
    ] = None,
    max_row: MaxRow = Limits.row,
    json: Json = None,
) -> None:
    """Make pseudo-videos of captioned images, for the first stage of SCORE: vidsieve data pseudo IMAGES OUT.jsonl."""
    *files, target = sources
    if not files:
        raise TrainingError("name the file of captioned images and, last, the one to write")
    for path, kinds in ((json, ()), (target, (".jsonl",)), (preview, PICTURES)):
        check_output(path, kinds, reads=files)
    from vidsieve.training.data.pseudo import pseudo_file

    bounds = {"images": _bounds("images", images), "frames": _bounds("frames", frames)}
    with Bar("records", None) as update:
        pseudo = pseudo_file(files, target, root=image_root, count=count, seed=seed, progress=update, **bounds)
    result: dict[str, Any] = pseudo.as_dict()
    length = f"{result['frames']['min']} to {result['frames']['max']}"
    out.print(f"{result['videos']} pseudo-videos of {length} frames from {pseudo.images} images are in {target}")
    for reason, number in result["skipped"].items():
        first = [row for row in pseudo.left_out if row.reason == reason][:3]
        lines = ", ".join(f"record {row.record}" + (f" ({row.image})" if row.image else "") for row in first)
        out.print(f"left out: {number} × {reason}: {lines}{', …' if number > len(first) else ''}", markup=False)
    if preview is not None:
        from vidsieve.report.pictures import contact_sheet
        from vidsieve.video.reading import read_frames

        shown = pseudo.videos[:6]
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
