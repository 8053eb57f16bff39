"""Which option a generated answer means."""

from __future__ import annotations

import re
from collections.abc import Sequence

_TAGGED = re.compile(r"<answer>(.*?)(?:</answer>|$)", re.DOTALL | re.IGNORECASE)
_FIRST = re.compile(r"^\W*([A-Za-z])(?:[).:,\]*]|\s*$|\s*\n)")
_DECLARED = re.compile(
    r"\b(?i:answer|option|choice)\b(?:\s+(?:is|would be|should be))?\s*[:=]?\s*(?i:option\s+)?[(\[*]*([A-Z])\b(?!')"
)


def chosen(said: str, options: Sequence[str], letters: Sequence[str]) -> str:
    """Return the letter that an answer gives; empty where it gives none, or none of `letters`.

    In this order: a letter that stands alone at its beginning, "(B)", "b." or "B"; the last letter that it declares,
    "the answer is B"; an option's text, word for word but for case and full stops. "A man enters" is no letter.

    Parameters
    ----------
    said : str
        What the model generated; the part in ``<answer>`` tags where it has them.
    options : their texts, without letters
    letters : of each option
    """
    tagged = _TAGGED.findall(said)
    text = (tagged[-1] if tagged else said).strip()
    first = _FIRST.match(text)
    found = [first.group(1).upper()] if first else _DECLARED.findall(text)
    if found and found[-1] in letters:
        return found[-1]
    plain = [_plain(option) for option in options]
    lead = re.match(r"^([A-Z])\s+(.*)$", text, re.DOTALL)  # "B a red cup"
    if lead and lead.group(1) in letters and _plain(lead.group(2)) == plain[list(letters).index(lead.group(1))]:
        return lead.group(1)
    return letters[plain.index(_plain(text))] if _plain(text) in plain and not found else ""


def _plain(text: str) -> str:
    return " ".join(text.casefold().strip(" .\n").split())
