"""Rows of a file of training prompts: what they may hold, which videos they show, and how a question is read."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vidsieve.data.video_r1 import ASKED, KINDS, Kind, read_video_r1
from vidsieve.errors import TrainingError

_LETTERED = re.compile(r"^\s*\(?([A-Z])[.):]\s*")
_LETTER = re.compile(r"^\(?([A-Za-z])[.):]?$")


@dataclass(frozen=True)
class Asked:
    """A question as the model reads it: text, next token of each option (options,), the right one, the answer's text.

    Without options `option_ids` is empty and `answer` −1.
    """

    text: str
    option_ids: Tensor
    answer: int
    truth: str
    kind: Kind = "multiple choice"


def right_option(options: Sequence[str], answer: str) -> int:
    """Return the number of the option that an answer means; −1 for none.

    Compared without case: the whole option, then its text without the letter, then the letter alone.
    """
    wanted = answer.strip().casefold()
    whole = [option.strip().casefold() for option in options]
    bare = [_LETTERED.sub("", option).strip().casefold() for option in options]
    letters = [match.group(1).casefold() if match else "" for match in map(_LETTERED.match, options)]
    for known, looked_for in ((whole, wanted), (bare, wanted), (letters, _letter(wanted))):
        if looked_for in known and looked_for:
            return known.index(looked_for)
    return -1


def _letter(answer: str) -> str:
    found = _LETTER.match(answer)
    return found.group(1) if found else ""


def kind_of(row: Mapping[str, Any]) -> Kind:
    """Return the kind of a row's question: multiple choice unless it says otherwise."""
    kind: Kind = row.get("problem_type", "multiple choice")
    return kind


def ask(row: Mapping[str, Any], tokenizer: Any) -> Asked:
    """Return the question of a row.

    Raises
    ------
    TrainingError
        If its answer is none of its options, or an option without a letter is not one token.
    """
    kind = kind_of(row)
    if kind != "multiple choice":
        return Asked(
            f"{row['question']}\n{ASKED[kind]}", torch.empty(0, dtype=torch.int64), -1, str(row["answer"]), kind
        )
    options = [str(option) for option in row["options"]]
    right = right_option(options, str(row["answer"]))
    if right < 0:
        raise TrainingError(f"the answer {row['answer']!r} of {files_of(row)[0]} is none of its options {options}")
    letters = [match.group(1) for match in map(_LETTERED.match, options) if match]
    question, words = str(row["question"]), options
    if len(letters) == len(options):
        question, words = "\n".join([question, *options, ASKED["multiple choice"]]), letters
    ids = [tokenizer(word, add_special_tokens=False)["input_ids"] for word in words]
    for word, tokens in zip(words, ids, strict=True):
        if len(tokens) != 1:
            raise TrainingError(
                f"option {word!r} of {files_of(row)[0]} is not one token: letter the options (A. …, B. …)"
            )
    return Asked(question, torch.tensor([tokens[0] for tokens in ids]), right, words[right])


def files_of(row: Mapping[str, Any]) -> list[str]:
    """Return the names of the files that a row shows: its video, or its still images."""
    return [name for name, _ in row["frames"]] if "frames" in row else [row["video"]]


def videos_of(path: Path, row: Mapping[str, Any]) -> frozenset[Path]:
    """Return the resolved paths of the files that a row shows; `path` is the file of the row."""
    return frozenset((path.parent / name).resolve() for name in files_of(row))


def held_out_videos(path: Path, share: float, kinds: Kind | None = "multiple choice") -> frozenset[Path]:
    """Return about `share` of what a file's rows show, drawn by a fixed seed, so that no row shows some of both parts.

    Whole videos; still images that rows show together stay together.

    Raises
    ------
    TrainingError
        If the file is unreadable, or cannot be parted.
    """
    groups: dict[Path, set[Path]] = {}
    for row in read_rows(path, kinds):
        joined = set(videos_of(path, row))
        joined |= {other for video in list(joined) for other in groups.get(video, ())}
        groups |= dict.fromkeys(joined, joined)
    parts = sorted({id(group): sorted(group) for group in groups.values()}.values())
    if len(parts) < 2:
        why = "a single video" if len(groups) < 2 else "images that all hang together by its rows"
        raise TrainingError(f"{path} shows {why}, and cannot be parted: leave --hold-out out, or give --eval-data")
    held: list[Path] = []
    order = torch.randperm(len(parts), generator=torch.Generator().manual_seed(0)).tolist()
    for number in order[:-1]:
        if held and len(held) + len(parts[number]) / 2 > share * len(groups):
            break
        held += parts[number]
    return frozenset(held)


def read_rows(path: Path, kinds: Kind | None = "multiple choice") -> list[dict[str, Any]]:
    """Return the rows of a file of prompts; `kinds` is the kind of question that is taken, None: every kind.

    Raises
    ------
    TrainingError
        If it is unreadable, or a row is malformed.
    """
    if path.suffix == ".json":
        return [
            {
                "video": str(r.video.resolve()), "question": r.question, "options": list(r.options),
                "answer": r.answer, "problem_type": r.kind,
            }
            for r in read_video_r1(path, kinds=kinds)
        ]  # fmt: skip
    try:
        lines = path.read_text(encoding="utf-8").split("\n")  # a caption may hold other ends of lines, U+2028
    except (OSError, UnicodeDecodeError) as error:
        raise TrainingError(f"cannot read {path}: {error}") from None
    rows = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise TrainingError(f"line {number} of {path} is not JSON: {error}") from None
        wrong = wrong_in(row)
        if wrong:
            raise TrainingError(f"line {number} of {path}: {wrong}")
        if "question" not in row or kinds is None or kind_of(row) == kinds:
            rows.append(row)
    return rows


def wrong_in(row: Any) -> str:
    """Return what is wrong with a row of JSON lines; empty where nothing is."""
    if not isinstance(row, dict) or not {"video", "frames"} & row.keys():
        return "a row needs video (or frames), and caption or question, options and answer"
    if "frames" in row and ("video" in row or "caption" not in row or not _is_frames(row["frames"])):
        return "frames must be [[path, times], …], with a caption and without a video"
    if "video" in row and not (isinstance(row["video"], str) and row["video"]):
        return f"video must be a path, got {row['video']!r}"
    if "caption" in row and not (isinstance(row["caption"], str) and row["caption"].strip()):
        return f"caption must be a text that is not empty, got {row['caption']!r}"
    if "question" not in row:
        return "" if "caption" in row else "a row needs video, and caption or question, options and answer"
    kind = kind_of(row)
    if kind not in KINDS:
        return f"problem_type is {kind!r}, must be one of {', '.join(KINDS)}"
    if "answer" not in row or (kind == "multiple choice" and "options" not in row):
        return "a row needs video, and caption or question, options and answer"
    if kind == "multiple choice" and not (isinstance(row["options"], list) and len(row["options"]) > 1):
        return "options must be a list of two or more"
    return ""


def _is_frames(value: Any) -> bool:
    """Return whether a value is [[path, times], …] with at least one image, each shown at least once."""
    return isinstance(value, list) and bool(value) and all(
        isinstance(pair, list) and len(pair) == 2 and isinstance(pair[0], str) and type(pair[1]) is int and pair[1] > 0
        for pair in value
    )  # fmt: skip
