"""Accuracy on the testbed: fresh scenes, every question scored by its options, methods side by side."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Generator, Tensor

from vidsieve.adapters.adapter import Adapter
from vidsieve.adapters.encoded import Encoded
from vidsieve.adapters.fingerprint import model_digest
from vidsieve.adapters.pruning import adapter_for
from vidsieve.adapters.trace import VideoTrace
from vidsieve.answering import next_token_logits
from vidsieve.compressors.base import Compressor
from vidsieve.errors import BudgetError
from vidsieve.evaluation.runs import RESULT, SAMPLES, TIMING, policy_digest, versions
from vidsieve.evaluation.stats import clustered_mean, mcnemar, paired_difference
from vidsieve.io.faults import contained
from vidsieve.io.files import writing
from vidsieve.io.journal import Store, measure_all
from vidsieve.testbed.model import WORD_ID, chat_inputs, repeated_features
from vidsieve.testbed.questions import Question, make_questions
from vidsieve.testbed.world import TOKENS, Cast, make_cast, render
from vidsieve.types import ENCODER_NEEDS, Need, Selection, Stage, VideoTokens


@dataclass(frozen=True)
class SceneBatch:
    """One scene, encoded once, with all its prompts in one batch."""

    cast: Cast
    questions: list[Question]
    encoded: Encoded
    options: Tensor
    answers: Tensor


@dataclass(frozen=True)
class TestbedRow:
    """One condition: what the rows of a result say of it, and how it selects.

    `select(adapter, scene, number, generator)` returns the selection for question `number`; None means
    all tokens. `per_question` is False where one selection serves the whole scene.
    """

    method: str
    variant: str
    retention: float
    select: Callable[[Adapter, SceneBatch, int, Generator], Selection] | None
    per_question: bool = True
    needs: frozenset[Need] = frozenset()
    positions: str = "installed"
    policy: str = ""
    """Folder of a policy that the user named, to tell rows of one method apart."""
    part: str = ""
    """Which parts of the method run, where it has several."""
    inside: Compressor | None = None
    """A method inside the LLM, attached for the call instead of selecting beforehand."""
    digest: str = ""
    """Of the weights of its policy, where it has one."""


def compressor_row(
    compressor: Compressor, label: str | None = None, *, other_question: bool = False, policy: str = ""
) -> TestbedRow:
    """Return the condition of a method; `other_question` hands it the next question of the same scene."""
    if compressor.acts is Stage.LAYER:
        ratio = float(compressor.budget_ratio(TOKENS))
        return TestbedRow(
            label or compressor.name,
            compressor.variant,
            ratio,
            None,
            needs=compressor.needs,
            part=compressor.part,
            inside=compressor,
        )

    def select(adapter: Adapter, scene: SceneBatch, number: int, generator: Generator) -> Selection:
        number = (number + 1) % len(scene.questions) if other_question else number
        return compressor.compress(_video(adapter, scene, number, compressor), generator=generator)

    return TestbedRow(
        label or compressor.name,
        compressor.variant,
        float(compressor.budget_ratio(TOKENS)),
        select,
        Need.QUESTION in compressor.needs,
        compressor.needs,
        policy=policy,
        part=compressor.part,
        digest=policy_digest(compressor),
    )


def _video(adapter: Adapter, scene: SceneBatch, number: int, compressor: Compressor) -> VideoTokens:
    return adapter.video_tokens(scene.encoded, number, compressor.needs)


FULL = TestbedRow("full", "-", 1.0, None, per_question=False)
MARKS = ("right", "clusters", "kinds")
"""Parts of a result with an entry for every question."""


def scene_counts(world: str, seed: int, questions: int) -> list[int]:
    """Return how many questions are asked about each scene until `questions` are; the last scene's are cut to fit."""
    counts: list[int] = []
    while (left := questions - sum(counts)) > 0:
        index = len(counts)
        counts.append(min(left, len(make_questions(make_cast(world, seed, index), seed, index))))
    return counts


@torch.no_grad()
def read_scene(
    adapter: Adapter,
    processor: Any,
    world: str,
    seed: int,
    index: int,
    count: int,
    needs: frozenset[Need] = frozenset(),
) -> SceneBatch:
    """Return one scene with its first `count` questions, and the signals of the vision encoder that are in `needs`."""
    cast = make_cast(world, seed, index)
    asked = make_questions(cast, seed, index)[:count]
    inputs = chat_inputs(processor, render(cast, seed, index), [q.text for q in asked])
    features = adapter.features(inputs, needs)
    # One pass through the vision tower serves every question of the scene.
    inputs["mm_encoder_outputs"] = {"video": repeated_features(features[0], len(asked))}
    del inputs["pixel_values_videos"]
    encoded = adapter.encode(inputs)
    return SceneBatch(
        cast,
        asked,
        encoded.with_signals(features[0].encoder),
        torch.tensor([[WORD_ID[w] for w in q.options] for q in asked]),
        torch.tensor([q.options.index(q.answer) for q in asked]),
    )


def scenes(
    adapter: Adapter, processor: Any, world: str, seed: int, questions: int, needs: frozenset[Need] = frozenset()
) -> Iterator[SceneBatch]:
    """Yield encoded scenes until `questions` questions are reached."""
    for index, count in enumerate(scene_counts(world, seed, questions)):
        yield read_scene(adapter, processor, world, seed, index, count, needs)


@torch.no_grad()
def answers(adapter: Adapter, scene: SceneBatch, row: TestbedRow, seed: int) -> tuple[list[bool], list[VideoTrace]]:
    """Return for each question of a scene whether the model answers it rightly under `row`, and what was kept."""
    generator = torch.Generator().manual_seed(seed)
    if row.inside is not None:
        return _answers_inside(adapter, scene, row.inside, generator)
    count = len(scene.questions)
    traces: list[VideoTrace] = []
    whole = Selection(torch.arange(TOKENS))
    chosen: list[Selection] = []
    for number in range(count):
        if row.select is None:
            chosen.append(whole)
        elif row.per_question or number == 0:
            start = time.perf_counter()
            selection = row.select(adapter, scene, number, generator)
            spent = 1e3 * (time.perf_counter() - start)
            grid = scene.encoded.videos[number].features.grid
            named = {"method": row.method, "variant": row.variant, "nominal": f"{row.retention:g}"}
            traces.append(VideoTrace.of(number, grid, selection, spent, **named))
            chosen.append(selection)
        else:
            chosen.append(chosen[0])
    plan = adapter.build(scene.encoded, [[selection] for selection in chosen])
    return _right(scene, next_token_logits(adapter, plan)), traces


def _right(scene: SceneBatch, logits: Tensor) -> list[bool]:
    """Return whether the option of the highest logit is the answer, from next-token logits (questions, V)."""
    found: list[bool] = (logits.gather(1, scene.options).argmax(1) == scene.answers).tolist()
    return found


def _answers_inside(
    adapter: Adapter, scene: SceneBatch, method: Compressor, generator: Generator
) -> tuple[list[bool], list[VideoTrace]]:
    plan = adapter.plan(scene.encoded, method, generator)
    return _right(scene, next_token_logits(adapter, plan)), list(plan.traces)


def evaluate(
    model: Any,
    processor: Any,
    rows: Sequence[TestbedRow],
    *,
    world: str,
    seed: int,
    questions: int,
    progress: Callable[[int, int], None] | None = None,
    store: Store | None = None,
) -> dict[str, Any]:
    """Return the accuracy of every row on the same questions, errors clustered by scene.

    ``full`` is always the first row. Each other row has its paired difference to ``random`` at the same
    retention (None where random was not asked for) and to ``full``. Rows of a retention that their method cannot keep
    are left out and listed as ``refused``. With a `store`, what was measured before is not measured again.

    Returns
    -------
    dict
        ``world, seed, n_questions, n_scenes, versions, rows, refused, right, clusters, kinds``; per row ``method,
        variant, part, policy, retention, real_retention, layer_retention, accuracy, stderr, vs_random, vs_full,
        by_kind, select_ms``. Where other processes have not measured their scenes yet, there are fewer.
    """
    adapter = adapter_for(model)
    everything = {_key(row): row for row in (FULL, *rows)}
    needs = frozenset().union(*(row.needs for row in everything.values())) & ENCODER_NEEDS
    counts = scene_counts(world, seed, questions)

    def measure(unit: str) -> dict[str, Any]:
        number = int(unit)
        scene = read_scene(adapter, processor, world, seed, number, counts[number], needs)
        return _measured(adapter, scene, everything, seed + number)

    records = measure_all(store, [str(number) for number in range(len(counts))], measure, progress)
    found = list(records.values())
    clusters = [int(record["unit"]) for record in found for _ in record["kinds"]]
    kinds = [kind for record in found for kind in record["kinds"]]
    refused = {key: reason for record in found for key, reason in record["refused"].items()}
    right = {
        key: [mark for record in found for mark in record["rows"][key]["right"]]
        for key in everything
        if key not in refused
    }
    kept = {key: [trace for record in found for trace in record["rows"][key]["kept"]] for key in right}
    result = []
    for key, marks in right.items():
        row = everything[key]
        reference = next((k for k, r in everything.items() if (r.method, r.retention) == ("random", row.retention)), "")
        accuracy = clustered_mean([float(m) for m in marks], clusters)
        real, layers, spent = zip(*(kept[key] or [(1.0, 1.0, 0.0)]), strict=True)
        result.append(
            {
                "method": row.method,
                "variant": row.variant,
                "part": row.part,
                "policy": row.policy,
                "retention": row.retention,
                "real_retention": float(np.mean(real)),
                "layer_retention": float(np.mean(layers)),
                "accuracy": accuracy.mean,
                "stderr": accuracy.stderr,
                "vs_random": _difference(marks, right[reference], clusters) if reference in right else None,
                "vs_full": _difference(marks, right[_key(FULL)], clusters),
                "positions": row.positions,
                "by_kind": {
                    kind: float(np.mean([m for m, k in zip(marks, kinds, strict=True) if k == kind]))
                    for kind in sorted(set(kinds))
                },
                "select_ms": {"min": min(spent), "median": float(np.median(spent)), "max": max(spent)},
            }
        )
    return {
        "world": world,
        "seed": seed,
        "n_questions": len(clusters),
        "n_scenes": len(found),
        "versions": versions(),
        "rows": result,
        "right": right,
        "clusters": clusters,
        "kinds": kinds,
        "refused": [
            {
                "method": everything[key].method,
                "variant": everything[key].variant,
                "retention": everything[key].retention,
                "reason": reason,
            }
            for key, reason in refused.items()
        ],
    }


def _measured(adapter: Adapter, scene: SceneBatch, rows: Mapping[str, TestbedRow], seed: int) -> dict[str, Any]:
    """Return the marks of every row on one scene, and of what it kept its shares and milliseconds."""
    found: dict[str, Any] = {}
    refused: dict[str, str] = {}
    for key, row in rows.items():
        with contained(refused, key, BudgetError):
            marks, traces = answers(adapter, scene, row, seed)
            kept = [[trace.real_retention, trace.layer_retention, trace.select_ms] for trace in traces]
            found[key] = {"right": marks, "kept": kept}
    return {"kinds": [question.kind for question in scene.questions], "rows": found, "refused": refused}


def _key(row: TestbedRow) -> str:
    return f"{row.policy or row.method}/{row.variant}/{row.retention:g}"


def _difference(marks: list[bool], others: list[bool], clusters: list[int]) -> dict[str, float]:
    estimate = paired_difference([float(m) for m in marks], [float(o) for o in others], clusters)
    return {"diff": estimate.mean, "stderr": estimate.stderr, "mcnemar": mcnemar(marks, others)}


# -- runs in folders ----------------------------------------------------------------------------------------


def run_config(model: Any, rows: Sequence[TestbedRow], about: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a run's marks depend on, for its `Store`; `about` is what it asks."""
    return {
        "task": "testbed",
        **about,
        "model_digest": model_digest(model),
        "versions": versions(),
        "rows": [[_key(row), row.part, row.digest] for row in rows],
    }


def write_run(folder: Path, result: Mapping[str, Any], command: str) -> None:
    """Write a finished run: ``samples.jsonl`` with a mark a line, ``result.json``, and ``timing.json`` apart."""
    lines = []
    scene, place = -1, 0
    for number, (cluster, kind) in enumerate(zip(result["clusters"], result["kinds"], strict=True)):
        scene, place = cluster, place + 1 if cluster == scene else 0
        item = f"{result['world']}-{result['seed']}-{scene}-{place}"
        lines += [
            json.dumps({"item": item, "kind": kind, "condition": key, "right": marks[number]})
            for key, marks in result["right"].items()
        ]
    rows = [{key: value for key, value in row.items() if key != "select_ms"} for row in result["rows"]]
    table = {key: value for key, value in result.items() if key not in MARKS}
    spent = {key: row["select_ms"] for key, row in zip(result["right"], result["rows"], strict=True)}
    for name, text in {
        SAMPLES: "\n".join(lines) + "\n",
        RESULT: json.dumps({"command": command, **table, "rows": rows}, indent=2) + "\n",
        TIMING: json.dumps({"select_ms": spent}, indent=2) + "\n",
    }.items():
        with writing(folder / name) as temporary:
            temporary.write_text(text, encoding="utf-8")
