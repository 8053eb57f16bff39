"""Leaving out what teaches nothing: questions that a model answers without seeing the video.

A rollout's reward tells which tokens an answer depends on only where the answer depends on the video at all
(ineffective-sample filtering, CaCoVID §3.3).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from vidsieve.data.rows import ask, kind_of, read_rows
from vidsieve.errors import TrainingError
from vidsieve.files import relative, writing

Rule = Literal["any", "all"]


@torch.no_grad()
def blind_answers(
    model: Any, processor: Any, rows: Sequence[dict[str, Any]], *, batch: int = 16,
    progress: Callable[[int], None] | None = None,
) -> list[bool]:  # fmt: skip
    """Return for each multiple-choice row whether the model picks the right option without the video.

    Parameters
    ----------
    batch : int
        Questions in one call.
    progress : callable, optional
        Called with the number of questions done.

    Raises
    ------
    TrainingError
        As `ask`.
    """
    found: list[bool] = []
    for start in range(0, len(rows), batch):
        asked = [ask(row, processor.tokenizer) for row in rows[start : start + batch]]
        texts = [
            processor.apply_chat_template(
                [{"role": "user", "content": [{"type": "text", "text": question.text}]}], add_generation_prompt=True,
                tokenize=False,
            )
            for question in asked
        ]  # fmt: skip
        made = processor.tokenizer(
            texts, padding=True, padding_side="left", add_special_tokens=False, return_tensors="pt"
        )
        inputs = {key: made[key].to(model.device) for key in ("input_ids", "attention_mask")}
        # One step of generate, so that positions of padded rows are the model's own.
        out = model.generate(
            **inputs, max_new_tokens=1, do_sample=False, output_logits=True, return_dict_in_generate=True
        )
        for logits, question in zip(out.logits[0].float().cpu(), asked, strict=True):
            found.append(int(logits[question.option_ids].argmax()) == question.answer)
        if progress is not None:
            progress(len(found))
    return found


@dataclass(frozen=True)
class Filtered:
    """What a filter left: questions before and after, rows that it leaves alone, and how often each model was right.

    `captions` are rows without a question, `others` those with a question of another kind than multiple choice.
    """

    questions: int
    kept: int
    captions: int
    others: int
    blind_accuracy: tuple[float, ...]


def filter_file(
    path: Path, out: Path, models: Sequence[tuple[Any, Any]], rule: Rule = "any", *,
    progress: Callable[[int, int], None] | None = None,
) -> Filtered:  # fmt: skip
    """Write the rows of a file of prompts that need their video, as JSON lines with paths from `out`.

    Parameters
    ----------
    path : Path
        JSON lines, or Video-R1's .json.
    models : sequence of (model, processor)
    rule : {"any", "all"}
        A question goes when any of the models answers it blindly, or when all of them do.
    progress : callable, optional
        Called with (questions done, questions in all), over all models.

    Raises
    ------
    TrainingError
        If the file has no question, or none of them needs its video.
    """
    rows = read_rows(path, None)
    asked = [row for row in rows if "question" in row and kind_of(row) == "multiple choice"]
    if not asked:
        raise TrainingError(f"{path} has no multiple-choice questions to filter")
    right, total = [], len(asked) * len(models)
    for number, (model, processor) in enumerate(models):
        done = number * len(asked)
        step = (lambda count, done=done: progress(done + count, total)) if progress is not None else None
        right.append(blind_answers(model, processor, asked, progress=step))
    gone = {id(row) for row, *marks in zip(asked, *right, strict=True) if (any if rule == "any" else all)(marks)}
    if len(gone) == len(asked):
        raise TrainingError(
            f"all {len(asked)} questions of {path} are answered rightly without the video: none would teach anything. "
            "Take other questions, or rule 'all' with a second model"
        )
    left = [row for row in rows if id(row) not in gone]
    with writing(out) as temporary, temporary.open("w", encoding="utf-8") as file:
        for row in left:
            if "frames" in row:
                moved: dict[str, Any] = {
                    "frames": [[relative(path.parent / name, out), times] for name, times in row["frames"]]
                }
            else:
                moved = {"video": relative(path.parent / row["video"], out)}
            file.write(json.dumps(row | moved, ensure_ascii=False) + "\n")
    captions = sum("question" not in row for row in rows)
    others = len(rows) - len(asked) - captions
    accuracy = tuple(sum(marks) / len(marks) for marks in right)
    return Filtered(len(asked), len(asked) - len(gone), captions, others, accuracy)
