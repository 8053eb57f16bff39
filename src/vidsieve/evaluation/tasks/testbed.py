"""Questions about fresh scenes of the testbed, each scored by its options; a scene is encoded once for all of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar, cast

import torch
from torch import Generator, Tensor

from vidsieve.adapters.adapter import Adapter
from vidsieve.adapters.encoded import Encoded
from vidsieve.adapters.fingerprint import model_digest
from vidsieve.adapters.trace import VideoTrace
from vidsieve.adapters.transformers_api import cache_argument, new_cache
from vidsieve.answering import likeliest, next_token_logits
from vidsieve.compressors.base import Compressor
from vidsieve.compressors.front import Front
from vidsieve.errors import BudgetError, NeedError, PromptError, StageError, UnsupportedCallError
from vidsieve.evaluation.accuracy import KEPT, accuracy_rows, accuracy_table
from vidsieve.evaluation.conditions import Condition, label_of
from vidsieve.evaluation.experiment import Measurement, Results
from vidsieve.evaluation.table import Table
from vidsieve.io.faults import contained
from vidsieve.testbed.model import WORD_ID, chat_inputs
from vidsieve.testbed.questions import Question, make_questions
from vidsieve.testbed.world import TOKENS, Cast, make_cast, render
from vidsieve.types import ENCODER_NEEDS, Need, Selection, Stage, Tokens


@dataclass(frozen=True)
class SceneBatch:
    """One scene, encoded once, with all its prompts in one batch."""

    index: int
    cast: Cast
    questions: list[Question]
    encoded: Encoded
    options: Tensor
    answers: Tensor


@dataclass(frozen=True)
class Oracle:
    """A way to select tokens that no method has, because it knows the scene.

    Parameters
    ----------
    name, variant : str
    retention : float
    select : callable
        Returns the selection for one question from (adapter, scene, number of the question, generator).
    per_question : bool
        False if one selection serves the whole scene.
    """

    name: str
    retention: float
    select: Callable[[Adapter, SceneBatch, int, Generator], Selection]
    variant: str = "-"
    per_question: bool = True


@dataclass(frozen=True)
class SceneCondition(Condition):
    """A condition of the testbed.

    Parameters
    ----------
    suffix : str
        What is changed of the method, in brackets behind its name.
    other_question : bool
        True if the method is given the next question of the same scene.
    oracle : Oracle, optional
        Selects instead of a method.
    """

    suffix: str = ""
    other_question: bool = False
    oracle: Oracle | None = None

    def described(self) -> dict[str, Any]:
        """Return the columns of a table that describe the condition; retentions are fractions."""
        row = super().described()
        del row["frames"]
        if self.oracle is not None:
            return {
                **row,
                "method": self.oracle.name,
                "variant": self.oracle.variant,
                "retention": self.oracle.retention,
            }
        ratio = 1.0 if self.method is None else float(self.method.budget_ratio(TOKENS))
        return {**row, "method": row["method"] + self.suffix, "retention": ratio}

    @property
    def key(self) -> str:
        """A name that no other condition of a run has."""
        row = self.described()
        name = self.label + self.suffix if self.label else row["method"]
        return f"{name}/{row['variant']}/{row['retention']:g}"

    @property
    def needs(self) -> frozenset[Need]:
        """Signals that the method reads."""
        return frozenset() if self.method is None else self.method.needs

    @property
    def per_question(self) -> bool:
        """True if tokens are selected for each question of a scene."""
        return Need.QUESTION in self.needs if self.oracle is None else self.oracle.per_question

    def select(self, adapter: Adapter, scene: SceneBatch, number: int, generator: Generator) -> Selection:
        """Return the selection for one question of a scene."""
        if self.oracle is not None:
            return self.oracle.select(adapter, scene, number, generator)
        if self.method is None:
            return Selection(torch.arange(TOKENS))
        number = (number + 1) % len(scene.questions) if self.other_question else number
        return self.method.compress(adapter.video_tokens(scene.encoded, number, self.needs), generator=generator)


FULL = SceneCondition()


def scene_conditions(
    methods: dict[str, Compressor], retentions: Sequence[float | Tokens], probes: bool = False
) -> list[SceneCondition]:
    """Return all tokens, and every named method at every retention.

    `probes` adds, for methods that read the question, the same method given another question, and, where it
    has them, its other ways of spending the budget.
    """
    conditions = [FULL]
    for retention in retentions:
        for name, method in methods.items():
            plain = SceneCondition(method.with_retention(retention), label=label_of(name))
            conditions.append(plain)
            if not probes or Need.QUESTION not in plain.needs:
                continue
            conditions.append(replace(plain, suffix="[other question]", other_question=True))
            current = getattr(method, "allocation", None)
            for way in ("frame_avg", "frame_ada", "frame_ada_st"):
                if current is not None and way != current:
                    changed = replace(plain.method, allocation=way)  # type: ignore[type-var]
                    conditions.append(replace(plain, method=changed, suffix=f"[{way}]"))
    return conditions


@dataclass(frozen=True)
class ScenesTask:
    """Fresh questions of the testbed.

    Parameters
    ----------
    adapter, processor : of the model
    world : str
        Its name in `WORLDS`.
    seed : int
    questions : int
        Number of questions; those about the last scene are cut to fit.
    model : str
        Name of the model in ``run.json``.
    """

    adapter: Adapter
    processor: Any
    world: str
    seed: int
    questions: int
    model: str = "testbed"
    name: str = "testbed"
    form: ClassVar = (("right", bool), *KEPT)

    @cached_property
    def scenes(self) -> list[list[Question]]:
        """The questions about every scene."""
        return scene_questions(self.world, self.seed, self.questions)

    def settings(self) -> dict[str, Any]:
        """Return the settings that records depend on."""
        about = {"world": self.world, "seed": self.seed, "questions": self.questions, "model": self.model}
        return {**about, "model_digest": model_digest(self.adapter.model)}

    def units(self) -> list[str]:
        """Return the numbers of the scenes."""
        return [str(number) for number in range(len(self.scenes))]

    def measure(self, unit: str, conditions: Sequence[Condition]) -> Iterator[Measurement]:
        """Yield for every question of a scene and condition: ``kind, right``, and ``kept, total, layers`` if known.

        Where one selection serves all questions, only the first one has what was kept.
        """
        able = cast("Sequence[SceneCondition]", conditions)
        needs = frozenset().union(*(condition.needs for condition in able)) & ENCODER_NEEDS
        index = int(unit)
        count = len(self.scenes[index])
        scenes: dict[Front | None, SceneBatch] = {}
        refused: dict[str, str] = {}
        for condition in able:
            with contained(refused, condition.key, BudgetError, NeedError, StageError, UnsupportedCallError):
                if condition.method is not None:
                    self.adapter.check(condition.method)
                if (front := condition.front) not in scenes:
                    scenes[front] = read_scene(
                        self.adapter, self.processor, self.world, self.seed, index, count, needs, front
                    )
                scene = scenes[front]
                marks, traces = answers(self.adapter, scene, condition, self.seed + index)
                for number, (question, right) in enumerate(zip(scene.questions, marks, strict=True)):
                    kept: dict[str, Any] = {}
                    if number < len(traces):
                        trace = traces[number]
                        kept = {"kept": trace.kept, "total": trace.total, "layers": trace.layer_retention}
                    ms = traces[number].select_ms if number < len(traces) else None
                    values = {"kind": question.kind, "right": right, **kept}
                    yield Measurement(self._item(index, number), condition.key, values, ms)
        yield from (Measurement(condition=key, reason=reason) for key, reason in refused.items())

    def _item(self, scene: int, number: int) -> str:
        return f"{self.world}-{self.seed}-{scene}-{number}"

    @property
    def items(self) -> dict[str, int]:
        """The scene of every question."""
        return {self._item(scene, n): scene for scene, some in enumerate(self.scenes) for n in range(len(some))}

    def marks(self, results: Results) -> dict[str, list[bool]]:
        """Return for every condition with a row whether each question is answered rightly."""
        samples = {condition.key: results.samples[condition.key] for condition in results.measured}
        return {key: [answered[item]["right"] for item in self.items] for key, answered in samples.items()}

    def tabulate(self, results: Results) -> Table:
        """Return the table of accuracies.

        The result has ``world, seed, n_questions, n_scenes, rows, refused``; rows are those of `accuracy_rows` with
        ``positions`` and ``by_kind``.
        """
        kinds = [question.kind for some in self.scenes for question in some]
        groups = {item: {"kind": (kind,)} for item, kind in zip(self.items, kinds, strict=True)}
        rows = accuracy_rows(results, groups, list(self.items.values()), "right")
        for row in rows:
            by_kind = {kind: row["by"]["kind"][kind]["accuracy"] for kind in sorted(set(kinds))}
            row |= {"positions": "installed", "by_kind": by_kind}
        return accuracy_table(
            {
                "world": self.world,
                "seed": self.seed,
                "n_questions": len(kinds),
                "n_scenes": len(self.scenes),
                "rows": rows,
                "refused": results.refused_rows(),
            }
        )


def scene_questions(world: str, seed: int, questions: int) -> list[list[Question]]:
    """Return the questions of each scene, `questions` in all; those of the last scene are cut to fit."""
    scenes: list[list[Question]] = []
    while questions > 0:
        index = len(scenes)
        scenes.append(make_questions(make_cast(world, seed, index), seed, index)[:questions])
        questions -= len(scenes[-1])
    return scenes


@torch.no_grad()
def read_scene(
    adapter: Adapter,
    processor: Any,
    world: str,
    seed: int,
    index: int,
    count: int,
    needs: frozenset[Need] = frozenset(),
    front: Front | None = None,
) -> SceneBatch:
    """Return one scene with its first `count` questions, and the signals of the vision encoder that are in `needs`.

    `front` acts before or inside the vision encoder.
    """
    cast = make_cast(world, seed, index)
    questions = make_questions(cast, seed, index)[:count]
    inputs = chat_inputs(processor, render(cast, seed, index), [q.text for q in questions])
    pixels = inputs.pop("pixel_values_videos")
    # One pass through the vision tower serves every question of the scene.
    features = adapter.features({"pixel_values_videos": pixels}, needs, front)[0]
    return SceneBatch(
        index,
        cast,
        questions,
        adapter.encode_shared(inputs, features),
        torch.tensor([[WORD_ID[w] for w in q.options] for q in questions]),
        torch.tensor([q.options.index(q.answer) for q in questions]),
    )


@torch.no_grad()
def answers(
    adapter: Adapter, scene: SceneBatch, condition: SceneCondition, seed: int
) -> tuple[list[bool], list[VideoTrace]]:
    """Return for each question of a scene whether the model answers it rightly, and what was kept.

    Without a selection for each question there is one trace, of the whole scene.
    """
    logits, traces = _logits(adapter, scene, condition, Generator().manual_seed(seed))
    return _right(scene, logits), traces


def _logits(
    adapter: Adapter, scene: SceneBatch, condition: SceneCondition, generator: Generator
) -> tuple[Tensor, list[VideoTrace]]:
    """Return next-token logits (questions, V) of a scene's prompts under a condition, and what was kept."""
    method = condition.method
    if method is not None and method.acts is Stage.LAYER:
        plan = adapter.plan(scene.encoded, method, generator)
        return next_token_logits(adapter, plan), list(plan.traces)
    selections, traces = _selected(adapter, scene, condition, generator)
    if not condition.per_question:
        return logits_of_one_selection(adapter, scene.encoded, selections[0]), traces
    return next_token_logits(adapter, adapter.plan(scene.encoded, selected=(selections, traces))), traces


def logits_of_one_selection(adapter: Adapter, encoded: Encoded, selection: Selection) -> Tensor:
    """Return next-token logits (B, V) of B prompts about one video of which one selection is read.

    What the prompts begin with, the video included, is read once; the rest of each follows on a copy of its cache.
    Equal to `next_token_logits` of the whole batch up to rounding.

    Raises
    ------
    PromptError
        If the prompts differ before the end of the video.
    """
    rows = encoded.input_ids.shape[0]
    whole = adapter.build(encoded, [[selection]] * rows)
    ids, real, positions = (whole.inputs[name] for name in ("input_ids", "attention_mask", "position_ids"))
    lengths = real.sum(1)
    # Right-padded, so that every row's prompt begins in column 0.
    columns = (torch.arange(ids.shape[1]) + (ids.shape[1] - lengths)[:, None]).clamp(max=ids.shape[1] - 1)
    ids, positions = ids.gather(1, columns), positions.gather(-1, columns.expand_as(positions))
    same = (ids == ids[:1]).all(0) & (torch.arange(ids.shape[1]) < lengths.min() - 1)
    shared = int(same.long().cumprod(0).sum())
    if bool((ids[:, shared:] == adapter.video_token_id).any()):
        raise PromptError("the prompts differ before the end of the video: ask about one video at a time")
    first = adapter.build(encoded, [[selection]], rows=[0]).inputs | {
        "input_ids": ids[:1, :shared],
        "attention_mask": torch.ones_like(ids[:1, :shared]),
        "position_ids": positions[..., :1, :shared],
    }
    # Handed over, since the name under which a model returns its cache has changed.
    cache, name = new_cache(adapter.model), cache_argument(adapter.model)
    adapter.model(**first, **{name: cache}, logits_to_keep=1, use_cache=True)
    cache.batch_repeat_interleave(rows)
    logits: Tensor = adapter.model(
        input_ids=ids[:, shared:],
        attention_mask=(torch.arange(ids.shape[1]) < lengths[:, None]).long(),
        position_ids=positions[..., shared:],
        use_cache=True,
        **{name: cache},
    ).logits
    return logits[torch.arange(rows), lengths - 1 - shared]


def _selected(
    adapter: Adapter, scene: SceneBatch, condition: SceneCondition, generator: Generator
) -> tuple[list[Selection], list[VideoTrace]]:
    """Return the selection for every question, and a trace for each time tokens were selected."""
    row = condition.described()
    named = {"method": row["method"], "variant": row["variant"], "nominal": f"{row['retention']:g}"}
    selections: list[Selection] = []
    traces: list[VideoTrace] = []
    for number in range(len(scene.questions)):
        if number and not condition.per_question:
            selections.append(selections[0])
            continue
        start = time.perf_counter()
        selections.append(condition.select(adapter, scene, number, generator))
        spent = 1e3 * (time.perf_counter() - start)
        features = scene.encoded.videos[number].features
        trace = VideoTrace.of(
            number,
            features.grid,
            selections[-1],
            spent,
            **named,
            encoded=features.encoded,
            frames=features.frames,
            whole=features.whole,
        )
        traces.append(trace)
    return selections, traces


def _right(scene: SceneBatch, logits: Tensor) -> list[bool]:
    """Return True for every question whose answer has the highest of its options' logits (questions, V)."""
    right: list[bool] = (likeliest(logits.gather(1, scene.options)) == scene.answers).tolist()
    return right
