"""Result bundles: one table of a paper, published and measured cell by cell, with what the figures depend on."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vidsieve.errors import EvaluationError, UnknownNameError
from workbench.papers.published import PublishedCell, published

FORMAT = 1
FIELDS = {
    "format": int,
    "table": str,
    "testbed": bool,
    "command": str,
    "versions": dict,
    "machine": dict,
    "settings": dict,
    "missing": list,
    "cells": list,
}
"""Fields of a bundle. `settings`: by model, what its figures depend on. `missing`: what was not measured, and why."""
CELL = ("model", "row", "retention", "column", "published", "measured", "stderr", "note")
_VERSIONS = ("vidsieve", "torch", "transformers")

Place = tuple[str, str, str, str]


def place(cell: PublishedCell | Mapping[str, Any]) -> Place:
    """Return where a cell stands: model, row, retention, column."""
    if isinstance(cell, PublishedCell):
        return cell.model, cell.row, cell.retention, cell.column
    return cell["model"], cell["row"], cell["retention"], cell["column"]


def bundled(
    table: str,
    measured: Mapping[Place, Mapping[str, Any]],
    *,
    testbed: bool,
    command: str,
    settings: Mapping[str, Any],
    missing: Sequence[str],
    versions: Mapping[str, str],
    machine: Mapping[str, Any],
) -> dict[str, Any]:
    """Return the bundle of a table: every published cell with what was measured in its place, then all else.

    Parameters
    ----------
    measured : by place ``measured`` and, where known, ``stderr`` and ``note``
    """
    known = {place(cell): cell for cell in published(table)}
    cells = []
    for where in (*known, *(where for where in measured if where not in known)):
        found = measured.get(where, {})
        cell = dict(zip(("model", "row", "retention", "column"), where, strict=True))
        cells.append(
            {
                **cell,
                "published": known[where].value if where in known else None,
                "measured": found.get("measured"),
                "stderr": found.get("stderr"),
                "note": found.get("note", ""),
            }
        )
    return {
        "format": FORMAT,
        "table": table,
        "testbed": testbed,
        "command": command,
        "versions": dict(versions),
        "machine": dict(machine),
        "settings": dict(settings),
        "missing": list(missing),
        "cells": cells,
    }


def read_bundle(path: Path) -> dict[str, Any]:
    """Return the bundle in a file, checked.

    Raises
    ------
    EvaluationError
        If it is none, or says what cannot be; the text has everything that is wrong.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise EvaluationError(f"{path} is no result bundle: {error}") from None
    wrong = faults(value)
    if wrong:
        raise EvaluationError(f"{path} is no sound result bundle: {'; '.join(wrong)}")
    found: dict[str, Any] = value
    return found


def faults(bundle: Any) -> list[str]:
    """Return everything that is wrong with a bundle; empty: nothing.

    Published figures must be the paper's, every cell of its table must be there once, averages must be those of the
    other cells, and what a figure depends on must be told.
    """
    if not isinstance(bundle, dict):
        return ["it is no table of fields"]
    wrong = [
        f"{name} is missing or no {kind.__name__}"
        for name, kind in FIELDS.items()
        if not isinstance(bundle.get(name), kind)
    ]
    if wrong:
        return wrong
    if bundle["format"] != FORMAT:
        return [f"it has format {bundle['format']}, this version reads {FORMAT}"]
    try:
        known = {place(cell): cell.value for cell in published(bundle["table"])}
    except UnknownNameError as error:
        return [str(error)]
    cells = bundle["cells"]
    if not all(isinstance(cell, dict) and set(cell) == set(CELL) for cell in cells):
        return [f"a cell has other fields than {', '.join(CELL)}"]
    places = [place(cell) for cell in cells]
    wrong += [f"{_said(where)} is there {places.count(where)} times" for where in known if places.count(where) != 1]
    for cell in cells:
        where = place(cell)
        if cell["published"] != known.get(where):
            wrong.append(f"{_said(where)} has {cell['published']} as published; it is {known.get(where)}")
        for name in ("measured", "stderr"):
            number = cell[name]
            if number is not None and not (isinstance(number, (int, float)) and math.isfinite(number) and number >= 0):
                wrong.append(f"{_said(where)}: {name} is {number!r}, no number from 0 on")
    told = [cell for cell in cells if isinstance(cell["measured"], (int, float))]
    if told:
        wrong += [f"versions do not tell {name}" for name in _VERSIONS if not bundle["versions"].get(name)]
        models = {cell["model"] for cell in told}
        wrong += [f"settings say nothing of {model}" for model in sorted(models - set(bundle["settings"]))]
        wrong += _averages(told)
    return wrong


def _said(where: Place) -> str:
    return ", ".join(part for part in where if part)


def _averages(cells: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return where a share of the full model's average is not what the averages say."""
    at = {place(cell): float(cell["measured"]) for cell in cells}
    wrong = []
    for (model, row, retention, column), value in at.items():
        if column != "relative":
            continue
        own, full = at.get((model, row, retention, "average")), at.get((model, "full", "1", "average"))
        if own is not None and full and abs(100 * own / full - value) > 0.06:
            wrong.append(
                f"{model}, {row}, {retention}: relative is {value:.1f}, the averages say {100 * own / full:.1f}"
            )
    return wrong
