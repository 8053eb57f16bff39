"""JSON lines of vidsieve's own, one row a line.

``{"video": path, "question": …, "options": […], "answer": …}`` or ``{"video": path, "caption": …}``, with a
``"prompt"`` if captions are not asked for by the usual one. A caption may have still images in place of a video,
``"frames": [[path, times], …]`` (a pseudo-video of one frame a second that shows each `times` times), or one
``"image"``, of which pseudo-videos are made. ``"problem_type"`` names another kind of question than multiple choice,
``"source"`` the set that a row was taken from. A multiple-choice question may come without ``"answer"``: then only
`sieve` and reward "agreement" can use it. Fields of other names are kept as they are.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Annotated, Any

import msgspec

from vidsieve.options import OptionsError
from vidsieve.training.data.layouts import Layout, Name, Rows, Text, Words, checked
from vidsieve.training.data.reading import MalformedError
from vidsieve.training.data.rows import Kind, labelled, options_of

_NEEDED = "a row needs video, and caption or question and options; or frames or image, and caption"


class _Video(msgspec.Struct):
    video: Name
    caption: Text | msgspec.UnsetType = msgspec.UNSET
    prompt: Words | msgspec.UnsetType = msgspec.UNSET


class _Frames(msgspec.Struct):
    frames: Annotated[list[tuple[Name, Annotated[int, msgspec.Meta(ge=1, le=10_000)]]], msgspec.Meta(min_length=1)]
    caption: Text


class _Image(msgspec.Struct):
    image: Name
    caption: Text


class _Asked(msgspec.Struct):
    question: Text
    answer: Words | int | float | bool | msgspec.UnsetType = msgspec.UNSET
    problem_type: Kind = "multiple choice"


class _Options(_Asked, kw_only=True):
    options: list[Words | int | float | bool]


_SHOWN: dict[str, type[msgspec.Struct]] = {"video": _Video, "frames": _Frames, "image": _Image}


def _matches(record: dict[str, Any]) -> bool:
    return bool({"video", "frames", "image", "question", "caption"} & record.keys())


def _rows(record: Any, folder: Path, file: Path) -> Rows:
    if not isinstance(record, dict) or not _SHOWN.keys() & record.keys() or not {"caption", "question"} & record.keys():
        raise MalformedError(_NEEDED)
    shown, *others = [name for name in (*_SHOWN, "question") if name in record]
    if others and (others != ["question"] or shown == "image"):
        raise MalformedError(f"{shown} and {others[0]} do not go together")
    checked(record, _SHOWN[shown])
    asked = checked(record, _Asked) if "question" in record else None
    if asked is not None and isinstance(asked.answer, float) and not math.isfinite(asked.answer):
        raise MalformedError(f"answer: must be finite, got {asked.answer}")
    if asked is not None and asked.problem_type == "multiple choice":
        checked(record, _Options)
        try:
            options = options_of(record)
            if labelled(record):
                options.index(str(record["answer"]))
        except OptionsError as error:
            raise MalformedError(str(error)) from None
    elif not labelled(record):
        raise MalformedError("answer: is missing, and only a multiple-choice question can do without")
    if file.suffix == ".parquet":
        try:
            json.dumps(record)
        except TypeError as error:
            raise MalformedError(error) from None
    if shown == "frames":
        return [record | {"frames": [[str(folder / name), times] for name, times in record["frames"]]}], {}
    return [record | {shown: str(folder / record[shown])}], {}


LAYOUT = Layout("vidsieve", "JSON lines of vidsieve's own", _matches, _rows)
