"""Rows of a file of training prompts: what our own JSON lines may hold, and how a question is read.

One object a line: ``{"video": path, "question": …, "options": […], "answer": …}`` or ``{"video": path, "caption": …}``,
with a ``"prompt"`` if captions are not asked for by the usual one. Instead of a video a caption may have still images,
``"frames": [[path, times], …]`` (a pseudo-video of one frame a second that shows each `times` times), or one
``"image"``, of which pseudo-videos are made. ``"problem_type"`` names another kind of question than multiple choice
(`KINDS` of `video_r1`), ``"source"`` the set that a row was taken from.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vidsieve.errors import TrainingError
from vidsieve.options import Options, OptionsError
from vidsieve.training.data.layouts import Layout, files_of
from vidsieve.training.data.reading import MalformedError
from vidsieve.training.data.video_r1 import ASKED, KINDS, Kind


@dataclass(frozen=True)
class AskedQuestion:
    """A question as the model reads it: text, next token of each option (options,), the right one, the answer's text.

    Without options `option_ids` is empty and `answer` −1.
    """

    text: str
    option_ids: Tensor
    answer: int
    truth: str
    kind: Kind = "multiple choice"


class Remembered:
    """A tokenizer that splits each text once: options are the same few letters all through a file."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer, self.unk_token_id = tokenizer, getattr(tokenizer, "unk_token_id", None)
        self.known: dict[str, Any] = {}

    def __call__(self, text: str, **options: Any) -> Any:
        """Return what the tokenizer makes of a text."""
        if text not in self.known:
            self.known[text] = self.tokenizer(text, **options)
        return self.known[text]


def options_of(row: Mapping[str, Any]) -> Options:
    """Return the options of a row.

    Raises
    ------
    OptionsError
    """
    return Options.parse([str(option) for option in row["options"]])


def kind_of(row: Mapping[str, Any]) -> str:
    """Return the kind of a row: that of its question, or what is captioned in it, ``"caption"`` or ``"image"``."""
    if "question" in row:
        return str(row.get("problem_type", "multiple choice"))
    return "image" if "image" in row else "caption"


def ask(row: Mapping[str, Any], tokenizer: Any) -> AskedQuestion:
    """Return the question of a row.

    Options are listed and answered by letter where they have letters, and where they are not one token each. Otherwise
    each is answered by its own word, and so are all where the model's vocabulary has no letters (the testbed's).

    Raises
    ------
    TrainingError
        If its answer is none of its options, or no tokens tell them apart.
    """
    kind = kind_of(row)
    if kind != "multiple choice":
        known: Kind = kind  # type: ignore[assignment]
        return AskedQuestion(
            f"{row['question']}\n{ASKED[known]}", torch.empty(0, dtype=torch.int64), -1, str(row["answer"]), known
        )
    name = Path(files_of(row)[0]).name if {"video", "frames"} & row.keys() else "a question"
    try:
        options = options_of(row)
        right = options.index(str(row["answer"]))
    except OptionsError as error:
        raise TrainingError(f"{error} ({name})") from None
    question = str(row["question"])
    letters = _single(tokenizer, options.letters)
    words = None if options.lettered and letters is not None else _single(tokenizer, options.texts)
    if letters is not None and words is None:
        text = "\n".join([question, *options.lines(), ASKED["multiple choice"]])
        return AskedQuestion(text, letters, right, options.letters[right])
    if words is not None:
        return AskedQuestion(question, words, right, options.texts[right])
    raise TrainingError(
        f"options {list(options.texts)} of {name}: neither they nor the letters {', '.join(options.letters)} are one "
        "token each in this model's vocabulary, all different"
    )


def relettered(row: Mapping[str, Any], chance: random.Random) -> dict[str, Any]:
    """Return a row with its options in another order; where they have letters, these stay in theirs."""
    options = options_of(row)
    order = chance.sample(range(len(options.texts)), len(options.texts))
    mixed = replace(options, texts=tuple(options.texts[number] for number in order))
    listed = mixed.lines() if options.lettered else list(mixed.texts)
    return {**row, "options": listed, "answer": listed[order.index(options.index(str(row["answer"])))]}


def _single(tokenizer: Any, words: Sequence[str]) -> Tensor | None:
    """Return the token of each word (n,) int64; None where one is not a token, is unknown, or equals another's."""
    ids = [_ids(tokenizer, word) for word in words]
    unknown = [getattr(tokenizer, "unk_token_id", None)]
    if any(len(tokens) != 1 or tokens == unknown for tokens in ids) or len({*map(tuple, ids)}) < len(ids):
        return None
    return torch.tensor([tokens[0] for tokens in ids])


def _ids(tokenizer: Any, word: str) -> list[int]:
    found: list[int] = tokenizer(word, add_special_tokens=False)["input_ids"]
    return found


def wrong_in(row: Any) -> str:
    """Return what is wrong with a row of JSON lines; empty where nothing is."""
    if not isinstance(row, dict) or not {"video", "frames", "image"} & row.keys():
        return "a row needs video (or frames), and caption or question, options and answer"
    if "image" in row and (
        {"video", "frames", "question"} & row.keys() or not isinstance(row["image"], str) or not row["image"]
    ):
        return "image must be a path, with a caption and nothing else to see or ask"
    if "frames" in row and ("video" in row or "caption" not in row or not _is_frames(row["frames"])):
        return "frames must be [[path, times], …], with a caption and without a video"
    if "video" in row and not (isinstance(row["video"], str) and row["video"]):
        return f"video must be a path, got {row['video']!r}"
    if "caption" in row and not (isinstance(row["caption"], str) and row["caption"].strip()):
        return f"caption must be a text that is not empty, got {row['caption']!r}"
    if "question" not in row:
        return "" if "caption" in row else "a row needs video, and caption or question, options and answer"
    if not isinstance(row["question"], str) or not row["question"].strip():
        return f"question must be a text that is not empty, got {row['question']!r}"
    kind = kind_of(row)
    if kind not in KINDS:
        return f"problem_type is {kind!r}, must be one of {', '.join(KINDS)}"
    needed = ("answer", "options") if kind == "multiple choice" else ("answer",)
    missing = [name for name in needed if name not in row]
    if missing:
        have = ", ".join(sorted(map(str, row)))
        return f"a row needs video, and caption or question, options and answer: {missing[0]} is missing among {have}"
    if kind == "multiple choice":
        if not isinstance(row["options"], list):
            return "options must be a list of two or more"
        try:
            options_of(row).index(str(row["answer"]))
        except OptionsError as error:
            return str(error)
    return ""


def _is_frames(value: Any) -> bool:
    """Return whether a value is [[path, times], …] with at least one image, each shown at least once."""
    return (
        isinstance(value, list)
        and bool(value)
        and all(
            isinstance(pair, list)
            and len(pair) == 2
            and isinstance(pair[0], str)
            and type(pair[1]) is int
            and pair[1] > 0
            for pair in value
        )
    )


def _matches(record: Any) -> bool:
    return isinstance(record, dict) and bool({"video", "frames", "image", "question", "caption"} & record.keys())


def _rows(record: Any, folder: Path, file: Path) -> tuple[list[dict[str, Any]], dict[str, int]]:
    wrong = wrong_in(record)
    if wrong:
        raise MalformedError(wrong)
    if "frames" in record:
        return [record | {"frames": [[str(folder / name), times] for name, times in record["frames"]]}], {}
    shown = "video" if "video" in record else "image"
    return [record | {shown: str(folder / record[shown])}], {}


LAYOUT = Layout("vidsieve", "JSON lines of vidsieve's own", _matches, _rows)
