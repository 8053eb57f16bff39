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
from typing import Any

from vidsieve.options import Options, OptionsError, said_letter
from vidsieve.training.data.layouts import Layout
from vidsieve.training.data.reading import MalformedError

LEAST_WORDS = 10
"""Words that the caption of an image has at least."""

_PLACEHOLDER = re.compile(r"\s*<(?:image|video)>\s*")
_OPTION = re.compile(r"^\s*\(?([A-Z])[.):]\s*\S")
_DESCRIBING = re.compile(
    r"\b(?:descri\w+|caption\w*|narrat\w+|depict\w*|summar\w+|outline\w*|recount\w*|elaborate|in detail|detailed|"
    r"explain the video|walk me through)\b",
    re.IGNORECASE,
)


def _matches(record: Any) -> bool:
    return isinstance(record, dict) and "conversations" in record


def _rows(record: Any, folder: Path, file: Path) -> tuple[list[dict[str, Any]], dict[str, int]]:
    if not isinstance(record, dict):
        raise MalformedError(f"is {type(record).__name__}, not an object with fields")
    pairs = _pairs(record.get("conversations"))
    source = record.get("data_source")
    common = {"source": source} if isinstance(source, str) and source else {}
    if record.get("video") is not None:
        row = common | {"video": _path(record, "video", folder)}
        alone = len(pairs) == 1
        return [row | _asked(question, answer, alone, "_cap_" in file.name) for question, answer in pairs], {}
    if record.get("image") is not None:
        return _image(record, pairs, common, folder)
    return [], {"neither a video nor an image": 1}


def _image(
    record: dict[str, Any], pairs: list[tuple[str, str]], common: dict[str, Any], folder: Path
) -> tuple[list[dict[str, Any]], dict[str, int]]:
    image, caption = record["image"], pairs[0][1]
    if isinstance(image, list):
        return [], {"several images": 1}
    if len(caption.split()) < LEAST_WORDS:
        return [], {f"an answer of fewer than {LEAST_WORDS} words, no caption": 1}
    row = common | {"caption": caption}
    if isinstance(image, dict):  # as Parquet has it
        data = image.get("bytes")
        if not isinstance(data, bytes) or not data:
            raise MalformedError("image holds no bytes")
        return [row | {"bytes": data, "image": str(image.get("path") or record.get("id") or "")}], {}
    return [row | {"image": _path(record, "image", folder)}], {}


def _pairs(turns: Any) -> list[tuple[str, str]]:
    """Return (what is asked, what is answered) of a conversation."""
    if not isinstance(turns, list) or len(turns) < 2 or not all(isinstance(turn, dict) for turn in turns):
        raise MalformedError("conversations must be a list of two turns or more")
    if turns[0].get("from") == "system":
        turns = turns[1:]
    if len(turns) % 2 or [turn.get("from") for turn in turns] != ["human", "gpt"] * (len(turns) // 2):
        raise MalformedError("the turns of conversations must be from human and gpt, one after the other")
    if not all(isinstance(turn.get("value"), str) for turn in turns):
        raise MalformedError("a turn of conversations has no text as its value")
    said = [_PLACEHOLDER.sub("\n", turn["value"]).strip() for turn in turns]
    if not all(said[1::2]):
        raise MalformedError("an answer in conversations is empty")
    return list(zip(said[::2], said[1::2], strict=True))


def _asked(question: str, answer: str, alone: bool, captions: bool) -> dict[str, Any]:
    """Return the fields of a pair of turns."""
    stem, options = _options(question)
    letter = said_letter(answer)
    if options and letter:
        if letter not in Options.parse(options).letters:
            raise MalformedError(f"the answer {answer[:60]!r} is none of the options {', '.join(options)[:120]!r}")
        return {"question": stem, "options": options, "answer": letter, "problem_type": "multiple choice"}
    if alone and (captions or (not options and _DESCRIBING.search(question))):
        return {"caption": answer} | ({"prompt": question} if question else {})
    if not question:
        raise MalformedError("a question in conversations is empty")
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


def _path(record: dict[str, Any], field: str, folder: Path) -> str:
    name = record[field]
    if not isinstance(name, str) or not name.strip():
        raise MalformedError(f"{field} is {name!r:.60}, must be a path")
    return str(folder / name)


LAYOUT = Layout("llava", "LLaVA-Video-178K and LLaVA-OneVision-Data (conversations)", _matches, _rows)
