"""`vidsieve ask`: one question about one video, under one method or several."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from vidsieve import registry
from vidsieve.cli import options, output, shared
from vidsieve.cli.progress import Bar
from vidsieve.errors import OutputError, VideoError
from vidsieve.io.limits import Limits
from vidsieve.io.texts import percent
from vidsieve.retention import parse_budget
from vidsieve.video import check_file

if TYPE_CHECKING:
    from vidsieve.answering import Clock
    from vidsieve.compressors.base import Compressor
    from vidsieve.evaluation.contributions import Contributions
    from vidsieve.report.page import Section
    from vidsieve.types import TokenGrid
    from vidsieve.video.reading import Video


def ask(
    video: Annotated[Path, typer.Argument(help="A video file.")],
    question: Annotated[str, typer.Argument(help="What to ask.")],
    model: options.Model = None,
    method: Annotated[
        str,
        typer.Option(
            "--methods",
            "--method",
            help="Method (vidsieve list), name:variant, policy or 'full'; several, or 'all': compared.",
        ),
    ] = "divprune",
    policy: Annotated[
        str | None,
        typer.Option(help="Folder of the policy, or OWNER/NAME on the hub; 'testbed' for ours.", show_default=False),
    ] = None,
    retention: Annotated[str | None, options.retention_option("0.25")] = None,
    tokens: options.TokensKept = None,
    earliest: options.Earliest = False,
    max_pixels: options.MaxPixels = Limits.pixels,
    frames: options.Frames = None,
    fps: options.Fps = None,
    layout: options.Layout = None,
    positions: options.Positions = None,
    device: options.Device = "auto",
    dtype: options.Dtype = None,
    max_new_tokens: options.NewTokens = 64,
    against: Annotated[
        bool, typer.Option("--against", help="Of one method: show the answer and the times with all tokens too.")
    ] = False,
    repeats: Annotated[
        int | None,
        typer.Option(help="Of several methods: timed rounds, after one warm-up.", min=1, show_default="3"),
    ] = None,
    picture: Annotated[
        Path | None,
        typer.Option(
            help=f"Write a picture of the kept tokens here: {', '.join(output.PICTURES)}.", show_default=False
        ),
    ] = None,
    overlay: Annotated[
        Path | None,
        typer.Option(help="Write the frames with kept tokens highlighted here, as an mp4.", show_default=False),
    ] = None,
    contributions: Annotated[
        int,
        typer.Option(
            help="In the report, measure each token's contribution to the answer, on N random subsets.",
            min=0,
        ),
    ] = 0,
    seed: options.Seed = 0,
    threads: options.Threads = 0,
    report: options.Report = None,
    figures: options.Figures = None,
    json: options.Json = None,
) -> None:
    """Ask a question about a video; show what each method kept and where the time went."""
    if not os.path.exists(video) and os.path.isfile(question):
        raise VideoError(f"'{video}' does not exist, and the question is a file: the video comes first")
    check_file(video)
    amount = parse_budget(options.budget_asked(retention, tokens) or "0.25")
    options.check_question(question)
    output.check_output(json, reads=[video])
    output.check_output(picture, output.PICTURES, [video])
    output.check_output(overlay, output.MOVIE, [video])
    output.check_output(report, output.PAGE, [video])
    names = options.words(method)
    for name in names:
        registry.check_known(name)
    several = len(names) > 1 or names == ["all"]
    for option, value in (("--policy", policy), ("--contributions", contributions)):
        if several and value:
            raise OutputError(f"{option} is for one method, and --methods names several: leave {option} out")
    if repeats is not None and not several:
        raise OutputError("--repeats is for several methods, and --methods names one: leave --repeats out")
    if against and (several or method == "full"):
        whole = "several are compared with all tokens anyway" if several else "'full' keeps all tokens"
        raise OutputError(f"--against is for one method, and {whole}: leave --against out")
    for option, path in (("--picture", picture), ("--overlay", overlay)):
        if method == "full" and path is not None:
            raise OutputError(f"{option} shows what a method kept, and 'full' keeps all: leave {option} out")
    if contributions and report is None and figures is None:
        raise OutputError("--contributions are drawn in the report: give --report out.html too")
    shared.set_threads(threads)
    from vidsieve import answering, loading
    from vidsieve.evaluation.conditions import known_fields, method_for, named_methods
    from vidsieve.testbed.files import is_scene, toy_warning

    shared.quiet()
    clock = answering.Clock()
    reading = options.frames_asked(frames, fps)
    loaded = None if reading is None else answering.read(video, clock, **reading)
    model = options.named_model(model or ("testbed" if loaded is not None and is_scene(loaded) else None))
    chosen: dict[str, Compressor] = {}
    if several:
        chosen = named_methods(names, model, earliest=earliest)
    elif method != "full":
        chosen = {method: method_for(method, model, policy, **known_fields(method, earliest=earliest))}
    chosen = {name: one.with_retention(amount) for name, one in chosen.items()}
    network, processor = shared.load_model(model, layout, dtype, device, positions)
    if loaded is None:
        planned = options.frames_by_rule(str(frames), fps, list(chosen.values()), network)
        loaded = answering.read(video, clock, **planned)
    notes = list(loaded.notes)
    if loading.is_testbed(model) and (warning := toy_warning(loaded, question, processor)):
        notes.append(warning)
    for note in notes:
        output.note(note)
    request = AskRequest(network, processor, loaded, question, max_new_tokens, seed)
    if several:
        result, kept, sections = _compared(request, chosen, repeats or 3)
    else:
        result, kept, sections = _answered(request, next(iter(chosen.values()), None), clock, contributions, against)
    if kept is not None:
        grid, indices = kept
        output.write_pictures(loaded, grid, indices, question, picture, overlay)
    elif picture is not None:
        output.out.print("picture: none, as no method of the list could run")
    about = {"device": str(network.device), "dtype": str(network.dtype).removeprefix("torch.")}
    lead = "\n".join([f"video {video.name}, model {model}, {', '.join(about.values())}", *notes])
    output.write_report(report, question, sections, lead, figures)
    asked = {
        "video": str(video),
        "question": question,
        "model": model,
        "frames": len(loaded.pixels),
        **about,
        "notes": notes,
    }
    output.write_json(json, result | asked)


@dataclass(frozen=True)
class AskRequest:
    """A question about a video, to a model."""

    model: Any
    processor: Any
    video: Video
    question: str
    max_new_tokens: int
    seed: int


KeptTokens = tuple["TokenGrid", Mapping[str, Sequence[int]]]
Outcome = tuple[dict[str, Any], KeptTokens | None, Callable[[], "list[Section]"]]
"""The result for JSON, the indices that methods keep of a grid, and the sections of the page."""


def _answered(
    request: AskRequest, method: Compressor | None, clock: Clock, contributions: int, against: bool
) -> Outcome:
    """Ask under one method, and print its answer, with `against` that from all tokens too."""
    from vidsieve import answering
    from vidsieve.report.sections import answer_sections

    def asked(method: Compressor | None, clock: Clock) -> answering.Answer:
        return answering.answer(
            request.model,
            request.processor,
            request.video,
            request.question,
            method,
            max_new_tokens=request.max_new_tokens,
            seed=request.seed,
            clock=clock,
        )

    def spent(ms: Mapping[str, float]) -> dict[str, float]:
        parts = {part: ms.get(part, 0.0) for part in answering.PARTS}
        return {**parts, "total": sum(parts.values())}

    def times(ms: Mapping[str, float]) -> str:
        return "ms: " + "  ".join(f"{part} {one:.1f}" for part, one in spent(ms).items())

    reading = dict(clock.ms)
    result = asked(method, clock)
    output.out.print(f"[bold]{escape(result.text)}[/]", highlight=False)
    if not result.text:
        output.note("the answer is empty, the model ended it at once")
    before, after = result.prompt_tokens
    kept = ", ".join(
        f"{t.kept} of {t.total} video tokens ({percent(t.real_retention)}){t.inside}{t.before}" for t in result.traces
    )
    output.out.print(f"{result.method}: {kept or 'all video tokens'}; prompt {before} → {after} tokens")
    output.out.print(times(result.ms), highlight=False)
    further = {}
    if against:
        whole = asked(None, answering.Clock(reading))
        output.out.print(f"against all tokens: [bold]{escape(whole.text)}[/]; {times(whole.ms)}", highlight=False)
        further["against"] = whole.as_dict() | {"ms": spent(whole.ms)}
    measured = _contributions(request, contributions) if contributions else None
    given = result.scores[0] if result.scores else None
    scores = None if given is None else given.float().cpu().numpy()
    shown = (result.traces[0].grid, {result.method: result.traces[0].indices}) if result.traces else None
    return (
        result.as_dict() | {"ms": spent(result.ms)} | further,
        shown,
        lambda: answer_sections(request.video, request.question, result.as_dict(), scores, answering.PARTS, measured),
    )


def _compared(request: AskRequest, methods: Mapping[str, Compressor], repeats: int) -> Outcome:
    """Ask under several methods in turns, and print what each keeps, answers and costs."""
    from vidsieve.adapters.pruning import adapter_for
    from vidsieve.answering import chat
    from vidsieve.evaluation.conditions import Condition, label_of
    from vidsieve.evaluation.tasks.timing import ComparingTask
    from vidsieve.report.sections import comparison_sections
    from vidsieve.types import TokenGrid

    task = ComparingTask(
        adapter=adapter_for(request.model),
        source=request.video,
        lengths=[len(request.video.pixels)],
        prompts=lambda video: chat(request.processor, video, request.question),
        repeats=repeats,
        new_tokens=request.max_new_tokens,
        seed=request.seed,
        processor=request.processor,
    )
    conditions = [Condition(), *(Condition(method, label=label_of(name)) for name, method in methods.items())]
    table = shared.run_task(task, conditions, "rounds")
    result = table.to_json()
    shown = {row["name"]: row["indices"] for row in result["rows"] if row["indices"] is not None}
    kept = (TokenGrid(*result["grid"]), shown) if shown else None
    return result, kept, lambda: comparison_sections(request.video, request.question, table, task.scores)


def _contributions(request: AskRequest, subsets: int) -> Contributions:
    from vidsieve.adapters.pruning import adapter_for
    from vidsieve.answering import chat
    from vidsieve.evaluation.contributions import contributions

    inputs = chat(request.processor, request.video, request.question)
    with Bar("subsets", subsets) as advance:
        return contributions(adapter_for(request.model), inputs, subsets=subsets, seed=request.seed, progress=advance)
