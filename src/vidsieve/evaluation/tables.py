"""From single answers to a table: accuracies with errors clustered by video, differences item by item, categories."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vidsieve.evaluation.items import Average, Item, overall
from vidsieve.evaluation.stats import Estimate, clustered_mean, mcnemar, paired_difference

Conditions = Mapping[str, Mapping[str, Any]]
"""What each condition is, by its key: ``method, variant, part, policy, retention, frames``."""

REFERENCES = ("full", "random")
"""Conditions that every other is compared with, question by question."""


def summary(
    items: Sequence[Item], conditions: Conditions, records: Sequence[Mapping[str, Any]], average: Average = overall
) -> dict[str, Any]:
    """Return the table of a run whose units have all been measured.

    A question that could not be asked, or whose video could not be read, counts as answered wrongly, and is counted as
    failed. A condition that
    some video refuses has no row.

    Parameters
    ----------
    records : as `Examiner.measure` returns them
    average : the benchmark's own figure

    Returns
    -------
    dict
        ``questions, videos, failed: [{video, reason, questions}], rows, refused: [{…, reason, videos}]``; per row what
        the condition is, ``accuracy, stderr, interval, figure, of_answered, vs_full, vs_random, kept, real_retention,
        layer_retention, prompt_tokens, by``. A difference has ``diff, stderr, interval``, and ``mcnemar``, the p-value
        of a test that takes questions for independent (None where scores are not 0 or 1). ``by`` has for every
        category its values with ``questions, accuracy, stderr``.
    """
    given: dict[str, dict[str, Mapping[str, Any]]] = {key: {} for key in conditions}
    reasons: dict[str, list[str]] = {}
    failed = []
    for record in records:
        for sample in record["samples"]:
            given[sample["condition"]][sample["item"]] = sample
        for key, reason in record["refused"].items():
            reasons.setdefault(key, []).append(reason)
        if "failed" in record:
            asked = sum(str(item.video) == record["unit"] for item in items)
            failed.append({"video": record["unit"], "reason": record["failed"], "questions": asked})
        for name, reason in record.get("faults", {}).items():
            where = f"question {name} on {Path(record['unit']).name}"
            failed.append({"video": where, "reason": reason, "questions": 1})
    clusters = _numbered([str(item.video) for item in items])
    scores = {
        key: [float(given[key][item.id]["score"]) if item.id in given[key] else 0.0 for item in items]
        for key in conditions
        if key not in reasons
    }
    rows = []
    for key, values in scores.items():
        said = conditions[key]
        answered = list(given[key].values())
        rows.append(
            {
                **said,
                **_estimated(clustered_mean(values, clusters)),
                "figure": average(items, values),
                "of_answered": float(np.mean([sample["score"] for sample in answered])) if answered else None,
                **{
                    f"vs_{name}": _difference(values, scores.get(_reference(conditions, said, name) or ""), clusters)
                    for name in REFERENCES
                },
                **_tokens(answered),
                "by": _by(items, values, clusters),
            }
        )
    refused = [{**conditions[key], "reason": said[0], "videos": len(said)} for key, said in reasons.items()]
    return {
        "questions": len(items),
        "videos": len(set(clusters)),
        "failed": failed,
        "rows": rows,
        "refused": refused,
    }


def _numbered(names: Sequence[str]) -> list[int]:
    known: dict[str, int] = {}
    return [known.setdefault(name, len(known)) for name in names]


def _estimated(estimate: Estimate, name: str = "accuracy") -> dict[str, Any]:
    return {name: estimate.mean, "stderr": estimate.stderr, "interval": list(estimate.interval)}


def _reference(conditions: Conditions, said: Mapping[str, Any], method: str) -> str | None:
    """Return the condition of a method on as many frames, at the same retention but for ``full``."""
    same = ["frames"] if method == "full" else ["frames", "retention"]
    for key, other in conditions.items():
        if other["method"] == method and all(other[name] == said[name] for name in same):
            return key
    return None


def _difference(values: Sequence[float], others: Sequence[float] | None, clusters: Sequence[int]) -> Any:
    if others is None:
        return None
    binary = set(values) | set(others) <= {0.0, 1.0}
    found = _estimated(paired_difference(values, others, clusters), "diff")
    return {**found, "mcnemar": mcnemar(values, others) if binary else None}


def _tokens(samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return means of what was kept."""
    if not samples:
        return {"kept": None, "real_retention": None, "layer_retention": None, "prompt_tokens": None}
    return {
        "kept": float(np.mean([sample["kept"] for sample in samples])),
        "real_retention": float(np.mean([sample["kept"] / sample["total"] for sample in samples])),
        "layer_retention": float(np.mean([sample["layers"] for sample in samples])),
        "prompt_tokens": np.mean([sample["prompt"] for sample in samples], axis=0).tolist(),
    }


def _by(items: Sequence[Item], values: Sequence[float], clusters: Sequence[int]) -> dict[str, dict[str, Any]]:
    """Return accuracies by the values of every category, in the order in which they appear."""
    found: dict[str, dict[str, Any]] = {}
    for name in dict.fromkeys(name for item in items for name in item.groups):
        places: dict[str, list[int]] = {}
        for place, item in enumerate(items):
            for value in item.groups.get(name, ()):
                places.setdefault(value, []).append(place)
        found[name] = {
            value: {
                "questions": len(own),
                **_estimated(clustered_mean([values[i] for i in own], [clusters[i] for i in own])),
            }
            for value, own in places.items()
        }
    return found
