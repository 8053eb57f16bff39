"""Tables of results, with one renderer for each place where they are read: terminal, page, Markdown, JSON."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from vidsieve.evaluation.stats import FEW

if TYPE_CHECKING:
    from rich.table import Table as RichTable

NONE = "–"
"""Cell without a value."""


@dataclass(frozen=True)
class Table:
    """Cells of a table, and the result they were written from.

    Parameters
    ----------
    title : str
    columns : sequence of str
    rows : sequence of sequences
        Cells, as many as there are columns; None prints as a dash.
    texts : set of int
        Columns of words, which are set flush left; all others hold numbers.
    notes : sequence of str
        Sentences below the table.
    more : sequence of Table
        Further tables of the same result, which pages have and terminals leave out.
    result : mapping
        The result as values for JSON.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]
    texts: frozenset[int] = frozenset({0})
    notes: Sequence[str] = ()
    more: Sequence[Table] = ()
    result: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of_result(
        cls,
        title: str,
        columns: Sequence[str],
        rows: Sequence[Sequence[Any]],
        result: Mapping[str, Any],
        *,
        texts: frozenset[int] = frozenset({0}),
        notes: Sequence[str] = (),
        more: Sequence[Table] = (),
    ) -> Table:
        """Return the table of an experiment's result, with a row of dashes and a note for every refused condition."""
        refused = [{**row, "method": named(row), "kept": row["retention"]} for row in result["refused"]]
        dashes = [[row.get(column, NONE) for column in columns] for row in refused]
        reasons = [f"{row['method']}: {row['reason']}" for row in refused]
        return cls(title, columns, [*rows, *dashes], texts, [*notes, *reasons], more, result)

    @property
    def cells(self) -> list[list[str]]:
        """Every row as text."""
        return [[NONE if cell is None else str(cell) for cell in row] for row in self.rows]

    def to_rich(self) -> RichTable:
        """Return the table for a terminal, without notes."""
        from rich.markup import escape
        from rich.table import Table as RichTable

        table = RichTable(title=escape(self.title), title_justify="left", header_style="bold")
        for number, name in enumerate(self.columns):
            table.add_column(name, justify="left" if number in self.texts else "right")
        for row in self.cells:
            table.add_row(*map(escape, row))
        return table

    def to_html(self) -> str:
        """Return the table as an HTML element, with every text escaped; the first cell of a row is its header.

        Columns without a name have no row of heads.
        """

        def element(tag: str, number: int, text: str, attributes: str = "") -> str:
            attributes += ' class="text"' if number in self.texts else ""
            return f"<{tag}{attributes}>{html.escape(text)}</{tag}>"

        heads = "".join(element("th", n, name, ' scope="col"') for n, name in enumerate(self.columns))
        lines = [
            "<tr>"
            + "".join(
                element("td", n, cell) if n else element("th", n, cell, ' scope="row"') for n, cell in enumerate(row)
            )
            + "</tr>"
            for row in self.cells
        ]
        body, head = "\n".join(lines), f"<thead><tr>{heads}</tr></thead>\n" if any(self.columns) else ""
        return f"<table>\n{head}<tbody>{body}</tbody></table>"

    def to_markdown(self) -> str:
        """Return the table as Markdown, with its title as a heading and its notes below."""
        rows = [[cell.replace("|", r"\|") for cell in row] for row in (self.columns, *self.cells)]
        lines = [f"| {' | '.join(row)} |" for row in rows]
        lines.insert(1, "|" + "---|" * len(self.columns))
        return "\n".join([f"### {self.title}", "", *lines, *(f"\n{note}" for note in self.notes)])

    _repr_markdown_ = to_markdown  # shown by notebooks

    def to_json(self) -> dict[str, Any]:
        """Return the result, with None where JSON has no number: NaN and infinities."""
        result: dict[str, Any] = finite(dict(self.result))
        return result


def named(row: Mapping[str, Any]) -> str:
    """Return the name of a described condition in a table: method, variant, part and label."""
    name = row["method"] if row["variant"] in ("ours", "-") else f"{row['method']}:{row['variant']}"
    name += f" ({row['part']})" if row.get("part") else ""
    return name + (f" ({row['policy']})" if row.get("policy") else "")


def finite(value: Any) -> Any:
    """Return a value for JSON, with None in the place of NaN and infinities."""
    if isinstance(value, Mapping):
        return {key: finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def number(value: float | None, form: str = ".1f", times: float = 1.0) -> str:
    """Return `times` × value in a format; a dash where there is no value, or no finite one."""
    return NONE if value is None or not math.isfinite(value) else f"{times * value:{form}}"


def with_error(value: float | None, error: float | None, form: str = ".1f", times: float = 100.0) -> str:
    """Return ``value ± error`` in percent; the value alone where its error is unknown."""
    shown, spread = number(value, form, times), number(error, form.removeprefix("+"), times)
    return shown if NONE in (shown, spread) else f"{shown} ± {spread}"


def difference(cell: Mapping[str, Any] | None) -> str:
    """Return a paired difference in percentage points with its 95 % interval."""
    if cell is None:
        return NONE
    return f"{number(cell['diff'], '+.1f', 100)} ± {number(cell['stderr'], '.1f', 196)}"


def few_note(clusters: int) -> list[str]:
    """Return a note for tables of too few videos: their errors come out too small."""
    if clusters >= FEW:
        return []
    videos = "1 video is" if clusters == 1 else f"{clusters} videos are"
    return [f"note: {videos} too few for these errors and intervals; give {FEW} or more"]
