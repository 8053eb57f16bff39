"""Cells of the papers' tables, from the results of evaluations, trainings and timings."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from vidsieve import registry
from vidsieve.compressors.base import Compressor
from vidsieve.errors import PolicyError
from vidsieve.evaluation.conditions import known_fields, method_for
from vidsieve.registry import is_policy
from workbench.papers.bundles import Place
from workbench.papers.paper_tables import PaperTable
from workbench.papers.published import published

Cells = dict[Place, dict[str, Any]]


def rows_of(table: str, model: str) -> list[tuple[str, list[float]]]:
    """Return a table's rows of a model but the one of all tokens, each with its retentions, as they are published."""
    found: dict[str, list[float]] = {}
    for cell in published(table):
        kept = float(cell.retention)
        if cell.model == model and cell.row != "full" and kept not in found.setdefault(cell.row, []):
            found[cell.row].append(kept)
    return list(found.items())


def folder_of(data: Path | None, benchmark: str) -> Path | None:
    """Return the folder of a benchmark below the one that has them all; None where it is not there.

    MLVU's test questions may be in ``mlvu``.
    """
    if data is None:
        return None
    for name in (benchmark, benchmark.removesuffix("-test")):
        if os.path.isdir(data / name):
            return data / name
    return None


def policy_for(policies: Mapping[str, str], model: str, row: str) -> str | None:
    """Return the folder that was named for a row: for this model, as ``MODEL:ROW``, or for any."""
    return policies.get(f"{model}:{row}", policies.get(row))


def method_of(
    table: PaperTable, model: str, row: str, policies: Mapping[str, str], earliest: bool = False
) -> Compressor:
    """Return the method of a row.

    Raises
    ------
    PolicyError
        If it is trained, and no policy was named; the text has the command that makes one.
    """
    own = table.trained.get(row)
    name, folder = own.method if own else row, policy_for(policies, model, row)
    wanted = {**table.fields, **(own.fields if own else {})}
    given = known_fields(name, earliest=earliest, **wanted)
    if folder is None and registry.compressors.get(name).trained:
        options = f" {own.options}" if own else ""
        raise PolicyError(
            f"a policy for {row!r} of {model}: give --policy '{row}=FOLDER', made by "
            f"`vidsieve train {name} RUN --model MODEL --data {own.data if own else 'FILE'}{options}`"
        )
    if folder is not None and not is_policy(folder):
        raise PolicyError(f"--policy {row}={folder}: no policy is there")
    return method_for(folder or name, None, **given)


def accuracy_cells(model: str, results: Mapping[str, Mapping[str, Any]], benchmarks: Sequence[str]) -> Cells:
    """Return the cells of one model, in percent.

    Parameters
    ----------
    results : by benchmark, as `vidsieve.evaluation.tasks.questions.QuestionsTask` tabulates them
    benchmarks : those that the paper's average is of
    """
    found: Cells = {}
    for benchmark, result in results.items():
        for line in result["rows"]:
            where = model, _row(line), line["retention"]
            found[*where, benchmark] = _percent(line["figure"], line["stderr"])
            for part, values in line["by"].get("duration", {}).items() if benchmark == "videomme" else ():
                found[*where, f"{benchmark}:{part}"] = _percent(values["accuracy"], values["stderr"])
    for _, row, retention in dict.fromkeys(where[:3] for where in found):
        own = [found.get((model, row, retention, name)) for name in benchmarks]
        if all(own):
            mean = sum(cell["measured"] for cell in own if cell) / len(own)
            found[model, row, retention, "average"] = {"measured": mean}
    return found | _relative(found)


def _percent(share: float, error: float) -> dict[str, Any]:
    return {"measured": 100 * share, "stderr": 100 * error if error == error else None}


def _relative(cells: Cells) -> Cells:
    """Return every row's average as a share of the full model's."""
    full = {where[0]: cell["measured"] for where, cell in cells.items() if where[1:] == ("full", "1", "average")}
    return {
        (*where[:3], "relative"): {"measured": 100 * cell["measured"] / full[where[0]]}
        for where, cell in cells.items()
        if where[3] == "average" and full.get(where[0])
    }


def _row(line: Mapping[str, Any]) -> str:
    """Return the row of the table that a line of a result stands for: conditions are given its name for a policy's."""
    return str(line["policy"] or line["method"])


def testbed_cells(model: str, result: Mapping[str, Any]) -> Cells:
    """Return the cells of a testbed evaluation: every row's accuracy on a world, and its share of the full model's."""
    found: Cells = {}
    column = f"testbed {result['world']}"
    full = next(row["accuracy"] for row in result["rows"] if row["method"] == "full")
    for line in result["rows"]:
        where = model, _row(line), f"{line['retention']:g}"
        found[*where, column] = _percent(line["accuracy"], line["stderr"])
        if result["world"] == "dense":
            note = "of the testbed's world dense"
            found[*where, "relative"] = {"measured": 100 * line["accuracy"] / full, "note": note}
    for line in result["refused"]:
        found[model, line["method"], f"{line['retention']:g}", column] = {"measured": None, "note": line["reason"]}
    return found


def training_cells(
    model: str, table: PaperTable, tables: Sequence[Mapping[str, Any]], retentions: Mapping[str, Sequence[str]]
) -> Cells:
    """Return the cells of the testbed's own ablations, in percent of right answers at 10 % of the tokens.

    Their errors are over training seeds. `retentions`: by row, those of the published cells, beside which they stand.
    """
    known = {(made["name"], row["label"]): row for made in tables for row in made["rows"]}
    found: Cells = {}
    for row, own in table.trained.items():
        line = known[own.ablation, own.label + own.view]
        seeds = line["0.1"]["seeds"]
        mean = sum(seeds) / len(seeds)
        error = None
        if len(seeds) > 1:
            error = 100 * (sum((s - mean) ** 2 for s in seeds) / (len(seeds) - 1) / len(seeds)) ** 0.5
        cell = {"measured": 100 * mean, "stderr": error, "note": f"at 10 %, {len(seeds)} seeds: {own.label}"}
        nearest = min(retentions[row], key=lambda kept: abs(float(kept) - 0.1))
        found[model, row, nearest, "testbed dense, 10 %"] = cell
    return found


def time_cells(model: str, result: Mapping[str, Any], columns: Collection[str]) -> Cells:
    """Return those cells of a timed pipeline that a table has columns for: tokens, milliseconds and their deviation.

    What SCORE's table calls prefill has the compressor's time in it.
    """
    found: Cells = {}
    for line in result["rows"]:
        select, prefill = line["ms"]["select"], line["ms"]["prefill"]
        total = prefill["mean"] + (select["mean"] if "compressor ms" in columns else 0.0)
        values: dict[str, dict[str, Any]] = {
            "visual tokens": {"measured": line["visual"][1]},
            "tokens": {"measured": line["prompt"][1]},
            "prefill ms": {"measured": total, "stderr": prefill["sd"] or None, "note": "± sd over lengths"},
        }
        if line["method"] != "full":
            own = {"measured": select["mean"], "stderr": select["sd"] or None, "note": "± sd over lengths"}
            values |= {"compression ms": own, "compressor ms": own}
        for column, cell in values.items():
            if column in columns:
                found[model, _row(line), line["retention"], column] = dict(cell)
    return found
