"""The report of a result bundle: what is published, and beside it what was measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from vidsieve.report.page import Section, TableOf


def bundle_sections(bundle: Mapping[str, Any]) -> list[Section]:
    """Return the report of a result bundle, a table a model: what is published, what was measured."""
    where = "Measured on the testbed, a synthetic world: only shares compare." if bundle["testbed"] else ""
    found = []
    for model in dict.fromkeys(cell["model"] for cell in bundle["cells"]):
        own = [cell for cell in bundle["cells"] if cell["model"] == model]
        # What was measured comes first.
        columns = [*measured_columns(own), *dict.fromkeys(cell["column"] for cell in own)]
        columns = list(dict.fromkeys(columns))
        table = TableOf(("", "kept", *columns), lines_of(own, columns))
        found.append(Section(model, f"Published | measured. {where}", table))
    if bundle["missing"]:
        numbered = [(number, line) for number, line in enumerate(bundle["missing"], 1)]
        found.append(Section("Missing", table=TableOf(("", "what"), numbered, frozenset({1}))))
    return found


def measured_columns(cells: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the columns of cells in which something was measured."""
    return list(dict.fromkeys(cell["column"] for cell in cells if cell["measured"] is not None))


def lines_of(cells: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> list[tuple[str, ...]]:
    """Return the lines of a table: row, retention, and the cells of some columns, empty where there is none."""
    found: dict[tuple[str, str], dict[str, str]] = {}
    for cell in cells:
        if cell["column"] in columns:
            found.setdefault((cell["row"], cell["retention"]), {})[cell["column"]] = shown(cell)
    return [(row, kept, *(line.get(name, "") for name in columns)) for (row, kept), line in found.items()]


def shown(cell: Mapping[str, Any]) -> str:
    """Return a cell as published | measured, with its error where it has one."""
    number = cell["measured"]
    if number is None:
        return f"{cell['published'] or '–'} | –"
    digits = 0 if number >= 1000 else 1
    error = cell["stderr"]
    said = f"{number:.{digits}f}" if error is None else f"{number:.{digits}f} ± {error:.{digits}f}"
    return f"{cell['published'] or '–'} | {said}"
