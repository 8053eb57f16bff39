"""Accuracy on the testbed: fresh scenes, every question scored by its options, methods side by side."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Generator, Tensor

from vidsieve.adapters.base import Adapter
from vidsieve.adapters.batch import Encoded
from vidsieve.adapters.inside import begin, uncompiled
from vidsieve.adapters.pruning import adapter_for
from vidsieve.adapters.trace import VideoTrace
from vidsieve.compressors.base import Compressor
from vidsieve.errors import BudgetError
from vidsieve.eval.running import versions
from vidsieve.eval.stats import clustered_mean, paired_difference
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
class Row:
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


def compressor_row(
    compressor: Compressor, label: str | None = None, *, other_question: bool = False, policy: str = ""
) -> Row:
    """Return the condition of a method; `other_question` hands it the next question of the same scene."""
    if compressor.acts is Stage.LAYER:
        ratio = float(compressor.budget_ratio(TOKENS))
        return Row(
            label or compressor.name, compressor.variant, ratio, None, needs=compressor.needs, part=compressor.part,
            inside=compressor,
        )  # fmt: skip

    def select(adapter: Adapter, scene: SceneBatch, number: int, generator: Generator) -> Selection:
        number = (number + 1) % len(scene.questions) if other_question else number
        return compressor.compress(_video(adapter, scene, number, compressor), generator=generator)

    return Row(
        label or compressor.name, compressor.variant, float(compressor.budget_ratio(TOKENS)), select,
        Need.QUESTION in compressor.needs, compressor.needs, policy=policy, part=compressor.part,
    )  # fmt: skip


def _video(adapter: Adapter, scene: SceneBatch, number: int, compressor: Compressor) -> VideoTokens:
    return adapter.video_tokens(scene.encoded, number, compressor.needs)


FULL = Row("full", "-", 1.0, None, per_question=False)


def scenes(
    adapter: Adapter, processor: Any, world: str, seed: int, questions: int, needs: frozenset[Need] = frozenset()
) -> Iterator[SceneBatch]:
    """Yield encoded scenes until `questions` questions are reached; the last scene is cut to fit.

    `needs` says which signals of the vision encoder are wanted.
    """
    left, index = questions, 0
    while left > 0:
        cast = make_cast(world, seed, index)
        asked = make_questions(cast, seed, index)[:left]
        inputs = chat_inputs(processor, render(cast, seed, index), [q.text for q in asked])
        with torch.no_grad():
            features = adapter.features(inputs, needs)
            # One pass through the vision tower serves every question of the scene.
            inputs["mm_encoder_outputs"] = {"video": repeated_features(features[0], len(asked))}
            del inputs["pixel_values_videos"]
            encoded = adapter.encode(inputs)
            videos = (replace(v, features=replace(v.features, encoder=features[0].encoder)) for v in encoded.videos)
            encoded = replace(encoded, videos=tuple(videos))
        yield SceneBatch(
            cast, asked, encoded, torch.tensor([[WORD_ID[w] for w in q.options] for q in asked]),
            torch.tensor([q.options.index(q.answer) for q in asked]),
        )  # fmt: skip
        left, index = left - len(asked), index + 1


@torch.no_grad()
def answers(adapter: Adapter, scene: SceneBatch, row: Row, seed: int) -> tuple[list[bool], list[VideoTrace]]:
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
    pruned = adapter.build(scene.encoded, [[selection] for selection in chosen])
    logits = adapter.model(**pruned.inputs, logits_to_keep=1, use_cache=False).logits[:, -1]
    return _right(scene, logits), traces


def _right(scene: SceneBatch, logits: Tensor) -> list[bool]:
    """Return whether the option of the highest logit is the answer, from next-token logits (questions, V)."""
    found: list[bool] = (logits.gather(1, scene.options).argmax(1) == scene.answers).tolist()
    return found


def _answers_inside(
    adapter: Adapter, scene: SceneBatch, method: Compressor, generator: Generator
) -> tuple[list[bool], list[VideoTrace]]:
    pruned, run = begin(adapter, scene.encoded, method, generator)
    layers, text = list(adapter.decoder_layers), adapter.model.config.get_text_config()
    with uncompiled(), run.hooked(layers, text, None):
        logits = adapter.model(**pruned.inputs, logits_to_keep=1, use_cache=False).logits[:, -1]
    return _right(scene, logits), run.traces()


def evaluate(
    model: Any, processor: Any, rows: Sequence[Row], *, world: str, seed: int, questions: int,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Return the accuracy of every row on the same questions, errors clustered by scene.

    ``full`` is always the first row. Each other row has its paired difference to ``random`` at the same
    retention (None where random was not asked for) and to ``full``. Rows of a retention that their method cannot keep
    are left out and listed as ``refused``.

    Returns
    -------
    dict
        ``world, seed, n_questions, n_scenes, versions, rows, refused``; per row ``method, variant, part, policy,
        retention, real_retention, layer_retention, accuracy, stderr, vs_random, vs_full, by_kind, select_ms``.
    """
    adapter = adapter_for(model)
    everything = [FULL, *rows]
    right: list[list[bool]] = [[] for _ in everything]
    kept: list[list[VideoTrace]] = [[] for _ in everything]
    clusters: list[int] = []
    kinds: list[str] = []
    count = 0
    refused: dict[int, str] = {}
    needs = frozenset().union(*(row.needs for row in everything)) & ENCODER_NEEDS
    for number, scene in enumerate(scenes(adapter, processor, world, seed, questions, needs)):
        for i, row in enumerate(everything):
            if i in refused:
                continue
            try:
                marks, traces = answers(adapter, scene, row, seed + number)
            except BudgetError as error:
                if number:
                    raise  # grids are alike: the first scene would have said so
                refused[i] = str(error)
                continue
            right[i] += marks
            kept[i] += traces
        clusters += [number] * len(scene.questions)
        kinds += [q.kind for q in scene.questions]
        count = number + 1
        if progress:
            progress(len(clusters), questions)
    result = []
    measured = [i for i in range(len(everything)) if i not in refused]
    for i in measured:
        row = everything[i]
        accuracy = clustered_mean([float(m) for m in right[i]], clusters)
        real = float(np.mean([t.real_retention for t in kept[i]])) if kept[i] else 1.0
        layers = float(np.mean([t.layer_retention for t in kept[i]])) if kept[i] else 1.0
        reference = [
            j for j in measured if everything[j].method == "random" and everything[j].retention == row.retention
        ]
        spent = [t.select_ms for t in kept[i]] or [0.0]
        result.append({
            "method": row.method, "variant": row.variant, "part": row.part, "policy": row.policy,
            "retention": row.retention, "real_retention": real, "layer_retention": layers,
            "accuracy": accuracy.mean, "stderr": accuracy.stderr,
            "vs_random": _difference(right[i], right[reference[0]], clusters) if reference else None,
            "vs_full": _difference(right[i], right[0], clusters), "positions": row.positions,
            "by_kind": {
                kind: float(np.mean([m for m, k in zip(right[i], kinds, strict=True) if k == kind]))
                for kind in sorted(set(kinds))
            },
            "select_ms": {"min": min(spent), "median": float(np.median(spent)), "max": max(spent)},
        })  # fmt: skip
    return {
        "world": world, "seed": seed, "n_questions": len(clusters), "n_scenes": count, "versions": versions(),
        "rows": result, "right": {_key(everything[i]): right[i] for i in measured}, "clusters": clusters,
        "refused": [
            {"method": row.method, "variant": row.variant, "retention": row.retention, "reason": reason}
            for row, reason in ((everything[i], reason) for i, reason in refused.items())
        ],
    }  # fmt: skip


def _key(row: Row) -> str:
    return f"{row.policy or row.method}/{row.variant}/{row.retention:g}"


def _difference(marks: list[bool], others: list[bool], clusters: list[int]) -> dict[str, float]:
    estimate = paired_difference([float(m) for m in marks], [float(o) for o in others], clusters)
    return {"diff": estimate.mean, "stderr": estimate.stderr}
