"""Accuracy of methods on fresh questions of the testbed: up to three seeds, all worlds and models, one JSON file.

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
import re
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch

import vidsieve
from vidsieve import registry
from vidsieve.adapters.adapter import Adapter
from vidsieve.adapters.pruning import adapter_for
from vidsieve.cli.shared import quiet
from vidsieve.compressors.base import Compressor
from vidsieve.evaluation import experiment
from vidsieve.evaluation.conditions import named_methods
from vidsieve.evaluation.stats import Estimate, clustered_mean, paired_difference
from vidsieve.evaluation.tasks.testbed import FULL, Oracle, SceneCondition, ScenesTask
from vidsieve.io.machine import machine, write_result
from vidsieve.loading import load_model, shipped_model, shipped_policy
from vidsieve.policies import read_config
from vidsieve.report.pictures import new_figure, save
from vidsieve.selection import kept_tokens
from vidsieve.testbed.world import TOKENS
from vidsieve.types import Need
from workbench.testbed import study
from workbench.testbed.study import first_look, object_oracle, question_oracle

TABLES = ("deep dense", "deep dense-b", "deep sparse", "deep sparse-b", "shallow sparse", "shallow sparse-b")
"""Model and world of each table."""
SEEDS, RETENTIONS = (9301, 9302, 9303), (0.4, 0.25, 0.1, 0.05, 0.025)
"""The first retention is for trained policies alone: it costs as much as the last four together."""
PROBED = (0.1, 0.05)
"""Retentions at which question-aware policies also get another question."""
PAIRS = (("sieve/ours", "cacovid/ours"), ("sieve/blind", "score/ours"))
"""Rows whose means over all retentions are compared."""
SEED = re.compile(r"\[seed \d+\]")
TRAINED = ("cacovid", "score", "sieve")


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


def fingerprint(condition: SceneCondition, method: Compressor | None, folder: Path | None, model: str) -> str:
    """Return a hash of the measuring code, the model, and a method's code and policy."""
    package = Path(vidsieve.__file__).parent
    found = [path for name in COMMON for path in _files(package / name)]
    found += [shipped_model(model) / "model.safetensors", Path(study.__file__), Path(__file__)]
    if method is not None:
        found += [Path(inspect.getfile(k)) for k in type(method).__mro__ if k.__module__.startswith("vidsieve")]
        if method.trained:
            found += [package / "compressors" / name for name in ("_decoder.py", "_question.py")]
            found += (folder or shipped_policy(f"{method.name}:{method.variant}")).iterdir()
    digest = hashlib.sha256(condition.key.encode())
    for path in sorted(set(found)):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def _files(path: Path) -> list[Path]:
    return sorted(path.rglob("*.py")) if path.is_dir() else [path]


def wanted_rows(
    adapter: Adapter, model: str, names: Sequence[str], folders: Sequence[Path]
) -> dict[str, tuple[SceneCondition, str]]:
    """Return (condition, fingerprint) by key: named methods, policies of more trainings, oracles, the first look."""
    chosen: list[tuple[str, Compressor, Path | None]] = [
        ("", dataclasses.replace(method, inner=False) if hasattr(method, "inner") else method, None)  # type: ignore[call-arg]
        for method in named_methods(names, model).values()
    ]
    for folder in folders:
        config = read_config(folder)
        if shipped_model(config.base_model) == shipped_model(model):  # others have not learned its words
            suffix, own = f"[seed {config.training['settings']['seed']}]", vidsieve.load(folder)
            for variant in ("ours", "blind") if own.name == "sieve" else (own.variant,):
                chosen.append((suffix, dataclasses.replace(own, variant=variant), folder))  # type: ignore[call-arg]
    found: list[tuple[SceneCondition, Compressor | None, Path | None]] = [(FULL, None, None)]
    for suffix, method, folder in chosen:
        for retention in RETENTIONS if method.trained else RETENTIONS[1:]:
            plain = SceneCondition(method.with_retention(retention), suffix=suffix)
            found.append((plain, method, folder))
            if retention in PROBED and Need.QUESTION in plain.needs and method.trained:
                other = dataclasses.replace(plain, suffix=f"{suffix}[other question]", other_question=True)
                found.append((other, method, folder))
    for retention in RETENTIONS[1:]:
        count = kept_tokens(retention, TOKENS)
        oracles = (
            Oracle("question_oracle", retention, question_oracle(count)),
            Oracle("object_oracle", retention, object_oracle(count, True), per_question=False),
        )
        known = [*(SceneCondition(oracle=oracle) for oracle in oracles), first_look(adapter, retention)]
        found += [(condition, None, None) for condition in known]
    return {row[0].key: (row[0], fingerprint(*row, model)) for row in found}


def measured(task: tuple[str, int, int, Path, list[str], list[Path]]) -> dict[str, Any]:
    """Return the marks of every row for one table and seed; rows measured earlier with the same code are kept."""
    table, seed, questions, folder, names, folders = task
    which, world = table.split()
    path = folder / f"{which}-{world}-{seed}-{questions}.json"
    part: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"marks": {}, "made_by": {}, "floors": {}}
    torch.set_num_threads(1)
    quiet()
    name = f"testbed:{which}"
    model, processor = load_model(name)
    adapter = adapter_for(model)
    rows = wanted_rows(adapter, name, names, folders)
    missing = [key for key, (_, made_by) in rows.items() if part["made_by"].get(key) != made_by]
    for start in range(0, len(missing), AT_ONCE):
        keys = missing[start : start + AT_ONCE]
        task_of = ScenesTask(adapter, processor, world, seed, questions, name)
        results = experiment.measured(task_of, [rows[key][0] for key in keys])
        for key in keys:
            part["marks"].pop(key, None)
            part["floors"].pop(key, None)
        part["marks"] |= task_of.marks(results)
        part["floors"] |= {key: reasons[0] for key, reasons in results.refused.items()}
        part["made_by"] |= {key: rows[key][1] for key in keys}
        part["clusters"] = list(task_of.items.values())
        write_result(path, part)
        print(f"{table} {seed}: {min(start + AT_ONCE, len(missing))} of {len(missing)} rows measured", flush=True)
    return {
        "marks": {key: part["marks"][key] for key in rows if key in part["marks"]},
        "clusters": part["clusters"],
        "floors": part["floors"],
    }


def pooled(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """Return every row's marks over all seeds, with one cluster number per scene.

    A row that was trained with several seeds becomes the mean over them, question by question; the shipped policy's
    own marks move to a row of its own.
    """
    marks: dict[str, list[float]] = {}
    clusters: list[int] = []
    for part in parts:
        offset = 1 + max(clusters, default=-1)
        clusters += [offset + number for number in part["clusters"]]
        for key, values in part["marks"].items():
            marks.setdefault(key, []).extend(map(float, values))
    trained: dict[str, list[str]] = {}
    for key in marks:
        if SEED.search(key):
            trained.setdefault(SEED.sub("", key), []).append(key)
    for key, others in trained.items():
        name, rest = key.split("/", 1)
        base, _, probe = name.partition("[")
        every = [marks[other] for other in others]
        if key in marks:
            shipped = f"{base}[shipped]{'[' if probe else ''}{probe}/{rest}"
            marks[shipped] = marks.pop(key)
            every.insert(0, marks[shipped])
        marks[key] = [sum(values) / len(values) for values in zip(*every, strict=True)]
    return {"marks": marks, "clusters": clusters, "floors": parts[0]["floors"]}


def joined(earlier: dict[str, Any] | None, table: dict[str, Any]) -> dict[str, Any]:
    """Return a table with the rows, and differences, of an earlier one of the same questions that it lacks itself."""
    if earlier is None or any(earlier.get(name) != table[name] for name in ("seeds", "questions")):
        return table
    rows: dict[Any, dict[str, Any]] = {}
    for row in (*earlier["rows"], *table["rows"]):
        rows.setdefault((row["method"], row["variant"], row["retention"]), {}).update(row)
    both = {name: earlier[name] | table[name] for name in ("curves", "floors")}
    return table | both | {"rows": list(rows.values())}


def interval(estimate: Estimate) -> dict[str, Any]:
    return {"mean": estimate.mean, "stderr": estimate.stderr, "interval": list(estimate.interval)}


def compared(data: dict[str, Any]) -> dict[str, Any]:
    """Return accuracy of every row and its paired differences to random, the best untrained method, oracle and full."""
    marks, clusters = data["marks"], data["clusters"]
    every = {name: registry.compressors.get(name) for name in registry.compressors}
    free = [f"{name}/{method.variants[0]}" for name, method in every.items() if not method.trained]
    rows = []
    for key, values in marks.items():
        method, variant, retention = key.rsplit("/", 2)
        others = {
            "full": "full/-/1",
            "random": f"random/ours/{retention}",
            "question_oracle": f"question_oracle/-/{retention}",
            "other_question": f"{method}[other question]/{variant}/{retention}",
        }
        if retention != "1":
            there = [key for key in (f"{name}/{retention}" for name in free) if key in marks]
            if there:
                others["best_training_free"] = max(there, key=lambda name: sum(marks[name]))
            others |= {name: f"{name}/ours/{retention}" for name in TRAINED}
            others |= {
                "first_look": next((k for k in marks if k.startswith("first_look") and k.endswith(f"/{retention}")), "")
            }
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
    curves = {}
    for one, other in PAIRS:
        both = [[marks.get(f"{name}/{at:g}", []) for at in RETENTIONS] for name in (one, other)]
        if all(all(curve) for curve in both):
            ours, theirs = ([sum(values) / len(values) for values in zip(*curve, strict=True)] for curve in both)
            curves[f"{one} − {other}"] = interval(paired_difference(ours, theirs, clusters))
    about = {"questions": len(clusters), "scenes": len(set(clusters))}
    return {**about, "rows": rows, "curves": curves, "floors": data["floors"]}


NAMES = {
    "full": "all tokens",
    "question_oracle": "oracle: knows which objects the question is about",
    "object_oracle": "oracle: knows which objects can be asked about, not the question",
    "first_look": "queries and keys on the LLM's inputs, words to video, untrained",
}


def _label(method: str, variant: str) -> str:
    name = NAMES.get(method, f"`{method}`")
    return name if variant in ("ours", "-") else f"{name}, {'' if variant.startswith('layer') else 'variant '}{variant}"


def markdown(table: dict[str, Any], methods: Sequence[tuple[str, str]]) -> str:
    """Return a table of accuracies, with its largest standard error below."""
    by = {(r["method"], r["variant"], r["retention"]): r for r in table["rows"]}
    lines = [f"| kept | {' | '.join(f'{100 * at:g} %' for at in RETENTIONS)} |", "|---|" + "---|" * len(RETENTIONS)]
    largest = 0.0
    for method, variant in methods:
        rows = [by.get((method, variant, 1.0 if method == "full" else at)) for at in RETENTIONS]
        if not any(rows):
            continue
        largest = max(largest, *(row["stderr"] for row in rows if row))
        cells = [f"{row['mean']:.3f}" if row else "–" for row in rows]
        lines.append(f"| {_label(method, variant)} | {' | '.join(cells)} |")
    errors = f"Standard errors, clustered by scene: at most {largest:.3f}."
    return "\n".join([*lines, "", f"{errors} –: below what the method can keep, or not measured."])


def differences(table: dict[str, Any], methods: Sequence[tuple[str, str]], retentions: Sequence[float]) -> str:
    """Return a table of paired differences to random and to the learned policies, 95 %, in points."""
    rows = {(row["method"], row["variant"], row["retention"]): row for row in table["rows"]}
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


def page(result: dict[str, Any], title: str) -> str:
    """Return the document of a result."""
    parts = [
        f"# {title}",
        "",
        "Written by `python benchmarks/learning.py`; no question was seen in training, and on `dense-b` and `sparse-b` "
        "nothing is trained. Kept: what the LLM's layers see on average, exactly (`docs/retention.md`). Methods with "
        "two parts run by the one before the LLM, as in SCORE's tables. These worlds are made so that cheap heuristics "
        "fail: an order of methods here is none on real videos.",
    ]
    for name, table in result["tables"].items():
        rows = list(dict.fromkeys((r["method"], r["variant"]) for r in table["rows"]))
        probes = [row for row in rows if "[" in row[0]]
        plain = [row for row in rows if row not in probes]
        model, world = name.split()
        refused = {key.partition("/")[0]: reason.partition(": ")[2] for key, reason in table["floors"].items()}
        parts += ["", f"## The {model} model in the {world} world", ""]
        seeds = ", ".join(map(str, table["seeds"]))
        about = f"{table['questions']:,} questions on {table['scenes']} scenes (seeds {seeds})."
        parts += [about, "", markdown(table, plain)]
        parts += ["", "Percentage points with 95 % intervals, question by question, clustered by scene:", ""]
        parts += [differences(table, plain, PROBED)]
        for pair, found in table["curves"].items():
            mean, half = 100 * found["mean"], 196 * found["stderr"]
            parts += ["", f"Mean of the {len(RETENTIONS)} retentions, points: `{pair}` {mean:+.1f} ± {half:.1f}."]
        if probes:
            several = any("[shipped]" in method for method, _ in probes)
            parts += [
                "",
                "`[other question]`: tokens are chosen for the scene's next question."
                + (" `[shipped]`, `[seed …]`: one\ntraining each, of which the rows above have the mean." * several),
                "",
                markdown(table, probes),
            ]
        parts += ["", "Below what a method can keep, or refused:" if refused else ""]
        parts += ["", *(f"- `{method}`: {reason}" for method, reason in refused.items())]
    return "\n".join(parts).rstrip() + "\n"


DRAWN = {
    "question_oracle": ("oracle that knows the question", "#888888", ":"),
    "object_oracle": ("oracle that does not", "#888888", "--"),
    "cacovid": ("cacovid", "#d1495b", "-"),
    "sieve": ("sieve", "#00798c", "-"),
    "sieve:blind": ("sieve without the question", "#00798c", "--"),
    "score": ("score", "#edae49", "-"),
    "best": ("best without training", "#30638e", "-"),
    "first_look": ("the LLM's own queries and keys, untrained", "#30638e", ":"),
}
"""Label, colour and line of the figure's curves."""


def figure(result: dict[str, Any], path: Path) -> None:
    """Draw accuracy against retention, a panel a table."""
    tables = result["tables"]
    canvas = new_figure(figsize=(5.2 * len(tables), 4.2), layout="constrained")
    panels = canvas.subplots(1, len(tables), squeeze=False, sharey=True)[0]
    for panel, (name, table) in zip(panels, tables.items(), strict=True):
        curves: dict[str, dict[float, float]] = {}
        for row in table["rows"]:
            which = row["method"] + f":{row['variant']}" * (row["variant"] not in ("ours", "-"))
            if which in DRAWN:
                curves.setdefault(which, {})[row["retention"]] = row["mean"]
            elif row["method"] == "first_look":
                curves.setdefault("first_look", {})[row["retention"]] = row["mean"]
            elif "[" not in row["method"] and not row["method"].endswith("oracle") and row["method"] != "full":
                best = curves.setdefault("best", {})
                best[row["retention"]] = max(row["mean"], best.get(row["retention"], 0.0))
        (full,) = (row["mean"] for row in table["rows"] if row["method"] == "full")
        panel.axhline(full, color="black", linewidth=1, label="all tokens")
        for method, (label, colour, line) in DRAWN.items():
            points = sorted(curves.get(method, {}).items())
            if points:
                panel.plot(*zip(*points, strict=True), line, color=colour, label=label, marker="o", markersize=3)
        panel.set_xscale("log")
        panel.set_xticks(RETENTIONS, [f"{100 * at:g} %" for at in RETENTIONS], minor=False, fontsize=8)
        panel.minorticks_off()
        panel.set_title(f"{name.split()[1]} ({table['questions']:,} questions)", fontsize=10, loc="left")
        panel.set_xlabel("video tokens kept")
        panel.grid(alpha=0.25)
    panels[0].set_ylabel("right answers, chance .25")
    panels[-1].legend(fontsize=7, frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    save(canvas, path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--questions", default="1200,1200,1200", help="of each seed of --seeds, or of the first ones; 0: none"
    )
    parser.add_argument("--seeds", default=",".join(map(str, SEEDS)), help="of the scenes and their questions")
    parser.add_argument("--tables", default=",".join(TABLES), help="model and world of each")
    parser.add_argument("--methods", default="all", help="names, as `vidsieve eval` has them")
    parser.add_argument("--policies", type=Path, nargs="*", default=[], help="folders of more trainings, each table's")
    parser.add_argument("--processes", type=int, default=2, help="one thread each")
    parser.add_argument("--parts", type=Path, default=Path("runs/learning"), help="rows measured so far, to go on from")
    parser.add_argument(
        "--json",
        type=Path,
        default=Path("benchmarks/results/learning.json"),
        help="other rows of the same questions, and other tables, stay in it",
    )
    parser.add_argument("--title", default="What learning adds on the testbed", help="of the document")
    parser.add_argument("--page", type=Path, help="also write the document of the result")
    parser.add_argument("--figure", type=Path, help="also draw accuracy against retention, .png")
    parser.add_argument("--show", action="store_true", help="print an existing result")
    options = parser.parse_args()
    if not options.show:
        counts, seeds = ([int(n) for n in text.split(",")] for text in (options.questions, options.seeds))
        sizes = [(seed, count) for seed, count in zip(seeds, counts, strict=False) if count]
        names = options.tables.split(",")
        methods = options.methods.split(",")
        tasks = [
            (name, seed, count, options.parts, methods, options.policies) for name in names for seed, count in sizes
        ]
        options.parts.mkdir(parents=True, exist_ok=True)
        with ProcessPoolExecutor(options.processes, multiprocessing.get_context("spawn")) as pool:
            parts = dict(zip([task[:2] for task in tasks], pool.map(measured, tasks), strict=True))
        known = json.loads(options.json.read_text())["tables"] if options.json.exists() else {}
        tables = {
            name: {"seeds": [seed for seed, _ in sizes], **compared(pooled([parts[name, seed] for seed, _ in sizes]))}
            for name in names
        }
        tables = known | {name: joined(known.get(name), table) for name, table in tables.items()}
        write_result(options.json, {"machine": machine(), "tables": tables})
    text = page(json.loads(options.json.read_text()), options.title)
    print(text)
    if options.page is not None:
        options.page.write_text(text, encoding="utf-8")
    if options.figure is not None:
        figure(json.loads(options.json.read_text()), options.figure)


if __name__ == "__main__":
    main()
