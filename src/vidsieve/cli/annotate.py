"""vidsieve data annotate: captions written anew by a teacher behind an OpenAI-compatible server."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vidsieve.cli.progress import Bar
from vidsieve.cli.shared import Json, check_output, err, out, write_json
from vidsieve.errors import TrainingError

if TYPE_CHECKING:
    from vidsieve.training.data.teaching.annotating import AnnotationPlan, AnnotationReport
    from vidsieve.training.data.teaching.captions import Captions
    from vidsieve.training.data.teaching.teacher import Prices


def annotate(
    source: Annotated[Path, typer.Argument(help="Rows with captions, in any layout that is read for training.")],
    target: Annotated[Path, typer.Argument(help="Where the rows go, as JSON lines; OUT.journal.jsonl is beside it.")],
    base_url: Annotated[str, typer.Option(help="The server's address, as http://localhost:8000/v1.")],
    model: Annotated[str, typer.Option(help="The model's name on that server.")],
    prompt: Annotated[
        str | None,
        typer.Option(
            help="What the teacher is asked; {caption} becomes the old caption.", show_default="a dense description"
        ),
    ] = None,
    prompt_file: Annotated[Path | None, typer.Option(help="A file that holds the prompt.", show_default=False)] = None,
    frames: Annotated[int, typer.Option(help="Frames shown, evenly from the video.", min=1)] = 16,
    size: Annotated[int, typer.Option(help="Longest side of a frame in pixels.", min=28)] = 448,
    max_tokens: Annotated[int, typer.Option(help="Longest answer; one cut off there is set aside.", min=1)] = 1024,
    temperature: Annotated[float, typer.Option(help="Temperature of the answers.", min=0.0)] = 0.2,
    min_words: Annotated[int, typer.Option(help="Answers of fewer words are set aside.", min=1)] = 8,
    concurrency: Annotated[int, typer.Option(help="Rows in work at a time.", min=1)] = 8,
    rate: Annotated[
        int | None, typer.Option(help="Requests started in any minute.", min=1, show_default="no limit")
    ] = None,
    retries: Annotated[int, typer.Option(help="Repeats of a request that brought no answer.", min=0)] = 5,
    timeout: Annotated[float, typer.Option(help="Seconds after which a request is given up.", min=0.1)] = 120.0,
    price_in: Annotated[
        float | None, typer.Option(help="US$ for a million tokens in.", min=0.0, show_default=False)
    ] = None,
    price_out: Annotated[
        float | None, typer.Option(help="US$ for a million tokens out.", min=0.0, show_default=False)
    ] = None,
    budget: Annotated[
        float | None,
        typer.Option(help="US$; nothing is sent once all runs cost this much.", min=0.0, show_default=False),
    ] = None,
    estimate: Annotated[bool, typer.Option("--estimate", help="Say what it would cost at most, and stop.")] = False,
    limit: Annotated[
        int | None, typer.Option(help="Ask about so many rows in this run.", min=1, show_default="all")
    ] = None,
    again: Annotated[
        bool, typer.Option("--again", help="Ask again about rows set aside without an answer: they cost nothing.")
    ] = False,
    video_root: Annotated[
        Path | None, typer.Option(help="Folder that the rows' paths start from.", show_default="that of the file")
    ] = None,
    json: Json = None,
) -> None:
    """Have captions written anew by a teacher behind any OpenAI-compatible server, as SCORE's data were.

    The key is read from OPENAI_API_KEY. What was asked and answered is in OUT.journal.jsonl: the same command goes on
    where a run was stopped or killed, and asks about nothing twice that was answered. OUT is written when all rows are
    accounted for, with those set aside, and why, in OUT.aside.jsonl.
    """
    from vidsieve.training.data.teaching.annotating import annotate_file, plan_file
    from vidsieve.training.data.teaching.asking import Server
    from vidsieve.training.data.teaching.captions import Captions
    from vidsieve.training.data.teaching.teacher import PROMPT, Teacher, api_key, check_url

    prices = _prices(price_in, price_out)
    if budget is not None and prices is None:
        raise TrainingError("--budget needs --price-in and --price-out")
    text = _prompt(prompt, prompt_file) or PROMPT
    teacher = Teacher(model, text, frames, size, max_tokens, temperature, min_words)
    server = Server(check_url(base_url), concurrency, rate, retries, timeout, prices, budget)
    captions = Captions(source, target, teacher, video_root)
    for path in (target, captions.beside("journal"), captions.beside("aside"), json):
        check_output(path, reads=[source])
    api_key()
    plan = plan_file(source, target, teacher, root=video_root, prices=prices, again=again)
    _print_plan(plan, limit)
    if estimate:
        write_json(json, {"estimate": asdict(plan)})
        return
    try:
        total = plan.requests if limit is None else min(limit, plan.requests)
        with Bar("rows", total) as update:
            report = annotate_file(
                source,
                target,
                teacher,
                server,
                root=video_root,
                limit=limit,
                again=again,
                progress=lambda done: update(done, total),
                note=lambda said: err.print(said, soft_wrap=True),
            )
    except KeyboardInterrupt:
        err.print("stopped; what was answered is in the journal: the same command goes on from there", soft_wrap=True)
        raise typer.Exit(130) from None
    _print_report(report, captions, model)
    write_json(json, {"estimate": asdict(plan), "model": model} | asdict(report))
    if report.stopped == "interrupted":
        raise typer.Exit(130)


def _prices(tokens_in: float | None, tokens_out: float | None) -> Prices | None:
    from vidsieve.training.data.teaching.teacher import Prices

    if tokens_in is None and tokens_out is None:
        return None
    if tokens_in is None or tokens_out is None:
        raise TrainingError("--price-in and --price-out go together")
    return Prices(tokens_in, tokens_out)


def _prompt(text: str | None, path: Path | None) -> str | None:
    """Return the prompt that was given; None where none was."""
    if text is not None and path is not None:
        raise TrainingError("give one of --prompt and --prompt-file")
    if path is not None:
        try:
            text = path.read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise TrainingError(f"cannot read {path}: {error}") from None
    if text is not None and not text.strip():
        raise TrainingError("the prompt is empty: write what the teacher is to describe")
    return text.strip() if text is not None else None


def _print_plan(plan: AnnotationPlan, limit: int | None) -> None:
    others = [(plan.unchanged, "have no caption"), (plan.settled, "are done"), (plan.faulty, "cannot be asked about")]
    said = "".join(f", {count:,} {what}" for count, what in others if count)
    out.print(f"{plan.rows:,} rows: {plan.requests:,} to ask about{said}")
    cost = f": US${plan.dollars:,.2f}" if plan.dollars is not None else "; their cost with --price-in and --price-out"
    out.print(
        f"at most {plan.images:,} images, {plan.tokens_in:,} tokens in and {plan.tokens_out:,} out{cost}"
        f"{f' (this run takes {limit:,} rows of it)' if limit is not None and limit < plan.requests else ''}",
        soft_wrap=True,
    )


def _print_report(report: AnnotationReport, captions: Captions, model: str) -> None:
    out.print(f"{report.rewritten:,} of {report.rows:,} rows rewritten by {model}", markup=False)
    if report.unchanged:
        out.print(f"{report.unchanged:,} without a caption unchanged")
    if report.aside:
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in sorted(report.aside.items()))
        out.print(f"{sum(report.aside.values()):,} set aside: {reasons}")
    for reason, count in report.left_out.items():
        out.print(f"left out: {count:,} × {reason}", markup=False)
    cost = f": US${report.dollars:,.4f}" if report.dollars is not None else ""
    counted = f" ({report.unmetered:,} answers told no number: counted at most)" if report.unmetered else ""
    out.print(
        f"{report.requests:,} requests in all runs, {report.retries:,} of them retries; {report.tokens_in:,} tokens in "
        f"and {report.tokens_out:,} out{cost}{counted}",
        soft_wrap=True,
    )
    journal, aside = captions.beside("journal"), captions.beside("aside")
    if report.left:
        known = {"interrupted": "stopped", "budget": "the budget is spent", "limit": "the limit is reached"}
        why = known.get(report.stopped, "their videos came meanwhile")
        more = "; give a larger --budget" if report.stopped == "budget" else ""
        out.print(
            f"{report.left:,} rows are left ({why}), so {captions.target} is not written yet: the same "
            f"command goes on from {journal}{more}",
            soft_wrap=True,
            markup=False,
        )
        return
    listed = f", those set aside in {aside}" if report.aside else ""
    out.print(f"the rows are in {captions.target}{listed}", soft_wrap=True, markup=False)
