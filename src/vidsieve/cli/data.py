"""vidsieve data: make files of training prompts better."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, get_args

import typer

from vidsieve.cli.evaluate import progress_bar
from vidsieve.cli.shared import Json, Threads, check_output, out, quiet, set_threads, write_json
from vidsieve.errors import OutputError, UnknownNameError

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
    with progress_bar("questions", 1) as update:
        found = filter_file(source, target, [load_model(name) for name in names], rule, progress=update)  # type: ignore[arg-type]
    for name, share in zip(names, found.blind_accuracy, strict=True):
        out.print(f"{name} answers {share:.1%} of {found.questions} questions without the video")
    out.print(f"{found.kept} of {found.questions} questions are left in {target}")
    if found.captions:
        out.print(f"{found.captions} rows without a question were kept as they are")
    write_json(json, vars(found) | {"models": names, "rule": rule})
