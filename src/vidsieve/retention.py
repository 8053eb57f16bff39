"""Retention: a fraction of the video tokens, or their number."""

from __future__ import annotations

from dataclasses import dataclass

from vidsieve.errors import RetentionError, SelectionError


@dataclass(frozen=True)
class Tokens:
    """A budget as a token count instead of a fraction: ``retention=Tokens(512)``."""

    count: int

    def __post_init__(self) -> None:
        if not isinstance(self.count, int) or isinstance(self.count, bool) or self.count < 1:
            raise SelectionError(f"Tokens(...) needs a whole number ≥ 1, got {self.count!r}")

    def __repr__(self) -> str:
        return f"Tokens({self.count})"


def check_retention(retention: object) -> float | Tokens:
    """Return `retention` if it is `Tokens` or a number in (0, 1].

    Raises
    ------
    RetentionError
        For anything else, NaN, booleans and text included.
    """
    if isinstance(retention, Tokens):
        return retention
    if isinstance(retention, bool) or not isinstance(retention, int | float) or not 0 < retention <= 1:
        raise RetentionError(
            f"retention is the fraction of video tokens kept, a number in (0, 1], or Tokens(count); got {retention!r}"
        )
    return float(retention)


def parse_retention(text: str) -> float | Tokens:
    """Return the retention in a text such as ``0.25`` or ``512t`` (a token count).

    Raises
    ------
    RetentionError
    """
    word = text.strip()
    if word.endswith("t") and word[:-1].isdigit() and int(word[:-1]) > 0:
        return Tokens(int(word[:-1]))
    try:
        return check_retention(float(word))
    except ValueError:  # RetentionError is one, too
        raise RetentionError(f"retention is a number in (0, 1], or a token count such as 512t; got {text!r}") from None


def parse_retentions(text: str) -> list[float]:
    """Return the retention ratios in a list such as ``0.25,0.1``.

    Raises
    ------
    RetentionError
    """
    values = [parse_retention(word) for word in text.split(",") if word.strip()]
    ratios = [v for v in values if isinstance(v, float)]
    if not ratios or len(ratios) != len(values):
        raise RetentionError(f"give one or more retention ratios, as 0.25,0.1; got {text!r}")
    return ratios
