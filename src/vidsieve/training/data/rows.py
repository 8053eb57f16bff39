"""Rows of a file of training prompts: their kinds, and the prompts and options of questions."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from vidsieve.errors import TrainingError
from vidsieve.options import Options, OptionsError
from vidsieve.training.data.layouts import files_of

Kind = Literal["multiple choice", "numerical", "OCR", "free-form", "regression"]
"""Kind of a question: how its answer is judged."""
KINDS: tuple[Kind, ...] = get_args(Kind)

ASKED: dict[Kind, str] = {
    "multiple choice": "Answer with the option's letter from the given choices directly.",
    "numerical": "Answer with a number only.",
    "regression": "Answer with a number only.",
    "OCR": "Answer with the text to be read only.",
    "free-form": "Answer in words.",
}
"""Last line of a prompt, by kind of question; the same for rows of any file."""


@dataclass(frozen=True)
class AskedQuestion:
    """A question as the model reads it.

    Parameters
    ----------
    text : str
    option_ids : Tensor, (options,), int64
        The next token under each option; empty without options.
    answer : int
        The number of the right option; −1 without options, and where it is not known.
    truth : str
        The right answer as text; empty where it is not known.
    kind : str
    """

    text: str
    option_ids: Tensor
    answer: int
    truth: str
    kind: Kind = "multiple choice"


class Remembered:
    """A tokenizer that splits each text once: options are the same few letters all through a file."""

    def __init__(self, tokenizer: Any) -> None:
        self.unk_token_id = getattr(tokenizer, "unk_token_id", None)
        self._split = lru_cache(4096)(tokenizer)

    def __call__(self, text: str, **options: Any) -> Any:
        """Return the tokens of a text."""
        return self._split(text, **options)


def options_of(row: Mapping[str, Any]) -> Options:
    """Return the options of a row.

    Raises
    ------
    OptionsError
    """
    return Options.parse([str(option) for option in row["options"]])


def kind_of(row: Mapping[str, Any]) -> str:
    """Return the kind of a row: that of its question, or ``"caption"``, or ``"image"`` for a captioned image."""
    if "question" in row:
        return str(row.get("problem_type", "multiple choice"))
    return "image" if "image" in row else "caption"


def labelled(row: Mapping[str, Any]) -> bool:
    """Return False for a question without an answer."""
    return "question" not in row or "answer" in row


def unwanted(row: Mapping[str, Any], captions: bool | None) -> str:
    """Return the reason to leave a row out of videos with captions, with questions, or (None) with both."""
    kind = kind_of(row)
    if kind == "image":
        return "a still image: `vidsieve data pseudo` makes pseudo-videos of them"
    if captions is None or captions == (kind == "caption"):
        return ""
    return "a caption" if kind == "caption" else "a question"


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
        text = f"{row['question']}\n{ASKED[known]}"
        return AskedQuestion(text, torch.empty(0, dtype=torch.int64), -1, str(row["answer"]), known)
    name = Path(files_of(row)[0]).name if {"video", "frames"} & row.keys() else "a question"
    answered = labelled(row)
    try:
        options = options_of(row)
        right = options.index(str(row["answer"])) if answered else -1
    except OptionsError as error:
        raise TrainingError(f"{error} ({name})") from None
    question = str(row["question"])
    letters = single_tokens(tokenizer, options.letters)
    words = None if options.lettered and letters is not None else single_tokens(tokenizer, options.texts)
    if letters is not None and words is None:
        text = "\n".join([question, *options.lines(), ASKED["multiple choice"]])
        return AskedQuestion(text, letters, right, options.letters[right] if answered else "")
    if words is not None:
        return AskedQuestion(question, words, right, options.texts[right] if answered else "")
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


def single_tokens(tokenizer: Any, words: Sequence[str]) -> Tensor | None:
    """Return the token of each word (n,) int64; None where one is not a token, is unknown, or equals another's."""
    ids = [tokenizer(word, add_special_tokens=False)["input_ids"] for word in words]
    unknown = [getattr(tokenizer, "unk_token_id", None)]
    if any(len(tokens) != 1 or tokens == unknown for tokens in ids) or len({*map(tuple, ids)}) < len(ids):
        return None
    return torch.tensor([tokens[0] for tokens in ids])
