"""Scores of generated answers by kind of question, by the rules of Video-R1. Pure functions.

Multiple choice: the letter given (`vidsieve.options`), or the first word where options have no letters. Numbers: equal
to two decimals. OCR: one minus the word error rate. Free form: the mean of ROUGE-1, -2 and -L. Regression: one minus
the relative error.
"""

from __future__ import annotations

import re
from collections import Counter

from vidsieve.options import said_letter
from vidsieve.training.data.rows import Kind

_TAGGED = re.compile(r"<answer>(.*?)(?:</answer>|$)", re.DOTALL)
_NUMBER = re.compile(r"[-+]?(?:\d[\d,]*\.?\d*|\.\d+)(?:[eE][-+]?\d+)?")
_WORD = re.compile(r"\w+")


def judge(kind: Kind, answer: str, truth: str) -> float:
    """Return the score of an answer, in [0, 1].

    Parameters
    ----------
    kind : str
        One of `KINDS`.
    answer : str
        Generated text; only the part in ``<answer>`` tags counts where it has them.
    truth : str
        The right answer.
    """
    tagged = _TAGGED.search(answer)
    answer = (tagged.group(1) if tagged else answer).strip()
    if kind == "multiple choice":
        if len(truth) == 1 and truth.isascii() and truth.isalpha():
            return float(said_letter(answer) == truth.upper())
        words = _WORD.findall(answer.casefold())
        return float(words[:1] == [truth.casefold()])
    if kind == "numerical":
        ours, theirs = number(answer), number(truth)
        return float(ours is not None and theirs is not None and round(ours, 2) == round(theirs, 2))
    if kind == "regression":
        return closeness(number(answer), number(truth))
    if kind == "OCR":
        return max(0.0, 1 - word_error_rate(answer.split(), truth.split()))
    return rouge(answer, truth)


def number(text: str) -> float | None:
    """Return the first number in a text, thousands separated by commas or not; None without one."""
    match = _NUMBER.search(text)
    return float(match.group().replace(",", "")) if match else None


def closeness(answer: float | None, truth: float | None) -> float:
    """Return 1 − |answer − truth| / |truth|, not below 0; for a truth of 0, 1 if the answer is 0 too, else 0."""
    if answer is None or truth is None:
        return 0.0
    if truth == 0:
        return float(answer == 0)
    return max(0.0, 1 - abs(answer - truth) / abs(truth))


def word_error_rate(answer: list[str], truth: list[str]) -> float:
    """Return the least number of inserted, dropped and replaced words over the number of words of the truth."""
    row = list(range(len(truth) + 1))
    for count, word in enumerate(answer, 1):
        corner, row[0] = row[0], count
        for place, wanted in enumerate(truth, 1):
            best = min(row[place] + 1, row[place - 1] + 1, corner + (word != wanted))
            corner, row[place] = row[place], best
    return row[-1] / max(1, len(truth))


def rouge(answer: str, truth: str) -> float:
    """Return the mean F1 of common words, word pairs, and the longest common subsequence (ROUGE-1, -2, -L)."""
    ours, theirs = _WORD.findall(answer.lower()), _WORD.findall(truth.lower())
    grams = [_overlap(ours, theirs, size) for size in (1, 2)]
    return (sum(grams) + _f1(_common(ours, theirs), len(ours), len(theirs))) / 3


def _overlap(ours: list[str], theirs: list[str], size: int) -> float:
    one, two = (Counter(zip(*(words[i:] for i in range(size)), strict=False)) for words in (ours, theirs))
    return _f1((one & two).total(), one.total(), two.total())


def _f1(common: int, ours: int, theirs: int) -> float:
    return 2 * common / (ours + theirs) if common else 0.0


def _common(ours: list[str], theirs: list[str]) -> int:
    """Return the length of the longest common subsequence."""
    row = [0] * (len(theirs) + 1)
    for word in ours:
        corner = 0
        for place, wanted in enumerate(theirs, 1):
            best = corner + 1 if word == wanted else max(row[place], row[place - 1])
            corner, row[place] = row[place], best
    return row[-1]
