"""vidsieve data annotate: captions rewritten by a teacher behind an OpenAI-compatible server."""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from vidsieve.cli.options import Json, MaxPixels, MaxRow
from vidsieve.cli.output import check_free, check_output, err, out, write_json
from vidsieve.cli.progress import Bar
from vidsieve.errors import TrainingError
from vidsieve.io.bounded import read_bytes
from vidsieve.io.limits import Limits


def annotate(
    source: Annotated[Path, typer.Argument(help="Rows with captions, in any layout that is read for training.")],
    target: Annotated[Path, typer.Argument(help="File of JSON lines to write; with OUT.journal.jsonl.")],
    base_url: Annotated[str, typer.Option(help="The server's address, such as http://localhost:8000/v1.")],
    model: Annotated[str, typer.Option(help="The model's name on that server.")],
    prompt: Annotated[
        str | None,
        typer.Option(
            help="Instruction, or @FILE; {caption} becomes the old caption.", show_default="a dense description"
        ),
    ] = None,
    frames: Annotated[int, typer.Option(help="Frames shown, evenly from the video.", min=1)] = 16,
    max_tokens: Annotated[int, typer.Option(help="Longest answer; one cut off there is set aside.", min=1)] = 1024,
    concurrency: Annotated[int, typer.Option(help="Rows in flight.", min=1)] = 8,
    rate: Annotated[int | None, typer.Option(help="Requests in a minute.", min=1, show_default="no limit")] = None,
    price: Annotated[
        str | None, typer.Option(help="US$ for a million tokens in and out, such as 0.5,1.5.", show_default=False)
    ] = None,
    budget: Annotated[
        float | None, typer.Option(help="US$ that all runs may cost at most; needs --price.", min=0, show_default=False)
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(help="Rows to ask about in this run; 0: only print the cost.", min=0, show_default="all"),
    ] = None,
    again: Annotated[bool, typer.Option("--again", help="Also ask again about rows that got no answer.")] = False,
    video_root: Annotated[
        Path | None, typer.Option(help="Folder that the rows' paths start from.", show_default="that of the file")
    ] = None,
    max_pixels: MaxPixels = Limits.pixels,
    max_row: MaxRow = Limits.row,
    json: Json = None,
) -> None:
    """Have captions rewritten by a teacher behind any OpenAI-compatible server, as SCORE's data were.

    The key is read from OPENAI_API_KEY. Requests and answers are in OUT.journal.jsonl: the same command resumes a run
    that was stopped or killed, and asks about no answered row twice. OUT is written when all rows are accounted for;
    rows set aside, with reasons, are in OUT.aside.jsonl.
    """
    from vidsieve.training.data.annotate import Annotation
    from vidsieve.training.data.teacher import PROMPT, Server, Teacher

    teacher = Teacher(model, _prompt(prompt) or PROMPT, frames, max_tokens=max_tokens)
    server = Server(base_url.rstrip("/"), concurrency, rate, prices=_prices(price), budget=budget)
    job = Annotation(source, target, teacher, server, root=video_root, again=again)
    for path in (target, job.sidecar("journal"), job.sidecar("aside"), json):
        check_output(path, reads=[source])
    if limit != 0:
        check_free(job.sidecar("journal"))
    plan = job.plan()
    cost = server.dollars(plan["tokens_in"], plan["tokens_out"])
    others = {"unchanged": "have no caption", "settled": "are settled", "faulty": "cannot be asked about"}
    counts = "".join(f", {plan[name]:,} {text}" for name, text in others.items() if plan[name])
    out.print(f"{plan['rows']:,} rows: {plan['requests']:,} to ask about{counts}", soft_wrap=True)
    out.print(
        f"at most {plan['images']:,} images, {plan['tokens_in']:,} tokens in and {plan['tokens_out']:,} out: "
        + (f"US${cost:,.2f}" if cost is not None else "for the cost give --price"),
        soft_wrap=True,
    )
    if limit == 0:
        write_json(json, {"estimate": plan | {"dollars": cost}})
        return
    total = plan["requests"] if limit is None else min(limit, plan["requests"])
    try:
        with Bar("rows", total) as update:
            note = partial(err.print, soft_wrap=True, markup=False)
            report = job.run(limit, lambda done: update(done, total), note)
    except KeyboardInterrupt:
        err.print("stopped; answers are in the journal: the same command resumes", soft_wrap=True)
        raise typer.Exit(130) from None
    out.print(f"{report.rewritten:,} of {report.rows:,} rows rewritten by {model}", markup=False)
    for reason, count in (report.aside | report.left_out).items():
        out.print(f"{'set aside' if reason in report.aside else 'left out'}: {count:,} × {reason}", markup=False)
    out.print(
        f"{report.requests:,} request{'s' * (report.requests != 1)}, {report.tokens_in:,} tokens in and "
        f"{report.tokens_out:,} out in all runs"
        + (f": US${report.dollars:,.4f}" if report.dollars is not None else "")
        + (f" ({report.unmetered:,} requests counted at most)" if report.unmetered else ""),
        soft_wrap=True,
    )
    left = f"{report.left:,} rows are left ({report.stopped or 'videos came meanwhile'}): the same command resumes"
    out.print(left if report.left else f"the rows are in {target}", soft_wrap=True, markup=False)
    write_json(json, {"estimate": plan | {"dollars": cost}, "model": model} | asdict(report))
    if report.stopped == "interrupted":
        raise typer.Exit(130)


def _prices(text: str | None) -> tuple[float, float] | None:
    try:
        tokens_in, tokens_out = map(float, text.split(",")) if text else (0.0, 0.0)
    except ValueError:
        raise TrainingError(f"--price is two numbers, such as 0.5,1.5; got {text!r}") from None
    if not (0 <= tokens_in < float("inf") and 0 <= tokens_out < float("inf")):
        raise TrainingError(f"--price must be 0 or more, got {text!r}")
    return (tokens_in, tokens_out) if text else None


def _prompt(text: str | None) -> str | None:
    if text is not None and text.startswith("@"):
        try:
            text = read_bytes(Path(text[1:]), TrainingError).decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise TrainingError(f"cannot read the prompt {text[1:]}: {error}") from None
    if text is not None and not text.strip():
        raise TrainingError("the prompt is empty: write what the teacher is to describe")
    return text.strip() if text is not None else None
