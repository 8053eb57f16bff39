"""Scenes as ordinary files: mp4 videos, and their questions and captions as JSON lines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from vidsieve.data.video import write_video
from vidsieve.files import writing
from vidsieve.testbed.questions import make_caption, make_questions
from vidsieve.testbed.world import FRAMES, make_cast, render

FPS = 4.0
"""Frame rate of written scenes: four seconds each, slow enough to watch."""


def write_scene(path: Path, *, world: str, seed: int, index: int) -> None:
    """Write scene `index` as an mp4 file.

    Raises
    ------
    OutputError
        If the file cannot be written.
    """
    write_video(path, render(make_cast(world, seed, index), seed, index), FPS)


def write_scenes(folder: Path, *, world: str, seed: int, scenes: int) -> dict[str, Any]:
    """Write scenes as ``scene-0000.mp4`` … and ``questions.jsonl``; return how many of what.

    A line has ``video, question, options, answer, kind``, or ``video, caption``: what `vidsieve train` reads.

    Raises
    ------
    OutputError
        If the folder cannot be written.
    """
    lines: list[dict[str, Any]] = []
    for index in range(scenes):
        name = f"scene-{index:04d}.mp4"
        write_scene(folder / name, world=world, seed=seed, index=index)
        cast = make_cast(world, seed, index)
        for question in make_questions(cast, seed, index):
            lines.append({
                "video": name, "question": question.text, "options": list(question.options),
                "answer": question.answer, "kind": question.kind,
            })  # fmt: skip
        lines.append({"video": name, "caption": make_caption(cast)})
    with writing(folder / "questions.jsonl") as temporary:
        temporary.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return {
        "world": world, "seed": seed, "scenes": scenes, "frames": FRAMES,
        "questions": sum("question" in line for line in lines),
    }  # fmt: skip
