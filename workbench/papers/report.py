"""The tables of a result bundle: published figures, and what was measured in their place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from vidsieve.evaluation.table import NONE, Table


def bundle_tables(bundle: Mapping[str, Any], measured_only: bool = False) -> list[Table]:
    """Return the tables of a result bundle, one a model: published and measured figures in one cell.

    Columns with measured figures come first; `measured_only` leaves the others out, for a narrow terminal.
    """
    where = ["Measured on the testbed, a synthetic world: only shares compare."] if bundle["testbed"] else []
    tables = []
    for model in dict.fromkeys(cell["model"] for cell in bundle["cells"]):
        own = [cell for cell in bundle["cells"] if cell["model"] == model]
        columns = list(dict.fromkeys(cell["column"] for cell in own if cell["measured"] is not None))
        if not measured_only:
            columns = list(dict.fromkeys([*columns, *(cell["column"] for cell in own)]))
        title = f"{bundle['table']}, {model}: published | measured" + (" on the testbed" if bundle["testbed"] else "")
        tables.append(Table(title, ("", "kept", *columns), lines_of(own, columns), notes=where))
    return tables


def missing_table(bundle: Mapping[str, Any]) -> list[Table]:
    """Return the table of what could not be measured, if there is anything."""
    lines = list(enumerate(bundle["missing"], 1))
    return [Table("Missing", ("", "what"), lines, frozenset({1}))] if lines else []


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
        return f"{cell['published'] or NONE} | {NONE}"
    digits = 0 if number >= 1000 else 1
    error = cell["stderr"]
    said = f"{number:.{digits}f}" if error is None else f"{number:.{digits}f} ± {error:.{digits}f}"
    return f"{cell['published'] or NONE} | {said}"
