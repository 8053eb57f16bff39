"""Whether what a teacher says is a caption: refusals, cut or empty answers, loops and worse are not.

A server may answer anything with status 200, so nothing in the body is taken on trust.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]|[^\W\u3040-\u30ff\u3400-\u9fff]+")
_REFUSAL = re.compile(
    r"\W*(?:i(?:['’]m| am)(?: so| very| really)? sorry|sorry,|i apologi[sz]e|as an ai\b|unfortunately, i\b"
    r"|i (?:can['’]?t|cannot|can not|won['’]?t|will not|am unable|am not able)\b|i['’]m (?:unable|not able)\b"
    r"|i (?:don['’]?t|do not) (?:see|have)\b|抱歉|对不起|很抱歉|我无法|我不能)",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class TeacherAnswer:
    """What an answer holds: a caption, or why it is none, in a word and at length; tokens in and out where told."""

    caption: str = ""
    reason: str = ""
    detail: str = ""
    usage: tuple[int, int] | None = None


def judge(body: str, instruction: str, *, min_words: int = 8) -> TeacherAnswer:
    """Return what the body of an answer with status 200 holds.

    Parameters
    ----------
    body : str
    instruction : str
        What was asked: some models say it back.
    min_words : int
        A text of fewer words is no caption.
    """
    value = parse(body)
    if value is None:
        return TeacherAnswer(reason="not JSON", detail=shorten(body))
    usage, choice = _usage(value), _first_choice(value)
    if choice is None:
        return TeacherAnswer(reason="no choices", detail=error_in(value)[0], usage=usage)
    message, end = choice["message"], choice.get("finish_reason")
    content, refusal = message.get("content"), message.get("refusal")
    if isinstance(refusal, str) and refusal.strip():
        return TeacherAnswer(reason="refusal", detail=shorten(refusal), usage=usage)
    if end == "content_filter":
        return TeacherAnswer(reason="refusal", detail="the server's content filter", usage=usage)
    if content is not None and not isinstance(content, str):
        return TeacherAnswer(reason="not text", detail=f"content is {type(content).__name__}", usage=usage)
    if end == "length":
        return TeacherAnswer(reason="cut off", detail=shorten(content or ""), usage=usage)
    # Models that think aloud put their thoughts first, and some servers leave them there.
    caption = (content or "").rpartition("</think>")[2].strip()
    reason = fault_of(caption, instruction, min_words)
    return TeacherAnswer("" if reason else caption, reason, shorten(caption) if reason else "", usage)


def fault_of(caption: str, instruction: str, min_words: int) -> str:
    """Return why a text is no caption; empty where it is one."""
    said = words(caption)
    if not caption:
        return "empty"
    if any("\ud800" <= letter <= "\udfff" for letter in caption):  # half of a pair: no file could hold it
        return "not text"
    if _REFUSAL.match(caption):
        return "refusal"
    if said == words(instruction):
        return "the instruction itself"
    if len(said) < min_words:
        return "too short"
    return "repetition" if repeats(said) else ""


def words(text: str) -> list[str]:
    """Return the words of a text in small letters; of Chinese and Japanese, the characters."""
    return _WORD.findall(text.casefold())


def repeats(said: Sequence[str], length: int = 5, most: float = 1 / 3) -> bool:
    """Return whether more than a third of the runs of five words were said before in the same text."""
    runs = [tuple(said[start : start + length]) for start in range(len(said) - length + 1)]
    return bool(runs) and 1 - len(set(runs)) / len(runs) > most


def parse(body: str) -> Any:
    """Return the value of a body of JSON; None where it is none."""
    try:
        return json.loads(body)
    except (ValueError, RecursionError):
        return None


def error_in(value: Any) -> tuple[str, str]:
    """Return what a body says of an error, and the server's own name of it: servers put both in different places."""
    found = value
    if isinstance(value, dict):
        found = value.get("error") or value.get("detail") or value
    if not isinstance(found, dict):
        return shorten(found if isinstance(found, str) else json.dumps(found)), ""
    said = found.get("message")
    return shorten(said if isinstance(said, str) else json.dumps(found)), str(found.get("code") or found.get("type"))


def shorten(text: str, most: int = 200) -> str:
    """Return a text in one line, cut where it is long."""
    line = " ".join(text.split())
    return line if len(line) <= most else f"{line[:most]}…"


def _first_choice(value: Any) -> dict[str, Any] | None:
    choices = value.get("choices") if isinstance(value, dict) else None
    choice = choices[0] if isinstance(choices, list) and choices else None
    return choice if isinstance(choice, dict) and isinstance(choice.get("message"), dict) else None


def _usage(value: Any) -> tuple[int, int] | None:
    """Return the tokens that an answer tells of, in and out; None where it does not, or not in earnest."""
    told = value.get("usage") if isinstance(value, dict) else None
    if not isinstance(told, dict):
        return None
    tokens_in, tokens_out = told.get("prompt_tokens"), told.get("completion_tokens")
    if type(tokens_in) is not int or type(tokens_out) is not int or min(tokens_in, tokens_out) < 0:
        return None
    return tokens_in, tokens_out
