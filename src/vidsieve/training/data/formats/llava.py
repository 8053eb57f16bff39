"""LLaVA-Video-178K, LLaVA-OneVision-Data, and what else is written as LLaVA's conversations.

A record has ``conversations``, turns ``{"from": "human" | "gpt", "value": text}`` in pairs, and ``video`` or ``image``;
the first human turn has a placeholder, ``<image>`` for videos too. What a pair of turns is:

- a **multiple-choice question** where the human turn lists two or more lettered options one a line, and the answer
  begins with one of the letters; what follows the options (how to answer) is left out, prompts say that by themselves;
- a **caption** where it is the only pair and the human turn asks for a description, or the file's name has ``_cap_`` as
  LLaVA-Video-178K's have; the human turn is the prompt;
- a **free-form question** otherwise.

Of an image, the first pair is its caption if the answer has `LEAST_WORDS` words: LLaVA-OneVision-Data mixes captions
with questions answered in a word, and has no field that tells them apart.

References
----------
LLaVA-Video-178K (arXiv 2410.02713) and LLaVA-OneVision-Data (arXiv 2408.03326), as their cards on the Hugging Face hub
and public readers describe them; the files themselves were not at hand.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any

import msgspec

from vidsieve.options import Options, OptionsError, said_letter
from vidsieve.training.data.layouts import IMAGE_BYTES, Layout, Name, Rows, Words, checked
from vidsieve.training.data.reading import MalformedError

LEAST_WORDS = 10
"""Words that the caption of an image has at least."""

_PLACEHOLDER = re.compile(r"<(?:image|video)>")
_OPTION = re.compile(r"^\s*\(?([A-Z])[.):]\s*\S")
_DESCRIBING = re.compile(
    r"\b(?:descri\w+|caption\w*|narrat\w+|depict\w*|summar\w+|outline\w*|recount\w*|elaborate|in detail|detailed|"
    r"explain the video|walk me through)\b",
    re.IGNORECASE,
)


class _Turn(msgspec.Struct):
    speaker: str = msgspec.field(name="from")
    value: Words


class _ImageInside(msgspec.Struct):
    """Bytes of an image, as Parquet has them."""

    data: Annotated[bytes, msgspec.Meta(min_length=1)] = msgspec.field(name="bytes")
    path: Words | None = None


class _Conversation(msgspec.Struct):
    conversations: Annotated[list[_Turn], msgspec.Meta(min_length=2)]
    video: Name | None = None
    image: Any = None
    data_source: Any = None
    id: Any = None


class _Still(msgspec.Struct):
    image: Name | _ImageInside


def _matches(record: dict[str, Any]) -> bool:
    return "conversations" in record


def _rows(record: Any, folder: Path, file: Path) -> Rows:
    talk = checked(record, _Conversation)
    pairs, source = _pairs(talk.conversations), talk.data_source
    row: dict[str, Any] = {"source": source} if isinstance(source, str) and source else {}
    if talk.video is not None:
        row["video"] = str(folder / talk.video)
        alone, captions = len(pairs) == 1, "_cap_" in file.name
        return [row | _fields(question, answer, alone, captions) for question, answer in pairs], {}
    caption = pairs[0][1]
    if talk.image is None:
        return [], {"neither a video nor an image": 1}
    if isinstance(talk.image, list):
        return [], {"several images": 1}
    if len(caption.split()) < LEAST_WORDS:
        return [], {f"an answer of fewer than {LEAST_WORDS} words, no caption": 1}
    row["caption"], image = caption, checked(record, _Still).image
    if isinstance(image, _ImageInside):
        return [row | {IMAGE_BYTES: image.data, "image": str(image.path or talk.id or "")}], {}
    return [row | {"image": str(folder / image)}], {}


def _pairs(turns: list[_Turn]) -> list[tuple[str, str]]:
    """Return the (question, answer) pairs of a conversation, without placeholders."""
    if turns[0].speaker == "system":
        turns = turns[1:]
    if [turn.speaker for turn in turns] != ["human", "gpt"] * (len(turns) // 2):
        raise MalformedError("conversations: turns must be from human and gpt, one after the other")
    texts = ["\n".join(map(str.strip, _PLACEHOLDER.split(turn.value))).strip() for turn in turns]
    if not all(texts[1::2]):
        raise MalformedError("conversations: an answer is empty")
    return list(zip(texts[::2], texts[1::2], strict=True))


def _fields(question: str, answer: str, alone: bool, captions: bool) -> dict[str, Any]:
    """Return the row's fields of a pair of turns; `alone` if it is the only one, `captions` if the file holds these."""
    stem, options = _options(question)
    letter = said_letter(answer)
    if options and letter:
        if letter not in Options.parse(options).letters:
            raise MalformedError(f"the answer {answer!r:.60} is none of the options {', '.join(options)!r:.120}")
        return {"question": stem, "options": options, "answer": letter, "problem_type": "multiple choice"}
    if alone and (captions or (not options and _DESCRIBING.search(question))):
        return {"caption": answer} | ({"prompt": question} if question else {})
    if not question:
        raise MalformedError("conversations: a question is empty")
    return {"question": question, "answer": answer, "problem_type": "free-form"}


def _options(text: str) -> tuple[str, list[str]]:
    """Return a question without its options, and these; the whole text and none where it lists fewer than two."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    numbers = [number for number, line in enumerate(lines) if _OPTION.match(line)]
    options = [lines[number] for number in numbers]
    if len(options) < 2 or numbers[0] == 0:
        return text, []
    try:
        if not Options.parse(options).lettered:
            return text, []
    except OptionsError as error:
        raise MalformedError(str(error)) from None
    stem = [line for line in lines[: numbers[0]] if line.rstrip(":").casefold() not in ("options", "choices")]
    return "\n".join(stem), options


LAYOUT = Layout("llava", "LLaVA-Video-178K and LLaVA-OneVision-Data (conversations)", _matches, _rows)
