"""A benchmark run in a folder: begun, gone on with, finished; the same command gives the same files.

The folder has ``run.json`` (what is measured, and by what), ``units-….jsonl`` (what was measured so far, a video a
line), and, when every video is in, ``samples.jsonl`` (one answer a line), ``result.json`` (the table) and
``timing.json``, which alone differs from run to run.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from vidsieve._version import __version__
from vidsieve.adapters.fingerprint import digest, model_digest, weights_digest
from vidsieve.compressors.base import Compressor
from vidsieve.errors import EvaluationError
from vidsieve.evaluation.examiner import Condition, Examiner
from vidsieve.evaluation.items import Benchmark, Item
from vidsieve.evaluation.tables import summary
from vidsieve.io.files import writing
from vidsieve.io.journal import Store, measure_all
from vidsieve.io.machine import spread

SAMPLES, RESULT, TIMING = "samples.jsonl", "result.json", "timing.json"


def versions() -> dict[str, str]:
    """Return the versions that a number depends on."""
    return {
        "vidsieve": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
    }


def configuration(
    benchmark: Benchmark, items: Sequence[Item], examiner: Examiner, model: str, more: Mapping[str, Any]
) -> dict[str, Any]:
    """Return what a run's answers depend on; `more` are settings that neither questions nor examiner tell."""
    asked = [[item.id, item.video.name, item.prompt(examiner.closing), item.answer] for item in items]
    return {
        "task": benchmark.name,
        "questions": len(items),
        "questions_digest": digest(asked),
        "model": model,
        "model_digest": model_digest(examiner.adapter.model),
        "dtype": str(examiner.adapter.model.dtype),
        "closing": examiner.closing,
        "answer": examiner.way,
        "fps": examiner.fps,
        "max_new_tokens": examiner.max_new_tokens,
        "seed": examiner.seed,
        "indices_kept": examiner.keep,
        **more,
        "versions": versions(),
        "policies": _policies(examiner.conditions),
        "conditions": {condition.key: condition.described() for condition in examiner.conditions},
    }


def _policies(conditions: Sequence[Condition]) -> dict[str, str]:
    """Return a hash of the weights of every policy, by the method that has it."""
    found = {}
    for condition in conditions:
        method = condition.compressor
        if method is not None and (made := policy_digest(method)):
            found[condition.policy or f"{method.name}:{method.variant}"] = made
    return found


def policy_digest(method: Compressor) -> str:
    """Return a hash of a method's weights; empty where it has none."""
    policy = getattr(method, "policy", None)
    return weights_digest(policy.named_parameters()) if isinstance(policy, torch.nn.Module) else ""


def run(
    folder: Path,
    benchmark: Benchmark,
    items: Sequence[Item],
    examiner: Examiner,
    config: Mapping[str, Any],
    *,
    share: tuple[int, int] = (0, 1),
    command: str = "",
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any] | None:
    """Ask what has not been asked yet, and return the finished result; None while other shares are on their way.

    Raises
    ------
    EvaluationError
        If the folder holds another run.
    OutputError
    """
    by_video: dict[str, list[Item]] = {}
    for item in items:
        if not item.fault:
            by_video.setdefault(str(item.video), []).append(item)
    with Store(folder, config, share) as store:
        records = measure_all(store, list(by_video), lambda unit: examiner.measure(by_video[unit]), progress)
    if len(records) < len(by_video):
        return None
    found = list(records.values()) + [_faulty(item) for item in items if item.fault]
    if not any(record["samples"] or record["refused"] for record in found):
        reasons = [record["failed"] for record in found if "failed" in record]
        reasons += [reason for record in found for reason in record.get("faults", {}).values()]
        raise EvaluationError(f"none of the {len(items)} questions could be asked, first because {reasons[0]}")
    table = summary(items, config["conditions"], found, benchmark.average)
    result = {
        "benchmark": benchmark.title,
        "paper": benchmark.paper,
        "figure": benchmark.figure,
        "command": command,
        "published": {"questions": benchmark.questions, "videos": benchmark.videos},
        "settings": dict(config),
        **table,
    }
    _write_samples(folder / SAMPLES, items, config["conditions"], found)
    spent: dict[str, list[float]] = {}
    for record in found:
        for key, values in record["select_ms"].items():
            spent.setdefault(key, []).extend(values)
    _write(folder / TIMING, {"select_ms": {key: spread(values) for key, values in spent.items()}})
    _write(folder / RESULT, result)
    return result


def _faulty(item: Item) -> dict[str, Any]:
    """Return what stands for the measured video of an item that cannot be asked."""
    return {"unit": str(item.video), "failed": item.fault, "samples": [], "refused": {}, "faults": {}, "select_ms": {}}


def _write(path: Path, value: Any) -> None:
    with writing(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def _write_samples(
    path: Path, items: Sequence[Item], conditions: Mapping[str, Any], records: Sequence[Mapping[str, Any]]
) -> None:
    """Write every answer, in the order of questions and conditions, whatever order they were had in."""
    by = {(sample["item"], sample["condition"]): sample for record in records for sample in record["samples"]}
    failed = {record["unit"]: record["failed"] for record in records if "failed" in record}
    # Records of runs that began before 0.2 have no faults.
    faults = {name: reason for record in records for name, reason in record.get("faults", {}).items()}
    with writing(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        for item in items:
            if str(item.video) in failed:
                file.write(json.dumps({"item": item.id, "failed": failed[str(item.video)]}, ensure_ascii=False) + "\n")
            elif item.id in faults:
                line = {"item": item.id, "failed": faults[item.id]}
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
            for key in conditions:
                if (item.id, key) in by:
                    line = {**by[item.id, key], "answer": item.answer}
                    file.write(json.dumps(line, ensure_ascii=False) + "\n")
