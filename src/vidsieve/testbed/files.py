"""Scenes as video files, in the layouts of published training sets, with deliberate faults if wanted."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vidsieve.errors import OutputError, TrainingError, UnknownNameError
from vidsieve.io.files import writing
from vidsieve.testbed.long import LongScene
from vidsieve.testbed.pseudo import make_still
from vidsieve.testbed.questions import CAPTION_PROMPT, Question, make_caption, make_questions
from vidsieve.testbed.vocabulary import COLOURS, DIRECTIONS, FIXTURES, PLACES, SHAPES
from vidsieve.testbed.world import FRAMES, SIDE, make_cast, render, scene_rng
from vidsieve.video.reading import Video, write_video

FPS = 4.0
"""Frame rate of written scenes; 16 frames are four seconds."""
CLASSES = (COLOURS, (*SHAPES, *FIXTURES), PLACES, DIRECTIONS)
"""Answer words by type."""


@dataclass(frozen=True)
class SceneFile:
    """A written scene: its number, the path of its video, its questions, and which of these are leaked."""

    index: int
    video: str
    questions: tuple[Question, ...]
    leaked: tuple[bool, ...]
    caption: str


def is_scene(video: Video) -> bool:
    """Return True if a video has the size, length and rate of a scene that `write_scene` writes, or of a longer one."""
    return video.size == (SIDE, SIDE) and video.num_frames >= FRAMES and round(video.fps, 2) == FPS


def toy_warning(video: Video, question: str, processor: Any) -> str:
    """Return why an answer of the testbed's models means nothing; "" for a scene and a question of their world."""
    known = processor.tokenizer.get_vocab()
    words = [word for word in question.split() if word not in known]
    reasons = [] if is_scene(video) else ["this video is no scene of `vidsieve testbed render`"]
    if words:
        reasons.append(f"it does not know {', '.join(map(repr, words[:5]))}")
    if not reasons:
        return ""
    return f"the testbed's model is a toy, and {' and '.join(reasons)}: its answer means nothing; --model names another"


def write_scene(path: Path, *, world: str, seed: int, index: int) -> None:
    """Write scene `index` as an mp4 file.

    Raises
    ------
    OutputError
        If the file cannot be written.
    """
    write_video(path, render(make_cast(world, seed, index), seed, index), FPS)


def write_scenes(
    folder: Path,
    *,
    world: str,
    seed: int,
    scenes: int,
    layout: str = "vidsieve",
    broken: float = 0.0,
    leaked: float = 0.0,
    frames: int = FRAMES,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Write scenes with their questions and captions, and return a summary.

    Parameters
    ----------
    layout : str
        One of `LAYOUTS`: ``vidsieve`` is ``scene-0000.mp4`` … and ``questions.jsonl``, as `vidsieve train` reads it.
    broken : float
        Fraction of videos that are missing, cut short or not a video, a third each; ``truth.json`` lists them.
    leaked : float
        Fraction of questions whose wrong options are of other types, so that they need no video; listed there too.
    frames : int
        Frames of a video; beyond a scene's own 16 it is a `LongScene`.
    progress : callable, optional
        Called with (scenes written, scenes).

    Raises
    ------
    UnknownNameError, TrainingError, OutputError
        If the layout is unknown, a fraction is not in [0, 1], or the folder cannot be written.
    """
    if layout not in LAYOUTS:
        raise UnknownNameError("layout", layout, LAYOUTS)
    for name, fraction in (("broken", broken), ("leaked", leaked)):
        if not 0 <= fraction <= 1:
            raise TrainingError(f"{name} is a fraction from 0 to 1; got {fraction}")
    video_name, write = LAYOUTS[layout]
    with_questions = layout in ("vidsieve", "video-r1", "llava-video")
    if leaked and not with_questions:
        raise TrainingError(f"leaked is about questions, and {layout} has none: leave it out")
    if frames != FRAMES and not with_questions:
        raise TrainingError(f"{layout} has videos of {FRAMES} frames or images: leave frames out")
    written = []
    for index in range(scenes):
        name = video_name(index)
        if name.endswith(".mp4"):
            write_video(folder / name, LongScene(world, seed, index, frames).pixels(), FPS)
        else:
            _write_image(folder / name, make_still(world, seed, index)[1])
        written.append(_scene(world, seed, index, name, leaked, with_questions))
        if progress is not None:
            progress(index + 1, scenes)
    faults = _break(folder, [scene.video for scene in written], broken, seed)
    files = write(folder, written)
    questions = sum(len(scene.questions) for scene in written)
    summary = {"world": world, "seed": seed, "scenes": scenes, "frames": frames, "questions": questions}
    leaks = [
        {"video": scene.video, "question": question.text}
        for scene in written
        for question, is_leaked in zip(scene.questions, scene.leaked, strict=True)
        if is_leaked
    ]
    if broken or leaked or layout != "vidsieve":
        _write_json(
            folder / "truth.json",
            summary | {"layout": layout, "files": files, "broken": faults, "leaked": leaks},
        )
        summary |= {"layout": layout, "files": files, "broken": len(faults), "leaked": len(leaks)}
    return summary


def _scene(world: str, seed: int, index: int, name: str, leaked: float, with_questions: bool) -> SceneFile:
    cast = make_cast(world, seed, index)
    if not name.endswith(".mp4"):
        cast = make_still(world, seed, index)[0]
    questions = make_questions(cast, seed, index) if with_questions else []
    rng = scene_rng(world, seed, index, salt=5)
    chosen = tuple(bool(rng.random() < leaked) for _ in questions)
    questions = [_leaked(question, rng) if leak else question for question, leak in zip(questions, chosen, strict=True)]
    return SceneFile(index, name, tuple(questions), chosen, make_caption(cast))


def _leaked(question: Question, rng: np.random.Generator) -> Question:
    """Return a question whose wrong options are of other types than the answer."""
    others = [word for words in CLASSES if question.answer not in words for word in words]
    wrong = [str(word) for word in rng.permutation(others)[:3]]
    a, b, c, d = (str(word) for word in rng.permutation([question.answer, *wrong]))
    return replace(question, options=(a, b, c, d))


def _break(folder: Path, names: Sequence[str], share: float, seed: int) -> dict[str, str]:
    """Damage some of the files, and return the kind of damage by name."""
    rng = np.random.default_rng([seed, 6])
    chosen = sorted(rng.choice(len(names), round(share * len(names)), replace=False).tolist())
    damage = {}
    for number, which in enumerate(chosen):
        path, kind = folder / names[which], ("missing", "cut short", "no video")[number % 3]
        data = path.read_bytes()
        if kind == "missing":
            path.unlink()
        else:
            path.write_bytes(data[: len(data) // 3] if kind == "cut short" else rng.bytes(len(data)))
        damage[names[which]] = kind
    return damage


def _write_image(path: Path, pixels: Any) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror or error}") from None


def _write_json(path: Path, value: Any) -> None:
    with writing(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


# -- layouts --------------------------------------------------------------------------------------------------


def _vidsieve(folder: Path, scenes: Sequence[SceneFile]) -> list[str]:
    lines: list[dict[str, Any]] = []
    for scene in scenes:
        for question in scene.questions:
            fields = {"video": scene.video, "question": question.text, "options": list(question.options)}
            lines.append(fields | {"answer": question.answer, "kind": question.kind})
        lines.append({"video": scene.video, "caption": scene.caption})
    with writing(folder / "questions.jsonl") as temporary:
        temporary.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return ["questions.jsonl"]


def _lettered(question: Question) -> tuple[list[str], str]:
    """Return the options of a question with letters, and the letter of the answer."""
    options = [f"{letter}. {word}" for letter, word in zip("ABCD", question.options, strict=True)]
    return options, "ABCD"[question.options.index(question.answer)]


def _video_r1(folder: Path, scenes: Sequence[SceneFile]) -> list[str]:
    """Write multiple choice, and per scene one free-form question and one question about an image."""
    records: list[dict[str, Any]] = []

    def add(scene: SceneFile, problem: str, kind: str, options: list[str], answer: str, medium: str = "video") -> None:
        path = scene.video if medium == "video" else f"images/scene-{scene.index:04d}.png"
        records.append(
            {
                "problem_id": len(records),
                "problem": problem,
                "data_type": medium,
                "problem_type": kind,
                "options": options,
                "process": "",
                "solution": f"<answer>{answer}</answer>",
                "path": f"./{path}",
                "data_source": "testbed",
            }
        )

    for scene in scenes:
        for question in scene.questions:
            add(scene, question.text, "multiple choice", *_lettered(question))
        if scene.questions:
            add(scene, scene.questions[0].text, "free-form", [], scene.questions[0].answer)
            add(scene, scene.questions[0].text, "free-form", [], scene.questions[0].answer, "image")
    _write_json(folder / "Video-R1-260k.json", records)
    return ["Video-R1-260k.json"]


_SUBSET = "0_30_s_testbed_v0_1"


def _llava_video(folder: Path, scenes: Sequence[SceneFile]) -> list[str]:
    """Write a file each of captions, multiple choice and open questions, with several turns about a video."""

    def record(scene: SceneFile, turns: Sequence[tuple[str, str]]) -> dict[str, Any]:
        messages = [
            {"from": who, "value": text} for turn in turns for who, text in zip(("human", "gpt"), turn, strict=True)
        ]
        messages[0]["value"] = f"<image>\n{messages[0]['value']}"
        name = Path(scene.video).relative_to(_SUBSET).as_posix()
        return {"id": f"scene-{scene.index:04d}", "conversations": messages, "data_source": _SUBSET, "video": name}

    def choice(question: Question) -> tuple[str, str]:
        options, letter = _lettered(question)
        ask = "Please respond with only the letter of the correct answer."
        return "\n".join([question.text, *options, ask]), f"{letter}. {question.answer}"

    parts = {
        f"{_SUBSET}_cap_processed.json": [record(s, [(CAPTION_PROMPT, s.caption)]) for s in scenes],
        "0_30_s_testbed_mc_v0_1_qa_processed.json": [record(s, [choice(q) for q in s.questions]) for s in scenes],
        "0_30_s_testbed_oe_v0_1_qa_processed.json": [
            record(s, [(q.text, f"{q.answer} .") for q in s.questions[:3]]) for s in scenes
        ],
    }
    for name, records in parts.items():
        _write_json(folder / _SUBSET / name, records)
    return [f"{_SUBSET}/{name}" for name in parts]


def _koala(folder: Path, scenes: Sequence[SceneFile]) -> list[str]:
    columns = ("videoID", "url", "timestamp", "caption", "clarity_score", "aesthetic_score", "motion_score")
    with writing(folder / "Koala_36M_1.csv") as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(columns)
        for scene in scenes:
            span = "['0:00:00.000', '0:00:04.000']"
            rows.writerow([Path(scene.video).stem, "https://example.org/watch", span, scene.caption, 0.9, 4.2, 3.5])
    return ["Koala_36M_1.csv"]


def _image_records(folder: Path, scenes: Sequence[SceneFile], inside: bool) -> list[dict[str, Any]]:
    """Return a captioned image of each scene, and of every fourth one a short question too."""
    records: list[dict[str, Any]] = []
    for scene in scenes:
        path = folder / scene.video
        data = path.read_bytes() if os.path.isfile(path) else b""
        image: Any = {"bytes": data, "path": scene.video} if inside else scene.video
        pairs = [("caption", "Describe the image.", scene.caption), ("vqa", "What is it?", "a scene")]
        for kind, prompt, answer in pairs[: 2 if scene.index % 4 == 0 else 1]:
            turns = [{"from": "human", "value": f"<image>\n{prompt}"}, {"from": "gpt", "value": answer}]
            name = f"{kind}-{scene.index:04d}"
            records.append({"id": name, "image": image, "conversations": turns, "data_source": "testbed"})
    return records


def _llava_images(folder: Path, scenes: Sequence[SceneFile]) -> list[str]:
    _write_json(folder / "images.json", _image_records(folder, scenes, inside=False))
    return ["images.json"]


def _llava_onevision(folder: Path, scenes: Sequence[SceneFile]) -> list[str]:
    try:
        import pyarrow as arrow
        import pyarrow.parquet as parquet
    except ImportError:
        raise OutputError("Parquet needs pyarrow: pip install 'vidsieve[benchmarks]'") from None
    table = arrow.Table.from_pylist(_image_records(folder, scenes, inside=True))
    with writing(folder / "train-00000-of-00001.parquet") as temporary:
        parquet.write_table(table, temporary)
    return ["train-00000-of-00001.parquet"]


Writer = Callable[[Path, Sequence[SceneFile]], list[str]]
LAYOUTS: dict[str, tuple[Callable[[int], str], Writer]] = {
    "vidsieve": (lambda index: f"scene-{index:04d}.mp4", _vidsieve),
    "video-r1": (lambda index: f"testbed/scene-{index:04d}.mp4", _video_r1),
    "llava-video": (lambda index: f"{_SUBSET}/testbed/scene-{index:04d}.mp4", _llava_video),
    "koala-36m": (lambda index: f"clips/scene-{index:04d}_0.mp4", _koala),
    "llava-onevision": (lambda index: f"images/scene-{index:04d}.png", _llava_onevision),
    "llava-images": (lambda index: f"images/scene-{index:04d}.png", _llava_images),
}
"""The path of a scene's video or image, and the writer of the records, by name."""
