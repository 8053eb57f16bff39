"""Texts from files and servers, made safe to show."""

from __future__ import annotations

import re

_HIDDEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]"
)


def printable(text: str) -> str:
    """Return a text with "�" for control characters, marks that reorder text, and halves of surrogate pairs.

    A terminal obeys control characters, marks let a name look like another, and halves cannot be written as UTF-8.
    Newlines and tabs stay.
    """
    return _HIDDEN.sub("\ufffd", text)
