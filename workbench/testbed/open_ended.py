"""Beyond one word of four: captions, counting, order, what is not there, and a second turn, on the testbed.

The model of `workbench.testbed.talking` answers in its own words. A statement of a caption is one sentence; it is right
if it is one of those that are true of the scene.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Generator, Tensor

from vidsieve.adapters.adapter import Adapter
from vidsieve.adapters.encoded import Encoded, VideoFeatures
from vidsieve.adapters.fingerprint import model_digest
from vidsieve.adapters.plan import Plan
from vidsieve.adapters.session import attach
from vidsieve.adapters.transformers_api import cache_kwargs, output_cache
from vidsieve.answering import next_token_logits
from vidsieve.compressors.base import Compressor
from vidsieve.errors import BudgetError
from vidsieve.evaluation.conditions import Condition
from vidsieve.evaluation.experiment import Measurement, Results
from vidsieve.evaluation.stats import Estimate, clustered_mean, paired_difference
from vidsieve.evaluation.table import Table, difference, few_note, named, with_error
from vidsieve.io.faults import contained
from vidsieve.testbed.model import chat_inputs
from vidsieve.testbed.questions import CAPTION_PROMPT, Question, make_caption, make_questions
from vidsieve.testbed.world import render
from vidsieve.types import ENCODER_NEEDS, Need, Selection, Stage
from workbench.testbed.model import repeated_features
from workbench.testbed.talking import ABSENT, NOTHING, absent_questions, counting_questions, open_cast

TASKS = {
    "found": "true statements of a caption, of all that could be made",
    "false": "statements of a caption that are not",
    "count": "how many there are, right",
    "order": "which was first or last, right",
    "there": "what is there, told rightly",
    "made up": "what is not there, told all the same",
    "second turn": "second questions of a dialogue, answered rightly",
}
"""Measured fractions; of "false" and "made up" less is better."""
CAPTION_WORDS = 200
_SEPARATE = " ."


@dataclass(frozen=True)
class OpenScene:
    """A scene's features, its questions, and the statements that are true of it."""

    features: VideoFeatures
    questions: list[Question]
    statements: frozenset[str]


@torch.no_grad()
def read_scene(
    adapter: Adapter, processor: Any, world: str, seed: int, index: int, needs: frozenset[Need] = frozenset()
) -> OpenScene:
    """Return one scene, some of its objects taken out, with signals of the vision encoder that are in `needs`."""
    cast, gone = open_cast(world, seed, index)
    inputs = chat_inputs(processor, render(cast, seed, index), [CAPTION_PROMPT])
    (features,) = adapter.features(inputs, needs)
    asked = [
        *make_questions(cast, seed, index),
        *counting_questions(cast, seed, index),
        *absent_questions(cast, gone, seed, index),
    ]
    return OpenScene(features, asked, frozenset(statements(make_caption(cast))))


def statements(caption: str) -> list[str]:
    """Return the sentences of a caption; words behind the last full stop are no sentence."""
    return [part.strip() for part in caption.split(_SEPARATE)[:-1]]


def prompts(adapter: Adapter, processor: Any, scene: OpenScene, turns: Sequence[Sequence[str]]) -> Encoded:
    """Return a batch of conversations about a scene; each is a question, or question, answer, question."""
    encoded = adapter.encode(prompt_inputs(processor, scene.features, turns))
    return encoded.with_signals(scene.features)


def prompt_inputs(processor: Any, features: VideoFeatures, turns: Sequence[Sequence[str]]) -> dict[str, Any]:
    """Return the model's inputs of such a batch, padded on the left, the video encoded already."""
    texts = []
    for said in turns:
        first = {"role": "user", "content": [{"type": "video"}, {"type": "text", "text": said[0]}]}
        more = [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(said) if n]
        texts.append(processor.apply_chat_template([first, *more], add_generation_prompt=True, tokenize=False))
    token, count = processor.video_token, features.grid.num_tokens + features.tail.shape[0]
    texts = [text.replace(token, token * count) for text in texts]
    made = processor.tokenizer(texts, return_tensors="pt", padding=True, padding_side="left")
    ready = {"video": repeated_features(features, len(texts))}
    return {"input_ids": made["input_ids"], "attention_mask": made["attention_mask"], "mm_encoder_outputs": ready}


def planned(adapter: Adapter, encoded: Encoded, method: Compressor | None, seed: int) -> Plan:
    """Return the plan of a method for prompts about one scene; one that ignores the question selects once for all."""
    generator = Generator().manual_seed(seed)
    if method is None or method.acts is not Stage.PRE_LLM or Need.QUESTION in method.needs:
        return adapter.plan(encoded, method, generator)
    selection = method.compress(adapter.video_tokens(encoded, 0, method.needs), generator=generator)
    return adapter.plan(encoded, method, selected=([selection] * len(encoded.videos), []))


def first_words(adapter: Adapter, plan: Plan) -> Tensor:
    """Return the likeliest word after every prompt, (B,) int64."""
    words: Tensor = next_token_logits(adapter, plan).argmax(-1)
    return words


def _second_words(
    adapter: Adapter, processor: Any, scene: OpenScene, pairs: Sequence[tuple[str, str]], method: Compressor, seed: int
) -> Tensor:
    """Return the first words of second answers, on the cache that a method inside the LLM left after the first."""
    read = processor.tokenizer
    inputs = prompt_inputs(processor, scene.features, [(first,) for first, _ in pairs])
    more = [f"<|im_end|> <|im_start|> user {second} <|im_end|> <|im_start|> assistant" for _, second in pairs]
    rest = read(more, return_tensors="pt")["input_ids"]
    with attach(adapter.model, method, seed=seed):
        out = adapter.model.generate(**inputs, max_new_tokens=1, do_sample=False, return_dict_in_generate=True)
        whole = torch.cat([out.sequences, rest], 1)
        said: Tensor = adapter.model.generate(
            input_ids=whole, **cache_kwargs(adapter.model, output_cache(out)), max_new_tokens=1, do_sample=False
        )
    return said[:, -1]


def dialogue_pairs(questions: Sequence[Question]) -> list[tuple[int, int]]:
    """Return pairs of numbers of a scene's questions, every text as long as the others; each is asked second once."""
    lengths = Counter(len(q.text.split()) for q in questions)
    most = max(lengths, key=lambda length: (lengths[length], length))
    same = [number for number, q in enumerate(questions) if len(q.text.split()) == most]
    return list(zip(same, same[1:] + same[:1], strict=True)) if len(same) > 1 else []


def _told(adapter: Adapter, processor: Any, plan: Plan) -> list[str]:
    with plan.acting():
        out = adapter.model.generate(**plan.inputs, max_new_tokens=CAPTION_WORDS, do_sample=False)
    said: list[str] = processor.batch_decode(out[:, plan.inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return said


@dataclass(frozen=True)
class OpenTask:
    """Scenes with captions, questions and dialogues, answered in the model's own words.

    Parameters
    ----------
    adapter, processor : of the model
    world : str
        Its name in `WORLDS`.
    seed, scenes : int
    model : str
        Name of the model in ``run.json``.
    """

    adapter: Adapter
    processor: Any
    world: str
    seed: int
    scenes: int
    model: str = "talker"
    name: str = "open"
    form: ClassVar = (("task", str), ("said", str), ("score", float))

    def settings(self) -> dict[str, Any]:
        """Return the settings that records depend on."""
        about = {"world": self.world, "seed": self.seed, "scenes": self.scenes, "model": self.model}
        return {**about, "model_digest": model_digest(self.adapter.model)}

    def units(self) -> list[str]:
        """Return the numbers of the scenes."""
        return [str(number) for number in range(self.scenes)]

    def measure(self, unit: str, conditions: Sequence[Condition]) -> list[Measurement]:
        """Return the marks of one scene."""
        methods = [condition.method for condition in conditions if condition.method is not None]
        needs: frozenset[Need] = frozenset().union(*(method.needs for method in methods)) & ENCODER_NEEDS
        scene = read_scene(self.adapter, self.processor, self.world, self.seed, int(unit), needs)
        return self.measure_scene(scene, unit, conditions)

    @torch.no_grad()
    def measure_scene(self, scene: OpenScene, unit: str, conditions: Sequence[Condition]) -> list[Measurement]:
        """Return the marks of one scene, a measurement each: ``task, said, score``."""
        adapter, processor, questions = self.adapter, self.processor, scene.questions
        seed = self.seed + int(unit)
        encoded = prompts(adapter, processor, scene, [(q.text,) for q in questions])
        asked = prompts(adapter, processor, scene, [(CAPTION_PROMPT,)])
        pairs = dialogue_pairs(questions)
        marks: dict[str, list[Mark]] = {}
        refused: dict[str, str] = {}
        captions: dict[str, Selection] = {}
        texts: dict[str, str] = {}
        for condition in conditions:
            key, method = condition.key, condition.method
            with contained(refused, key, BudgetError):
                plan = planned(adapter, encoded, method, seed)
                said = processor.batch_decode(first_words(adapter, plan)[:, None])
                own = [_word_mark(question, word) for question, word in zip(questions, said, strict=True)]
                if method is not None and plan.run is not None:
                    asked_pairs = [(questions[a].text, questions[b].text) for a, b in pairs]
                    second = _second_words(adapter, processor, scene, asked_pairs, method, seed)
                    texts[key] = _told(adapter, processor, planned(adapter, asked, method, seed))[0]
                else:
                    turns = [(questions[a].text, said[a], questions[b].text) for a, b in pairs]
                    talk = prompts(adapter, processor, scene, turns)
                    second = first_words(adapter, adapter.build(talk, [[plan.selections[a]] for a, _ in pairs]))
                    captions[key] = planned(adapter, asked, method, seed).selections[0]
                words = zip(processor.batch_decode(second[:, None]), pairs, strict=True)
                own += [Mark("second turn", word, word == questions[b].answer) for word, (_, b) in words]
                marks[key] = own
        # Captions of all methods before the LLM are generated in one batch.
        together = prompts(adapter, processor, scene, [(CAPTION_PROMPT,)] * len(captions))
        built = adapter.build(together, [[selection] for selection in captions.values()])
        texts |= zip(captions, _told(adapter, processor, built), strict=True)
        records = [
            Measurement(f"{unit}-{number}", key, {"task": mark.task, "said": mark.said, "score": float(mark.score)})
            for key, own in marks.items()
            for number, mark in enumerate([*own, *_caption_marks(texts[key], scene)])
        ]
        return records + [Measurement(condition=key, reason=reason) for key, reason in refused.items()]

    def tabulate(self, results: Results) -> Table:
        """Return the table.

        The result has ``world, seed, scenes, rows, refused``; per row what the condition is and ``tasks``, by `TASKS`:
        ``mean, stderr, asked``, and ``vs_full: {diff, stderr}``, paired.
        """
        marks = {condition.key: _by_task(results, condition.key) for condition in results.measured}
        full = next(condition.key for condition in results.conditions if condition.method is None)
        rows = []
        for condition in results.measured:
            tasks = {}
            for task, (values, clusters) in marks[condition.key].items():
                mean = clustered_mean(values, clusters) if values else Estimate(math.nan, math.nan)
                other = marks[full][task][0] if values and condition.key != full else None
                gap = None if other is None else paired_difference(values, other, clusters)
                tasks[task] = {
                    "mean": mean.mean,
                    "stderr": mean.stderr,
                    "asked": len(values),
                    "vs_full": None if gap is None else {"diff": gap.mean, "stderr": gap.stderr},
                }
            rows.append({**condition.described(), "tasks": tasks})
        about = {"world": self.world, "seed": self.seed, "scenes": self.scenes}
        return open_table({**about, "rows": rows, "refused": results.refused_rows()})


@dataclass(frozen=True)
class Mark:
    """One mark of one task, and the words it was given for."""

    task: str
    said: str
    score: float


def _word_mark(question: Question, word: str) -> Mark:
    """Return the mark of a one-word answer; its task is the kind of question, whether `TASKS` has it or not."""
    right = word == question.answer
    if question.kind != ABSENT:
        return Mark(question.kind, word, right)
    return Mark("there", word, right) if question.targets else Mark("made up", word, word != NOTHING)


def _caption_marks(caption: str, scene: OpenScene) -> list[Mark]:
    """Return the fraction of a scene's true statements that a caption makes, and that of its statements not true."""
    said = statements(caption)
    true, false = len(scene.statements & set(said)), sum(line not in scene.statements for line in said)
    possible = len(scene.statements)
    return [
        Mark("found", caption, true / possible if possible else math.nan),
        Mark("false", caption, false / (true + false) if true + false else 0.0),
    ]


def _by_task(results: Results, key: str) -> dict[str, tuple[list[float], list[int]]]:
    """Return a condition's scores at every task, with the numbers of their scenes."""
    scores: dict[str, tuple[list[float], list[int]]] = {task: ([], []) for task in TASKS}
    for number, record in enumerate(results.units.values()):
        for sample in record["samples"]:
            if sample["condition"] == key and sample["task"] in scores:
                values, clusters = scores[sample["task"]]
                values.append(sample["score"])
                clusters.append(number)
    return scores


def open_table(result: Mapping[str, Any]) -> Table:
    """Return the tables of a result: every task, and what pruning costs."""
    lines, lost = [], []
    for row in result["rows"]:
        tasks = [row["tasks"][name] for name in TASKS]
        known = (named(row), row["retention"])
        lines.append((*known, *(with_error(task["mean"], task["stderr"]) for task in tasks)))
        if row["method"] != "full":
            lost.append((*known, *(difference(task["vs_full"]) for task in tasks)))
    columns = ("method", "kept", *TASKS)
    cost = "Points, paired scene by scene with 95 % intervals; of “false” and “made up” more is worse."
    title = f"World {result['world']}, seed {result['seed']}: {result['scenes']} scenes, % ± s.e."
    notes = [*few_note(result["scenes"]), *(f"{name}: {text}" for name, text in TASKS.items())]
    more = [Table("What pruning costs", columns, lost, notes=[cost])]
    return Table.of_result(title, columns, lines, result, notes=notes, more=more)
