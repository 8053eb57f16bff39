"""Texts from files and servers, made safe to show."""

from __future__ import annotations

import json
import re
from typing import Any

_HIDDEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]"
)
_HALF = re.compile("[\ud800-\udfff]")


def printable(text: str) -> str:
    """Return a text with "�" for control characters, marks that reorder text, and halves of surrogate pairs.

    A terminal obeys control characters, marks let a name look like another, and halves cannot be written as UTF-8.
    Newlines and tabs stay.
    """
    return _HIDDEN.sub("\ufffd", text)


def percent(share: float) -> str:
    """Return a fraction as a percentage of at most three digits: 0.25 is "25 %", 0.0989 "9.89 %"."""
    return f"{100 * share:.3g} %"


def json_line(value: Any) -> str:
    """Return a value as a line of JSON that can be written as UTF-8: in ASCII if it holds half of a surrogate pair.

    What JSON has no type for, such as a date from a column of Parquet, is written as a text.
    """
    text = json.dumps(value, ensure_ascii=False, default=str)
    return (text if _HALF.search(text) is None else json.dumps(value, default=str)) + "\n"
