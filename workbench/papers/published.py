"""The figures of both papers' tables, cell by cell, as printed (``published.tsv``)."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from vidsieve.errors import UnknownNameError


@dataclass(frozen=True)
class PublishedCell:
    """One figure of a table.

    Parameters
    ----------
    model : str
        ``"llava-onevision"``, ``"qwen2.5-vl"`` or ``"llava-video"``.
    row : str
        A method, by its name here, or a condition in the paper's words.
    retention : str
        Fraction kept, ``"1"`` for all tokens.
    column : str
        A benchmark, by its name here, with a part of it behind a colon; or what else is measured.
    value : str
        As printed: a number, or a mean ± standard deviation.
    """

    model: str
    row: str
    retention: str
    column: str
    value: str

    @property
    def number(self) -> float:
        """The value, or the mean."""
        return float(self.value.partition("±")[0])


@cache
def tables() -> dict[str, tuple[PublishedCell, ...]]:
    """Return every table by its name, as ``cacovid:table1``."""
    text = Path(__file__).with_name("published.tsv").read_text(encoding="utf-8")
    found: dict[str, list[PublishedCell]] = {}
    for line in csv.DictReader(text.splitlines(), delimiter="\t"):
        found.setdefault(line.pop("table"), []).append(PublishedCell(**line))
    return {name: tuple(cells) for name, cells in found.items()}


def published(table: str) -> tuple[PublishedCell, ...]:
    """Return the cells of a table in its order.

    Raises
    ------
    UnknownNameError
    """
    if table not in tables():
        raise UnknownNameError("table", table, tables())
    return tables()[table]


def value(table: str, row: str, retention: str, column: str) -> str | None:
    """Return a cell of a table of one model as printed; None where there is none."""
    place = (row, retention, column)
    return next((c.value for c in published(table) if (c.row, c.retention, c.column) == place), None)
