"""vidsieve demo: a scene of the testbed, questions about it, and every method, without any download."""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from vidsieve.cli.options import Json, Threads
from vidsieve.cli.output import check_output, err, out, table, write_json
from vidsieve.cli.shared import load_model, quiet, run_task, set_threads
from vidsieve.retention import parse_retention

_EXAMPLES = 3
_METHODS = ("random", "uniform", "downsample", "divprune", "score", "cacovid", "sieve")


def demo(
    folder: Annotated[
        Path | None,
        typer.Option("--out", help="Where the video and the picture go.", show_default="a new temporary folder"),
    ] = None,
    retention: Annotated[str, typer.Option(help="Fraction of video tokens kept.")] = "0.1",
    questions: Annotated[int, typer.Option(help="Questions of the accuracy table.", min=20)] = 240,
    seed: Annotated[int, typer.Option(help="Seed of the scene; the accuracy table has scenes of the next one.")] = 9001,
    threads: Threads = 0,
    json: Json = None,
) -> None:
    """Write a video, ask a trained model about it from a tenth of its tokens, and show what each method kept."""
    amount = parse_retention(retention)
    check_output(json)
    if folder is not None:
        check_output(folder / "scene.mp4")
    set_threads(threads)
    from vidsieve import answering
    from vidsieve.adapters.pruning import adapter_for
    from vidsieve.evaluation.conditions import named_methods
    from vidsieve.evaluation.tasks.testbed import ScenesTask, scene_conditions
    from vidsieve.report.pictures import kept_figure, save
    from vidsieve.testbed.files import write_scene
    from vidsieve.testbed.questions import make_questions
    from vidsieve.testbed.world import FRAMES, make_cast

    quiet()
    place = folder or Path(tempfile.mkdtemp(prefix="vidsieve-demo-"))
    video_path, picture_path = place / "scene.mp4", place / "kept.png"
    write_scene(video_path, world="dense", seed=seed, index=0)
    out.print(f"a fresh scene in {video_path}")
    model, processor = load_model("testbed", device="cpu")
    methods = {name: method.with_retention(amount) for name, method in named_methods(list(_METHODS)).items()}
    examples = make_questions(make_cast("dense", seed, 0), seed, 0)[:_EXAMPLES]
    kept: dict[str, Sequence[int]] = {"what is asked about": examples[0].targets}
    record = []
    warm_up = answering.read(video_path, answering.Clock(), frames=FRAMES, fps=None, max_frames=None)
    first = answering.answer(model, processor, warm_up, examples[0].text, methods["random"], max_new_tokens=4)
    total = first.traces[0].total
    answering.answer(model, processor, warm_up, examples[0].text, max_new_tokens=4)
    columns = ("method", "answer", "tokens", *answering.PARTS)
    for question in examples:
        lines = []
        for method in (None, *methods.values()):
            clock = answering.Clock()
            video = answering.read(video_path, clock, frames=FRAMES, fps=None, max_frames=None)
            reply = answering.answer(model, processor, video, question.text, method, max_new_tokens=4, clock=clock)
            name = "full" if method is None else method.name
            share = ", ".join(f"{t.kept}/{t.total}" for t in reply.traces) or f"{total}/{total}"
            mark = "✓" if reply.text == question.answer else "✗"
            times = (f"{reply.ms.get(part, 0.0):.0f}" for part in answering.PARTS)
            lines.append((name, f"{reply.text} {mark}", share, *times))
            record.append(reply.as_dict() | {"question": question.text, "right_answer": question.answer})
            if method is not None and question is examples[0]:
                kept[f"{name}: {reply.text} {mark}"] = reply.traces[0].indices
                grid = reply.traces[0].grid
        title = f"full against compressed: {escape(question.text)} ({question.answer}); times in ms"
        out.print(table(title, columns, lines, right=range(2, len(columns))))
    title = f"{examples[0].text}  →  {examples[0].answer}"
    save(kept_figure(video.pixels, grid, kept, title), picture_path, dpi=110)
    out.print(f"what each method kept for “{escape(examples[0].text)}”: {picture_path}")
    task = ScenesTask(adapter_for(model), processor, "dense", seed + 1, questions)
    conditions = scene_conditions(methods, [methods["random"].budget_ratio(grid.num_tokens)])
    accuracy = run_task(task, conditions, "fresh scenes")
    out.print("model and policies are toys trained on this synthetic world: they say nothing about real videos")
    called = sys.argv[0] if Path(sys.argv[0]).name == "vidsieve" and shutil.which("vidsieve") is None else "vidsieve"
    out.print(f"next: {called} ask {video_path} {examples[0].text!r}", markup=False, highlight=False, soft_wrap=True)
    write_json(
        json,
        {"video": str(video_path), "picture": str(picture_path), "answers": record, "accuracy": accuracy.to_json()},
    )
    if folder is None:
        err.print(f"files stay in {place}")
