"""vidsieve testbed: scenes of the synthetic world as files."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from vidsieve.cli.options import Json
from vidsieve.cli.output import check_output, out, write_json
from vidsieve.cli.progress import Bar
from vidsieve.errors import OutputError
from vidsieve.io.files import locked

app = typer.Typer(no_args_is_help=True, help="Scenes of the synthetic world, with their questions, as files.")


@app.callback()
def _scenes() -> None:
    """Scenes of the synthetic world, with their questions, as files."""


@app.command()
def render(
    folder: Annotated[Path, typer.Argument(help="Where the videos go, and the file of their questions and captions.")],
    scenes: Annotated[int, typer.Option(help="How many scenes.", min=1)] = 4,
    seed: Annotated[int, typer.Option(help="Seed of the scenes.")] = 7,
    world: Annotated[str, typer.Option(help="dense, dense-b, sparse or sparse-b.")] = "dense",
    layout: Annotated[
        str,
        typer.Option(
            "--format",
            help="vidsieve, video-r1, llava-video, koala-36m, llava-onevision (Parquet) or llava-images.",
        ),
    ] = "vidsieve",
    frames: Annotated[
        int, typer.Option(help="Frames of a video; of more than 16 few matter: the scene is spread over them.", min=16)
    ] = 16,
    broken: Annotated[
        float, typer.Option(help="Share of videos that are missing, cut short or damaged; truth.json says which.")
    ] = 0.0,
    leaked: Annotated[float, typer.Option(help="Share of questions that need no video; truth.json says which.")] = 0.0,
    json: Json = None,
) -> None:
    """Write scenes as mp4 files, with their questions and captions as JSON lines, or as a published set has them."""
    check_output(json)
    check_output(folder / "questions.jsonl")
    from vidsieve.testbed.files import write_scenes
    from vidsieve.testbed.world import world_of

    world_of(world)
    with locked(folder):
        if os.path.isdir(folder) and os.listdir(folder):  # its clips would stay among the new ones
            raise OutputError(f"{folder} is not empty: name a new folder, or remove this one")
        with Bar("scenes", scenes) as advance:
            summary = write_scenes(
                folder,
                world=world,
                seed=seed,
                scenes=scenes,
                layout=layout,
                broken=broken,
                leaked=leaked,
                frames=frames,
                progress=advance,
            )
    out.print(f"{scenes} scene{'s' * (scenes != 1)}, {summary['questions']} questions in {folder}")
    for name in summary.get("files", []):
        out.print(f"look at it: vidsieve data check {folder / name}", highlight=False, soft_wrap=True)
    write_json(json, summary)
