"""Beyond one word of four: captions, counting, order, what is not there, and a second turn, on the testbed.

The model of `workbench.testbed.talking` answers in its own words. A statement of a caption is one sentence; it is right
if it is one of those that are true of the scene.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Generator, Tensor

from vidsieve.adapters.adapter import Adapter
from vidsieve.adapters.encoded import Encoded, VideoFeatures
from vidsieve.adapters.plan import Plan
from vidsieve.adapters.pruning import adapter_for
from vidsieve.adapters.session import attach
from vidsieve.adapters.transformers_api import cache_kwargs, output_cache
from vidsieve.answering import next_token_logits
from vidsieve.compressors.base import Compressor
from vidsieve.errors import BudgetError
from vidsieve.evaluation.examiner import Condition
from vidsieve.evaluation.stats import Estimate, clustered_mean, paired_difference
from vidsieve.io.faults import contained
from vidsieve.io.journal import Store, measure_all
from vidsieve.testbed.model import chat_inputs, repeated_features
from vidsieve.testbed.questions import CAPTION_PROMPT, Question, make_caption, make_questions
from vidsieve.testbed.world import render
from vidsieve.types import ENCODER_NEEDS, Need, Selection, Stage
from workbench.testbed.talking import COUNTED, NOTHING, absent_questions, counting_questions, open_cast

TASKS = {
    "found": "true statements of a caption, of all that could be made",
    "false": "statements of a caption that are not",
    "count": "how many there are, right",
    "order": "which was first or last, right",
    "there": "what is there, told rightly",
    "made up": "what is not there, told all the same",
    "second turn": "second questions of a dialogue, answered rightly",
}
"""What is measured, as shares; of "false" and "made up" less is better."""
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
    return encoded.with_signals(scene.features.encoder)


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


@torch.no_grad()
def measure_scene(
    adapter: Adapter, processor: Any, scene: OpenScene, conditions: Mapping[str, Compressor | None], seed: int
) -> dict[str, Any]:
    """Return what the model says of one scene under every condition.

    Returns
    -------
    dict
        ``rows``: per condition ``words: [[kind, asked of, said, right], …]``, ``second: [right, …]`` and ``caption:
        [true, false, could be said]``, numbers of statements. ``refused``: why a method cannot keep so little.
    """
    questions = scene.questions
    encoded = prompts(adapter, processor, scene, [(q.text,) for q in questions])
    asked = prompts(adapter, processor, scene, [(CAPTION_PROMPT,)])
    pairs = dialogue_pairs(questions)
    rows: dict[str, Any] = {}
    refused: dict[str, str] = {}
    captions: dict[str, Selection] = {}
    for key, method in conditions.items():
        with contained(refused, key, BudgetError):
            plan = planned(adapter, encoded, method, seed)
            said = processor.batch_decode(first_words(adapter, plan)[:, None])
            row: dict[str, Any] = {}
            if method is not None and plan.run is not None:
                texts = [(questions[a].text, questions[b].text) for a, b in pairs]
                second = _second_words(adapter, processor, scene, texts, method, seed)
                text = _told(adapter, processor, planned(adapter, asked, method, seed))[0]
                row["caption"] = _judged(text, scene)
            else:
                turns = [(questions[a].text, said[a], questions[b].text) for a, b in pairs]
                talk = prompts(adapter, processor, scene, turns)
                second = first_words(adapter, adapter.build(talk, [[plan.selections[a]] for a, _ in pairs]))
                captions[key] = planned(adapter, asked, method, seed).selections[0]
            answers = processor.batch_decode(second[:, None])
            rows[key] = row | {
                "words": [[q.kind, bool(q.targets), w, w == q.answer] for q, w in zip(questions, said, strict=True)],
                "second": [word == questions[b].answer for word, (_, b) in zip(answers, pairs, strict=True)],
            }
    # Captions of all methods before the LLM are generated side by side.
    together = prompts(adapter, processor, scene, [(CAPTION_PROMPT,)] * len(captions))
    told = _told(adapter, processor, adapter.build(together, [[selection] for selection in captions.values()]))
    for key, text in zip(captions, told, strict=True):
        rows[key]["caption"] = _judged(text, scene)
    return {"rows": rows, "refused": refused}


def _told(adapter: Adapter, processor: Any, plan: Plan) -> list[str]:
    with plan.acting():
        out = adapter.model.generate(**plan.inputs, max_new_tokens=CAPTION_WORDS, do_sample=False)
    said: list[str] = processor.batch_decode(out[:, plan.inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return said


def _judged(caption: str, scene: OpenScene) -> list[int]:
    """Return how many statements of a caption are true, each once, how many are not, and how many could be made."""
    made = statements(caption)
    true = len(scene.statements & set(made))
    return [true, sum(line not in scene.statements for line in made), len(scene.statements)]


def evaluate_open(
    model: Any,
    processor: Any,
    conditions: Mapping[str, Condition],
    *,
    world: str,
    seed: int,
    scenes: int,
    progress: Callable[[int, int], None] | None = None,
    store: Store | None = None,
) -> dict[str, Any]:
    """Return what every condition is worth at every task, and what it loses, with errors clustered by scene.

    Returns
    -------
    dict
        ``world, seed, scenes, rows, refused``; per row what the condition is and ``tasks``, by `TASKS`: ``mean, stderr,
        asked``, and ``vs_full: {diff, stderr}``, paired.
    """
    adapter = adapter_for(model)
    methods = {key: condition.compressor for key, condition in conditions.items()}
    needs: frozenset[Need] = frozenset().union(*(m.needs for m in methods.values() if m)) & ENCODER_NEEDS

    def measure(unit: str) -> dict[str, Any]:
        scene = read_scene(adapter, processor, world, seed, int(unit), needs)
        return measure_scene(adapter, processor, scene, methods, seed + int(unit))

    records = list(measure_all(store, [str(n) for n in range(scenes)], measure, progress).values())
    refused = {key: reason for record in records for key, reason in record["refused"].items()}
    marks = {key: _marks(records, key) for key in conditions if key not in refused}
    full = next(key for key, condition in conditions.items() if condition.compressor is None)
    rows = []
    for key, own in marks.items():
        tasks = {}
        for task, (values, clusters) in own.items():
            mean = clustered_mean(values, clusters) if values else Estimate(math.nan, math.nan)
            gap = paired_difference(values, marks[full][task][0], clusters) if values and key != full else None
            tasks[task] = {
                "mean": mean.mean,
                "stderr": mean.stderr,
                "asked": len(values),
                "vs_full": {"diff": gap.mean, "stderr": gap.stderr} if gap else None,
            }
        rows.append({**conditions[key].described(), "tasks": tasks})
    reasons = [{**conditions[key].described(), "reason": reason} for key, reason in refused.items()]
    return {"world": world, "seed": seed, "scenes": len(records), "rows": rows, "refused": reasons}


def _marks(records: Sequence[Mapping[str, Any]], key: str) -> dict[str, tuple[list[float], list[int]]]:
    """Return a condition's marks at every task, with the scenes they belong to."""
    found: dict[str, tuple[list[float], list[int]]] = {task: ([], []) for task in TASKS}

    def note(task: str, value: float, cluster: int) -> None:
        found[task][0].append(float(value))
        found[task][1].append(cluster)

    for number, record in enumerate(records):
        row = record["rows"][key]
        for kind, there, word, right in row["words"]:
            if kind in (COUNTED, "order"):
                note(kind, right, number)
            elif kind == "absent":
                note("there" if there else "made up", right if there else word != NOTHING, number)
        for right in row["second"]:
            note("second turn", right, number)
        true, false, possible = row["caption"]
        note("found", true / possible if possible else np.nan, number)
        note("false", false / (true + false) if true + false else 0.0, number)
    return found
