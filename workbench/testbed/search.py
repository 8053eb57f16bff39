"""Search for sets of tokens with the answer known: an upper bound for any policy.

A set grows by the token whose addition raises the right answer's margin most: greedily, or with the best few sets kept.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from vidsieve.adapters.adapter import Adapter
from vidsieve.adapters.pruning import adapter_for
from vidsieve.errors import SelectionError
from vidsieve.evaluation.conditions import method_for
from vidsieve.evaluation.stats import clustered_mean
from vidsieve.evaluation.table import Table
from vidsieve.evaluation.tasks.testbed import Oracle, SceneBatch, SceneCondition, read_scene, scene_questions
from vidsieve.selection import indices_to_mask
from vidsieve.testbed.world import TOKENS
from vidsieve.training.rewards import margin_reward
from vidsieve.training.rollouts import Rollouts
from vidsieve.types import Tokens
from workbench.testbed.study import first_look, question_oracle


def grown(best: list[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """Return every set that is one of `best` and one token more, each once."""
    found = {tuple(sorted((*chosen, token))) for chosen in best for token in range(TOKENS) if token not in chosen}
    return sorted(found)


def beam_search(margins: Callable[[Tensor], Tensor], tokens: int, width: int) -> list[tuple[int, ...]]:
    """Return the best set of 1, 2, … `tokens` tokens that a beam of `width` sets finds; width 1 is greedy.

    Parameters
    ----------
    margins : callable
        From keep-masks (G, N) to what they are worth (G,).
    """
    best: list[tuple[int, ...]] = [()]
    path = []
    for _ in range(tokens):
        candidates = grown(best)
        masks = torch.zeros(len(candidates), TOKENS, dtype=torch.bool)
        masks.scatter_(1, torch.tensor(candidates), True)
        order = margins(masks).argsort(descending=True, stable=True)[:width]
        best = [candidates[i] for i in order.tolist()]
        path.append(best[0])
    return path


@dataclass
class Found:
    """Marks and margins of one way of choosing, by number of tokens."""

    right: dict[int, list[bool]] = field(default_factory=dict)
    margin: dict[int, list[float]] = field(default_factory=dict)

    def add(self, tokens: int, logits: Tensor, answer: int) -> None:
        """Note the option logits (options,) under a set of so many tokens."""
        self.right.setdefault(tokens, []).append(int(logits.argmax()) == answer)
        self.margin.setdefault(tokens, []).append(float(margin_reward(logits[None], answer)[0]))


def upper_bound(
    model: Any,
    processor: Any,
    *,
    seed: int,
    questions: int = 50,
    tokens: int = 4,
    width: int = 4,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Return accuracy and mean margin at 1 … `tokens` tokens of greedy and beam search beside policies and oracle."""
    adapter = adapter_for(model)
    methods = {name: method_for(name) for name in ("cacovid", "score", "divprune", "random")}
    conditions: dict[tuple[str, int], SceneCondition] = {}
    for count in range(1, tokens + 1):
        oracle = Oracle("question_oracle", count / TOKENS, question_oracle(count))
        conditions["question_oracle", count] = SceneCondition(oracle=oracle)
        conditions["first_look", count] = first_look(adapter, Tokens(count))
        conditions |= {(name, count): SceneCondition(m.with_retention(Tokens(count))) for name, m in methods.items()}
    found = {name: Found() for name in ("greedy", f"beam of {width}", *dict.fromkeys(name for name, _ in conditions))}
    clusters: list[int] = []
    for scene_number, asked in enumerate(scene_questions("dense", seed, questions)):
        scene = read_scene(adapter, processor, "dense", seed, scene_number, len(asked))
        generator = torch.Generator().manual_seed(seed + scene_number)
        for number in range(len(scene.questions)):
            ask = _asked(adapter, scene, number)
            answer = int(scene.answers[number])
            for name, beam in (("greedy", 1), (f"beam of {width}", width)):
                for chosen in beam_search(lambda masks: margin_reward(ask(masks), answer), tokens, beam):  # noqa: B023
                    mask = indices_to_mask(torch.tensor(chosen), TOKENS)
                    found[name].add(len(chosen), ask(mask[None])[0], answer)
            for (name, count), condition in conditions.items():
                selection = condition.select(adapter, scene, number, generator)
                if selection.num_kept != count:
                    raise SelectionError(f"{name} kept {selection.num_kept} tokens where {count} are compared")
                found[name].add(count, ask(indices_to_mask(selection.indices, TOKENS)[None])[0], answer)
            clusters.append(scene_number)
            if progress is not None:
                progress(len(clusters), questions)
    result = []
    for name, marks in found.items():
        for count, right in marks.right.items():
            accuracy = clustered_mean([float(mark) for mark in right], clusters)
            margin = sum(marks.margin[count]) / len(right)
            result.append(
                {
                    "method": name,
                    "tokens": count,
                    "accuracy": accuracy.mean,
                    "stderr": accuracy.stderr,
                    "margin": margin,
                }
            )
    return {"seed": seed, "questions": len(clusters), "scenes": len(set(clusters)), "rows": result}


def _asked(adapter: Adapter, scene: SceneBatch, number: int) -> Callable[[Tensor], Tensor]:
    """Return a function from keep-masks (G, N) to the option logits (G, 4) of one question of a scene."""
    row = scene.encoded.input_ids[number][scene.encoded.attention_mask[number]][None]
    features = adapter.ready_features(scene.encoded.videos[number].features)
    inputs = {"input_ids": row, "attention_mask": torch.ones_like(row), "mm_encoder_outputs": features}
    rollouts = Rollouts(adapter, inputs)
    return lambda masks: rollouts.option_logits(masks, scene.options[number])


def search_table(result: dict[str, Any]) -> Table:
    """Return accuracy and margin by number of tokens."""
    counts = sorted({row["tokens"] for row in result["rows"]})
    cell = {(row["method"], row["tokens"]): row for row in result["rows"]}
    rows = [
        [method, *(f"{cell[method, n]['accuracy']:.2f} ({cell[method, n]['margin']:+.1f})" for n in counts)]
        for method in dict.fromkeys(row["method"] for row in result["rows"])
    ]
    largest = max(row["stderr"] for row in result["rows"])
    note = f"{result['questions']} questions; accuracy (margin); standard errors at most {largest:.2f}."
    return Table("search (with the answer in hand)", ("tokens", *map(str, counts)), rows, notes=[note])
