"""The blind test: leave out questions that a model answers without seeing the video.

A rollout's reward tells which tokens an answer depends on only where the answer depends on the video at all
(ineffective-sample filtering, CaCoVID §3.3). One blind answer is right by luck in a quarter of the questions with four
options; several, with the options in other orders, are not.
"""

from __future__ import annotations

import os
import random
import zlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from vidsieve.answering import likeliest
from vidsieve.errors import TrainingError
from vidsieve.io.files import beside, writing
from vidsieve.io.journal import Store, measure_all
from vidsieve.io.texts import json_line
from vidsieve.training.data.layouts import moved
from vidsieve.training.data.rows import Remembered, ask, kind_of, labelled, relettered
from vidsieve.training.data.skipped import Skipped
from vidsieve.training.data.table import View, load_rows

Rule = Literal["any", "all"]
Loaded = tuple[Any, Any]
BLOCK = 32
"""Questions of a unit; a killed run asks at most so many again."""


@torch.no_grad()
def blind_answers(
    model: Any,
    processor: Any,
    rows: Sequence[Mapping[str, Any]],
    *,
    batch: int = 16,
    seed: int = 0,
    temperature: float = 1.0,
) -> list[bool]:
    """Return a bool for each multiple-choice row, True if the model picks the right option without the video.

    Parameters
    ----------
    batch : int
        Questions in one call.
    seed : int
        0: the likeliest option, options as they are. Else listed options come in an order, and the answer is drawn from
        the model's probabilities of the options, both by this seed and the question.
    temperature : float
        Of drawn answers; below 1 likely options become likelier.

    Raises
    ------
    TrainingError
        As `ask`.
    """
    marks: list[bool] = []
    for start in range(0, len(rows), batch):
        part = rows[start : start + batch]
        chances = [random.Random(zlib.crc32(f"{seed} {row['question']}".encode())) for row in part]
        questions = [
            ask(relettered(row, chance) if seed else row, processor.tokenizer)
            for row, chance in zip(part, chances, strict=True)
        ]
        texts = [
            processor.apply_chat_template(
                [{"role": "user", "content": [{"type": "text", "text": question.text}]}],
                add_generation_prompt=True,
                tokenize=False,
            )
            for question in questions
        ]
        encoded = processor.tokenizer(
            texts, padding=True, padding_side="left", add_special_tokens=False, return_tensors="pt"
        )
        inputs = {key: encoded[key].to(model.device) for key in ("input_ids", "attention_mask")}
        # One step of generate, so that positions of padded rows are the model's own.
        out = model.generate(
            **inputs, max_new_tokens=1, do_sample=False, output_logits=True, return_dict_in_generate=True
        )
        for logits, question, chance in zip(out.logits[0].double().cpu(), questions, chances, strict=True):
            options = logits[question.option_ids]
            if seed:
                weights = (options / temperature).softmax(0).tolist()
                picked = chance.choices(range(len(weights)), weights)[0]
            else:
                picked = int(likeliest(options))
            marks.append(picked == question.answer)
    return marks


@dataclass(frozen=True)
class Filtered:
    """The outcome of a filter.

    Parameters
    ----------
    questions, kept : int
        Multiple-choice questions before and after.
    captions, others : int
        Rows without a question, and questions of other kinds: kept as they are.
    blind_accuracy : tuple of float
        By model: fraction of right answers, over all seeds.
    chance : float
        Fraction that guessing would get right.
    groups : list of dict
        By source and type of question: questions, dropped, blind accuracy by model.
    missing : tuple of (int, str)
        Number of missing videos, which the blind test does not need, and the first one.
    """

    questions: int
    kept: int
    captions: int
    others: int
    blind_accuracy: tuple[float, ...]
    chance: float
    groups: list[dict[str, Any]]
    missing: tuple[int, str] = (0, "")


def filter_file(
    path: Path,
    out: Path,
    models: Sequence[Loaded | Callable[[], Loaded]],
    rule: Rule = "any",
    *,
    root: Path | None = None,
    seeds: int = 1,
    right_in: int | None = None,
    temperature: float = 1.0,
    batch: int = 16,
    work: Path | None = None,
    names: Sequence[str] = (),
    share: tuple[int, int] = (0, 1),
    skipped: Skipped | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Filtered | None:
    """Write the rows of a file of prompts that need their video, as JSON lines with paths from `out`.

    Rows that are left out, with what each model answered how often, go to ``out.dropped.jsonl`` beside ``out.jsonl``.

    Parameters
    ----------
    path, root : Path
        As `read_records`.
    models : sequence of (model, processor), or of callables that load one
        One is in memory at a time, if they are callables.
    rule : {"any", "all"}
        A question goes when any of the models answers it blindly, or when all of them do.
    seeds : int
        Answers of each model to each question, under seeds 0, 1, … of `blind_answers`.
    right_in : int, optional
        Right answers that make a model answer blindly; default: all.
    work : Path, optional
        A folder where answers are kept as they come, of all shares: the same call resumes there. Default: memory.
    names : sequence of str
        Names of the models.
    share : (int, int)
        Number of this process, from 0, and number of processes.
    skipped : Skipped, optional
        Counts and lists malformed records, which are left out too.
    progress : callable, optional
        Called with (answers done, answers in all) of this share.

    Returns
    -------
    Filtered, or None while other shares have not answered theirs.

    Raises
    ------
    TrainingError
        If the file has no question, or none of them needs its video.
    EvaluationError
        If `work` holds answers to something else.
    """
    needed = seeds if right_in is None else right_in
    if seeds < 1 or temperature <= 0:
        raise TrainingError(f"seeds must be at least 1 and temperature above 0; got {seeds} and {temperature}")
    if not 1 <= needed <= seeds:
        raise TrainingError(f"right_in must be from 1 to seeds: {needed} of {seeds} answers cannot be right")
    if len(set(names)) < len(names):
        raise TrainingError(f"each model must be another one, or its answers count twice: {', '.join(names)}")
    names = [*names] or [f"model {number}" for number in range(1, len(models) + 1)]
    current: dict[int, Loaded] = {}

    def loaded(number: int) -> Loaded:
        if number not in current:
            current.clear()  # first, so that one model is in memory at a time
            model = models[number]
            current[number] = model() if callable(model) else model
        return current[number]

    tokenizer = Remembered(loaded(0)[1].tokenizer)
    wanted = partial(_unusable, tokenizer=tokenizer)
    rows = load_rows(path, root, wanted=wanted, skipped=skipped, present=False, answers=False)
    numbered = zip(rows.numbers, rows, strict=True)
    choices = (number for number, row in numbered if kind_of(row) == "multiple choice" and labelled(row))
    questions = View(rows.table, choices)
    if not len(questions):
        raise TrainingError(f"{path} has no multiple-choice questions to filter")
    blocks = -(-len(questions) // BLOCK)
    units = [f"{model}/{block}" for model in range(len(models)) for block in range(blocks)]
    total = len(units[share[0] :: share[1]]) * BLOCK * seeds

    def measure(unit: str) -> dict[str, Any]:
        number, block = (int(part) for part in unit.split("/"))
        model, processor = loaded(number)
        part = [questions[place] for place in range(block * BLOCK, min((block + 1) * BLOCK, len(questions)))]
        marks = [
            blind_answers(model, processor, part, batch=batch, seed=seed, temperature=temperature)
            for seed in range(seeds)
        ]
        return {"right": ["".join("01"[mark] for mark in answers) for answers in marks]}

    def check(record: Mapping[str, Any]) -> None:
        block = int(record["unit"].split("/")[1])
        if [len(text) for text in record["right"]] != [min(BLOCK, len(questions) - block * BLOCK)] * seeds:
            raise ValueError("it is of other questions or seeds")

    def step(done: int, count: int) -> None:
        if progress is not None:
            progress(done * BLOCK * seeds, total)

    config = {
        "file": str(path.resolve()),
        "questions": len(questions),
        "text": _digest(questions),
        "models": names,
        "seeds": seeds,
        "temperature": temperature,
    }
    with nullcontext() if work is None else Store(work, config, share, check) as store:
        records = measure_all(store, units, measure, step)
    if len(records) < len(units):
        return None
    marks = [
        ["".join(records[f"{model}/{block}"]["right"][seed] for block in range(blocks)) for seed in range(seeds)]
        for model in range(len(models))
    ]
    right = np.array([[[mark == "1" for mark in text] for text in some] for some in marks], bool)
    blind = right.sum(1) >= needed
    gone = blind.any(0) if rule == "any" else blind.all(0)
    if gone.all():
        raise TrainingError(
            f"all {len(questions)} questions of {path} are answered rightly without the video: none would teach "
            "anything. Take other questions, more seeds, or rule 'all' with a second model"
        )
    _write(out, rows, questions, gone, right, names)
    return _filtered(rows, questions, gone, right)


def _unusable(row: Mapping[str, Any], tokenizer: Any) -> str:
    """Return no reason to leave a row out, as rows of all kinds are read; raise for a question that cannot be asked."""
    if kind_of(row) == "multiple choice":
        ask(row, tokenizer)
    return ""


def _digest(rows: View) -> int:
    """Return a checksum of the questions in their order."""
    digest = 0
    for row in rows:
        digest = zlib.crc32(f"{row['question']} {row['options']} {row['answer']}".encode(), digest)
    return digest


def _write(
    out: Path, rows: View, questions: View, gone: NDArray[np.bool_], right: NDArray[np.bool_], names: Sequence[str]
) -> None:
    """Write the rows that are left to `out`, and the others to ``out.dropped.jsonl`` beside ``out.jsonl``."""
    place = {number: index for index, number in enumerate(questions.numbers) if gone[index]}
    with (
        writing(out) as kept_path,
        kept_path.open("w", encoding="utf-8") as kept,
        writing(beside(out, "dropped.jsonl")) as dropped_path,
        dropped_path.open("w", encoding="utf-8") as dropped,
    ):
        for number, row in zip(rows.numbers, rows, strict=True):
            file, line = kept, row | moved(row, out)
            if number in place:
                answers = right[:, :, place[number]].sum(1).tolist()
                line |= {"right_blindly": dict(zip(names, answers, strict=True)), "of": right.shape[1]}
                file = dropped
            file.write(json_line(line))


def _filtered(rows: View, questions: View, gone: NDArray[np.bool_], right: NDArray[np.bool_]) -> Filtered:
    groups: dict[tuple[str, str], list[int]] = {}
    chance = 0.0
    for index, row in enumerate(questions):
        groups.setdefault((str(row.get("source", "")), str(row.get("kind", kind_of(row)))), []).append(index)
        chance += 1 / len(row["options"])
    table = [
        {
            "source": source,
            "type": kind,
            "questions": len(members),
            "dropped": int(gone[members].sum()),
            "blind_accuracy": right[:, :, members].mean((1, 2)).tolist(),
        }
        for (source, kind), members in sorted(groups.items())
    ]
    captions = sum("question" not in row for row in rows)
    missing = [shown.name for shown in rows.table.files.values() if not os.path.isfile(shown.name)]
    return Filtered(
        len(questions),
        len(questions) - int(gone.sum()),
        captions,
        len(rows) - len(questions) - captions,
        tuple(right.mean((1, 2)).tolist()),
        chance / len(questions),
        table,
        (len(missing), (missing or [""])[0]),
    )
