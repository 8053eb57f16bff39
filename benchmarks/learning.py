"""Accuracy of every method on fresh questions of the testbed: three seeds, both worlds, one JSON file.

Rows of the three seeds are pooled (errors clustered by scene), differences are paired question by question.
`--markdown` prints the README's table from a result file.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import inspect
import json
import multiprocessing
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import vidsieve
from vidsieve import registry
from vidsieve.adapters.pruning import adapter_for
from vidsieve.cli.shared import quiet
from vidsieve.compressors.base import Compressor
from vidsieve.evaluation import experiment
from vidsieve.evaluation.conditions import named_methods
from vidsieve.evaluation.stats import Estimate, clustered_mean, paired_difference
from vidsieve.evaluation.tasks.testbed import FULL, Oracle, SceneCondition, ScenesTask, scene_conditions
from vidsieve.io.machine import machine, write_result
from vidsieve.loading import load_model, shipped_policy
from vidsieve.policies import Policy
from vidsieve.selection import kept_tokens
from vidsieve.testbed.world import TOKENS
from vidsieve.types import Stage, VideoTokens
from workbench.testbed.study import first_look, question_oracle

WORLDS, SEEDS, RETENTIONS = ("A", "B"), (9001, 9002, 9003), (0.4, 0.25, 0.2, 0.15, 0.1, 0.05)
PROBED = (0.1, 0.05)
"""Retentions at which question-aware policies also get another question, and other ways to spend their budget."""
TRAINED = ("cacovid", "score")


class Remembering(torch.nn.Module):
    """A policy that scores each video once, however many retentions it is used at."""

    def __init__(self, policy: Policy) -> None:
        super().__init__()
        self.policy, self.config = policy, policy.config
        self.known: dict[int, tuple[Tensor, Any]] = {}

    def forward(self, video: VideoTokens) -> Any:
        """Return the policy's output for a video."""
        # Every question of a scene has its own features object.
        key = id(video.embeds)
        if key not in self.known:
            if (
                len(self.known) > 100
            ):  # of earlier scenes; features are kept with their scores, so their id is not reused
                self.known.clear()
            self.known[key] = video.embeds, self.policy(video)
        return self.known[key][1]


def remembering(method: Compressor) -> Compressor:
    """Return a method whose policy, if it has one, is `Remembering`."""
    policy = getattr(method, "policy", None)
    return method if policy is None else dataclasses.replace(method, policy=Remembering(policy))  # type: ignore[call-arg]


COMMON = (
    "evaluation/tasks/testbed.py",
    "evaluation/conditions.py",
    "testbed",
    "adapters",
    "selection.py",
    "types.py",
    "compressors/base.py",
)
"""Code under the package that every mark depends on."""
AT_ONCE = 64
"""Rows that are measured before they are saved; an interruption loses no more."""


def fingerprint(condition: SceneCondition, method: Compressor | None) -> str:
    """Return a hash of the measuring code, the model, and a method's code and policy."""
    package = Path(vidsieve.__file__).parent
    found = [path for name in COMMON for path in _files(package / name)]
    found.append(package / "testbed/assets/model/model.safetensors")
    if method is not None:
        found += [Path(inspect.getfile(k)) for k in type(method).__mro__ if k.__module__.startswith("vidsieve")]
        if method.trained:
            found += [package / "compressors" / name for name in ("_decoder.py", "_question.py")]
            found += shipped_policy(f"{method.name}:{method.variant}").iterdir()
    row = condition.described()
    digest = hashlib.sha256(repr((row["method"], row["variant"], row["retention"])).encode())
    for path in sorted(set(found)):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def _files(path: Path) -> list[Path]:
    return sorted(path.rglob("*.py")) if path.is_dir() else [path]


def wanted_rows(model: Any, earliest: bool) -> dict[str, tuple[SceneCondition, str]]:
    """Return (condition, fingerprint) by key; `earliest` adds methods inside the LLM that move to earlier layers."""
    methods = named_methods(["all"], prefill=True)
    moved = [
        (method, "earliest", True) if hasattr(method, "earliest") else (method, "layer", 1)
        for method in methods.values()
        if earliest and method.acts is Stage.LAYER and (hasattr(method, "earliest") or hasattr(method, "layer"))
    ]
    found: list[tuple[SceneCondition, Compressor | None]] = [(FULL, None)]
    for retention in RETENTIONS:
        for name, method in methods.items():
            _, *conditions = scene_conditions({name: remembering(method)}, [retention], probes=retention in PROBED)
            found += [(condition, method) for condition in conditions]
        for method, field, value in moved:
            at = dataclasses.replace(method.with_retention(retention), **{field: value})  # type: ignore[arg-type]
            found.append((SceneCondition(at, suffix="[earliest]"), method))
        oracle = Oracle("question_oracle", retention, question_oracle(kept_tokens(retention, TOKENS)))
        found.append((SceneCondition(oracle=oracle), None))
        found.append((first_look(adapter_for(model), retention), None))
    return {condition.key: (condition, fingerprint(condition, method)) for condition, method in found}


def measured(task: tuple[str, int, int, Path, bool]) -> dict[str, Any]:
    """Return the marks of every row for one world and seed; rows measured earlier with the same code are kept."""
    world, seed, questions, folder, earliest = task
    path = folder / f"{world}-{seed}-{questions}.json"
    part: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"marks": {}, "made_by": {}, "floors": {}}
    torch.set_num_threads(1)
    quiet()
    model, processor = load_model("testbed")
    rows = wanted_rows(model, earliest)
    missing = [key for key, (_, made_by) in rows.items() if part["made_by"].get(key) != made_by]
    for start in range(0, len(missing), AT_ONCE):
        keys = missing[start : start + AT_ONCE]
        task_of = ScenesTask(adapter_for(model), processor, world, seed, questions)
        results = experiment.measured(task_of, [rows[key][0] for key in keys])
        for key in keys:
            part["marks"].pop(key, None)
            part["floors"].pop(key, None)
        part["marks"] |= task_of.marks(results)
        part["floors"] |= {key: reasons[0] for key, reasons in results.refused.items()}
        part["made_by"] |= {key: rows[key][1] for key in keys}
        part["clusters"] = list(task_of.items.values())
        write_result(path, part)
        print(f"{world} {seed}: {min(start + AT_ONCE, len(missing))} of {len(missing)} rows measured", flush=True)
    return {
        "marks": {key: part["marks"][key] for key in rows if key in part["marks"]},
        "clusters": part["clusters"],
        "floors": part["floors"],
    }


def pooled(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """Return every row's marks over all seeds, with one cluster number per scene."""
    marks: dict[str, list[bool]] = {}
    clusters: list[int] = []
    for part in parts:
        offset = 1 + max(clusters, default=-1)
        clusters += [offset + number for number in part["clusters"]]
        for key, values in part["marks"].items():
            marks.setdefault(key, []).extend(values)
    return {"marks": marks, "clusters": clusters, "floors": parts[0]["floors"]}


def interval(estimate: Estimate) -> dict[str, Any]:
    return {"mean": estimate.mean, "stderr": estimate.stderr, "interval": list(estimate.interval)}


def compared(data: dict[str, Any]) -> dict[str, Any]:
    """Return accuracy of every row and its paired differences to random, the best untrained method, oracle and full."""
    marks, clusters = data["marks"], data["clusters"]
    rows = []
    for key, values in marks.items():
        method, variant, retention = key.rsplit("/", 2)
        others = {
            "full": "full/-/1",
            "random": f"random/ours/{retention}",
            "question_oracle": f"question_oracle/-/{retention}",
        }
        if retention != "1":
            free = [name for name in registry.compressors if name not in TRAINED]
            there = [key for key in (f"{name}/ours/{retention}" for name in free) if key in marks]
            others["best_training_free"] = max(there, key=lambda name: sum(marks[name]))
            others |= {name: f"{name}/ours/{retention}" for name in TRAINED}
        row = {
            "method": method,
            "variant": variant,
            "retention": float(retention),
            **interval(clustered_mean(values, clusters)),
        }
        for name, other in others.items():
            if other in marks:
                row[f"vs_{name}"] = {
                    "of": other.split("/")[0],
                    **interval(paired_difference(values, marks[other], clusters)),
                }
        rows.append(row)
    return {"questions": len(clusters), "scenes": len(set(clusters)), "rows": rows, "floors": data["floors"]}


NAMES = {
    "full": "all tokens",
    "first_look": "layer 0's attention from the question, untrained: what `cacovid` starts from",
    "question_oracle": "oracle: knows which objects the question is about",
}


def _label(method: str, variant: str) -> str:
    return NAMES.get(method, f"`{method}`" + ("" if variant in ("ours", "-") else f", variant {variant}"))


def markdown(result: dict[str, Any], methods: Sequence[tuple[str, str]]) -> str:
    """Return a table of accuracies on both worlds, with its largest standard error below."""
    by = {
        (world, r["method"], r["variant"], r["retention"]): r
        for world, table in result["worlds"].items()
        for r in table["rows"]
    }
    columns = [(world, retention) for world in WORLDS for retention in RETENTIONS]
    heads = [f"{world}, {100 * retention:g} %" for world, retention in columns]
    lines = [f"| kept | {' | '.join(heads)} |", "|---|" + "---|" * len(columns)]
    largest = 0.0
    for method, variant in methods:
        rows = [by.get((world, method, variant, 1.0 if method == "full" else at)) for world, at in columns]
        if not any(rows):
            continue
        largest = max(largest, *(row["stderr"] for row in rows if row))
        cells = [f"{row['mean']:.3f}" if row else "–" for row in rows]
        lines.append(f"| {_label(method, variant)} | {' | '.join(cells)} |")
    about = (
        f"Standard errors, clustered by scene: at most {largest:.3f}. –: below what the method can keep, or not probed."
    )
    return "\n".join([*lines, "", about])


def differences(result: dict[str, Any], methods: Sequence[tuple[str, str]], retentions: Sequence[float]) -> str:
    """Return a table of paired differences to random and to both learned policies, 95 %, in points, on world A."""
    rows = {(row["method"], row["variant"], row["retention"]): row for row in result["worlds"]["A"]["rows"]}
    names = ("random", *TRAINED)
    heads = [f"{100 * at:g} %: − {name}" for at in retentions for name in names]
    lines = [f"| kept | {' | '.join(heads)} |", "|---|" + "---|" * len(heads)]
    for method, variant in methods:
        cells = []
        for at in retentions:
            row = rows.get((method, variant, at), {})
            for name in names:
                found = row.get(f"vs_{name}") if (method, variant) != (name, "ours") else None
                cells.append(f"{100 * found['mean']:+.1f} ± {196 * found['stderr']:.1f}" if found else "–")
        if any(cell != "–" for cell in cells):
            lines.append(f"| {_label(method, variant)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def page(result: dict[str, Any], plain: Sequence[tuple[str, str]], probes: Sequence[tuple[str, str]]) -> str:
    """Return the document of a result."""
    counts = {world: (table["questions"], table["scenes"]) for world, table in result["worlds"].items()}
    size = " and ".join(
        f"{questions:,} questions on {scenes} scenes of world {w}" for w, (questions, scenes) in counts.items()
    )
    refused = result["worlds"]["A"]["floors"].items()
    floors = {key.partition("/")[0]: reason.partition(": ")[2] for key, reason in refused}
    return "\n".join(
        [
            "# Accuracy of every method on the testbed",
            "",
            f"Written by `python benchmarks/learning.py`: {size}, seed {', '.join(map(str, result['seeds']))}, none of "
            "them seen in training; world B's objects and backgrounds are never trained on. Kept: what the LLM's "
            "layers see on average, exactly (`docs/retention.md`). Methods with two parts run by the one before the "
            "LLM, as in SCORE's tables; `[earliest]` moves methods inside the LLM to earlier layers than their "
            "papers', so that the budget can be met. This world is made so that cheap heuristics fail "
            "(`python -m workbench separation`): an order of methods here is no order on real videos.",
            "",
            markdown(result, plain),
            "",
            "## Differences, question by question",
            "",
            "World A, percentage points with 95 % intervals, clustered by scene.",
            "",
            differences(result, plain, (0.25, 0.1)),
            "",
            "## Another question, other budgets",
            "",
            "`[other question]`: tokens are chosen for the scene's next question. `[frame_…]`: other ways to share the "
            "budget out among frames.",
            "",
            markdown(result, probes),
            "",
            "## Below what a method can keep",
            "",
            *(f"- `{name}`: {reason}" for name, reason in floors.items()),
            "",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--questions", default="2000,2000,2000", help=f"of each seed of {SEEDS}, or of the first ones; 0: none"
    )
    parser.add_argument("--earliest", action="store_true", help="also methods that move to earlier layers")
    parser.add_argument("--processes", type=int, default=2, help="one thread each")
    parser.add_argument("--parts", type=Path, default=Path("runs/learning"), help="rows measured so far, to go on from")
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/learning.json"))
    parser.add_argument("--page", type=Path, help="also write the document of the result")
    parser.add_argument("--markdown", action="store_true", help="print the table of an existing result")
    options = parser.parse_args()
    if not options.markdown:
        counts = [int(count) for count in options.questions.split(",")]
        sizes = [(seed, count) for seed, count in zip(SEEDS, counts, strict=False) if count]
        tasks = [(world, seed, count, options.parts, options.earliest) for seed, count in sizes for world in WORLDS]
        options.parts.mkdir(parents=True, exist_ok=True)
        with ProcessPoolExecutor(options.processes, multiprocessing.get_context("spawn")) as pool:
            parts = dict(zip([task[:2] for task in tasks], pool.map(measured, tasks), strict=True))
        worlds = {world: compared(pooled([parts[world, seed] for seed, _ in sizes])) for world in WORLDS}
        write_result(options.json, {"machine": machine(), "seeds": [seed for seed, _ in sizes], "worlds": worlds})
    result = json.loads(options.json.read_text())
    measured_on = {world: (table["questions"], table["scenes"]) for world, table in result["worlds"].items()}
    rows = [(r["method"], r["variant"]) for r in result["worlds"]["A"]["rows"]]
    plain = list(dict.fromkeys(row for row in rows if "[" not in row[0] or "earliest" in row[0]))
    probes = [row for row in dict.fromkeys(rows) if row not in plain]
    print(f"questions and scenes: {measured_on}\n\n{markdown(result, plain)}\n\n{markdown(result, probes)}")
    if options.page is not None:
        options.page.write_text(page(result, plain, probes), encoding="utf-8")


if __name__ == "__main__":
    main()
