"""Tables of accuracy: what each condition keeps, how many answers are right, and its differences to the references."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import msgspec
import numpy as np

from vidsieve.evaluation.experiment import Results, Scores
from vidsieve.evaluation.table import Table, difference, few_note, named, number, with_error

KEPT = (
    ("kept", int, 0),
    ("total", Annotated[int, msgspec.Meta(ge=1)], 1),
    ("layers", float, 1.0),
    ("prompt", tuple[int, int], (0, 0)),
)
"""What a sample may record of what was kept, as `Task.form` has it."""
Groups = Mapping[str, Sequence[str]]
"""By category, such as ``duration``, the values that an item belongs to."""


def accuracy_rows(
    results: Results, items: Mapping[str, Groups], clusters: Sequence[int], score: str = "score"
) -> list[dict[str, Any]]:
    """Return a row for every condition that no unit refused.

    An item that could not be measured counts as answered wrongly.

    Parameters
    ----------
    items : mapping
        By item its groups, in the order of the statistics.
    clusters : sequence of int
        Number of every item's cluster.
    score : str
        Name of the score in the samples.

    Returns
    -------
    list of dict
        The description of the condition, ``accuracy, stderr, interval, vs_full, vs_random`` as `Scores` returns them,
        ``kept, real_retention, layer_retention, prompt_tokens`` (means of what was kept), ``by`` (for every category
        and value ``questions, accuracy, stderr, interval``) and ``select_ms``.
    """
    described = {condition.key: condition.described() for condition in results.conditions}
    values = {}
    for condition in results.measured:
        samples = results.samples[condition.key]
        values[condition.key] = [float(samples[item][score]) if item in samples else 0.0 for item in items]
    scores = Scores(described, values, clusters)
    return [
        {
            **described[key],
            **scores.mean(key),
            **scores.differences(key),
            **_kept(list(results.samples[key].values())),
            "by": _by_group(scores, key, items),
            "select_ms": results.select_ms(key),
        }
        for key in values
    ]


def _kept(samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return means of what was kept, over the samples that record it."""
    samples = [sample for sample in samples if sample.keys() >= {"kept", "total", "layers"}]
    if not samples:
        return dict.fromkeys(("kept", "real_retention", "layer_retention", "prompt_tokens"))
    prompts = [sample["prompt"] for sample in samples if "prompt" in sample]
    return {
        "kept": float(np.mean([sample["kept"] for sample in samples])),
        "real_retention": float(np.mean([sample["kept"] / sample["total"] for sample in samples])),
        "layer_retention": float(np.mean([sample["layers"] for sample in samples])),
        "prompt_tokens": np.mean(prompts, axis=0).tolist() if prompts else None,
    }


def _by_group(scores: Scores, key: str, items: Mapping[str, Groups]) -> dict[str, dict[str, Any]]:
    """Return accuracies by the values of every category, in the order of items."""
    places: dict[str, dict[str, list[int]]] = {}
    for place, groups in enumerate(items.values()):
        for category, members in groups.items():
            for value in members:
                places.setdefault(category, {}).setdefault(value, []).append(place)
    return {
        category: {value: {"questions": len(some), **scores.mean(key, some)} for value, some in values.items()}
        for category, values in places.items()
    }


def numbered(names: Sequence[str]) -> list[int]:
    """Return a number for every name, equal ones for equal names, in the order in which names appear."""
    known: dict[str, int] = {}
    return [known.setdefault(name, len(known)) for name in names]


# -- tables -----------------------------------------------------------------------------------------------------------


def accuracy_table(result: Mapping[str, Any]) -> Table:
    """Return the table of a result of the testbed or of a set of questions; old ``result.json`` files are read too."""
    rows = [_completed(row) for row in result["rows"]]
    frames = ["frames"] if len({row["frames"] for row in rows}) > 1 else []
    own = any(not math.isclose(row.get("figure") or row["accuracy"], row["accuracy"]) for row in rows)
    figure = ["figure %"] if own else []  # else it is the accuracy
    columns = ["method", *frames, "retention", "mean kept over layers", "kept after the last layer"]
    columns += ["accuracy % ± s.e.", *figure]
    others = [name for name in ("random", "full") if any(row["method"] == name for row in rows)]
    columns += [{"random": "− random, 95 %", "full": "− all tokens, 95 %"}[name] for name in others]
    cells = []
    for row in rows:
        known = [named(row), *(row[name] for name in frames), row["retention"]]
        kept = [number(row[name], ".4f") for name in ("layer_retention", "real_retention")]
        accuracy = [with_error(row["accuracy"], row["stderr"]), *(number(row.get("figure"), times=100) for _ in figure)]
        gaps = [row[f"vs_{name}"] if row["method"] != name else None for name in others]
        cells.append([*known, *kept, *accuracy, *map(difference, gaps)])
    title, clusters = _title(result)
    notes = [*(f"figure: {result['figure']}" for _ in figure), *few_note(clusters), *_failed(result.get("failed", []))]
    return Table.of_result(title, columns, cells, result, notes=notes, more=_category_tables(rows))


def _completed(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row with the fields of both kinds of results."""
    kept = row["retention"]
    by = row.get("by") or {
        "kind": {kind: {"accuracy": a, "stderr": None} for kind, a in row.get("by_kind", {}).items()}
    }
    return {"frames": None, **row, "by": by, "retention": kept if isinstance(kept, str) else f"{kept:g}"}


def _title(result: Mapping[str, Any]) -> tuple[str, int]:
    """Return the title of a result's table, and its number of clusters."""
    if "benchmark" in result:
        videos, data = result["videos"], result.get("settings", {}).get("data")
        where = f"{result['benchmark']}, {data}" if data else result["benchmark"]
        return (
            f"{where}: {result['questions']} questions about {videos} video{'s' * (videos != 1)}",
            videos,
        )
    scenes = result["n_scenes"]
    where = f"Testbed, world {result['world']}, seed {result['seed']}"
    return f"{where}: {result['n_questions']} questions on {scenes} scene{'s' * (scenes != 1)}", scenes


def _category_tables(rows: Sequence[Mapping[str, Any]]) -> list[Table]:
    """Return a table of accuracies for every category with more than one value."""
    tables = []
    for category in dict.fromkeys(name for row in rows for name in row["by"]):
        values = list(dict.fromkeys(value for row in rows for value in row["by"].get(category, {})))
        if len(values) < 2:
            continue
        lines = []
        for row in rows:
            cells = [row["by"].get(category, {}).get(value) for value in values]
            name = f"{named(row)}, {row['retention']}" + (f", {row['frames']} frames" if row["frames"] else "")
            lines.append([name, *(cell and with_error(cell["accuracy"], cell["stderr"]) for cell in cells)])
        tables.append(Table(f"Accuracy by {category}", ["", *values], lines, notes=["In %, ± standard error."]))
    return tables


def _failed(failed: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return a sentence about questions that could not be asked, if there are any."""
    if not failed:
        return []
    lost, first = sum(row["questions"] for row in failed), failed[0]
    count = "1 question" if lost == 1 else f"{lost} questions"
    where = Path(first["video"]).name
    return [
        f"{count} could not be asked and count as answered wrongly; samples.jsonl names each. First: {where}: "
        f"{first['reason']}"
    ]
