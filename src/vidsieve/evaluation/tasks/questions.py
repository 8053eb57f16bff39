"""Questions of a benchmark: every video is read and encoded once for all its questions and conditions."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from vidsieve.adapters.adapter import Adapter
from vidsieve.adapters.encoded import Encoded, on_device
from vidsieve.adapters.fingerprint import digest, model_digest
from vidsieve.answering import Answer, chat, choice, reply
from vidsieve.errors import (
    BudgetError,
    EvaluationError,
    NeedError,
    PromptError,
    StageError,
    UnknownNameError,
    UnsupportedCallError,
    VideoError,
)
from vidsieve.evaluation.accuracy import KEPT, accuracy_rows, accuracy_table, numbered
from vidsieve.evaluation.conditions import Condition
from vidsieve.evaluation.experiment import Measurement, Results
from vidsieve.evaluation.items import Benchmark, Item, check_videos
from vidsieve.evaluation.table import Table
from vidsieve.io.faults import contained
from vidsieve.options import chosen
from vidsieve.training.data.rows import single_tokens
from vidsieve.training.data.wording import Wording, prompt_about, worded
from vidsieve.training.judging import judge
from vidsieve.types import ENCODER_NEEDS, Need, Stage
from vidsieve.video.reading import Video, read_video

WAYS = ("generate", "choice")
"""Ways to answer: generated text, judged by the kind of question, or the likeliest of the options' letters."""


@dataclass(frozen=True)
class QuestionsTask:
    """Questions about videos, in the layout of a benchmark or of a file.

    Parameters
    ----------
    benchmark : Benchmark
    items : sequence of Item
        Questions of the benchmark that are asked.
    adapter, processor : of the model
    model : str
        Name of the model in ``run.json``.
    way : str
        One of `WAYS`.
    fps : float, optional
        Frames a second; a condition's `frames` are then the most that are read.
    max_new_tokens, seed : int
    indices : bool
        True to record the kept indices.
    about : mapping
        Further settings that the records depend on, for ``run.json``.
    """

    benchmark: Benchmark
    items: Sequence[Item]
    adapter: Adapter
    processor: Any
    model: str
    way: str = "generate"
    fps: float | None = None
    max_new_tokens: int = 16
    seed: int = 0
    indices: bool = False
    about: Mapping[str, Any] = field(default_factory=dict)
    form: ClassVar[Any] = (("score", float), *KEPT)

    def __post_init__(self) -> None:
        if self.way not in WAYS:
            raise UnknownNameError("way to answer", self.way, WAYS)

    @property
    def name(self) -> str:
        """Name of the benchmark."""
        return self.benchmark.name

    def settings(self) -> dict[str, Any]:
        """Return the settings that records depend on."""
        prompts = [[item.id, item.video.name, item.prompt(self.benchmark.closing), item.answer] for item in self.items]
        return {
            "questions": len(self.items),
            "questions_digest": digest(prompts),
            "model": self.model,
            "model_digest": model_digest(self.adapter.model),
            "dtype": str(self.adapter.model.dtype),
            "closing": self.benchmark.closing,
            "answer": self.way,
            "fps": self.fps,
            "max_new_tokens": self.max_new_tokens,
            "seed": self.seed,
            "indices_kept": self.indices,
            **self.about,
        }

    def units(self) -> list[str]:
        """Return the videos."""
        return list(dict.fromkeys(str(item.video) for item in self.items))

    @torch.no_grad()
    def measure(self, unit: str, conditions: Sequence[Condition]) -> list[Measurement]:
        """Return the answers to the questions about one video.

        A record's values are ``said, score, kept, total, layers, prompt``, with `indices` also ``indices, grid``,
        and the ``question`` with its correct ``answer``.
        """
        items = [item for item in self.items if str(item.video) == unit]
        faults = {item.id: item.fault for item in items if item.fault}
        items = [item for item in items if not item.fault]
        refused: dict[str, str] = {}
        records = [] if items else [Measurement(reason=next(iter(faults.values())))]
        for condition in conditions if items else ():
            with contained(refused, condition.key, BudgetError, NeedError, StageError, UnsupportedCallError):
                if condition.method is not None:
                    self.adapter.check(condition.method)
        for frames in sorted({condition.frames for condition in conditions}) if items else ():
            able = [
                condition for condition in conditions if condition.frames == frames and condition.key not in refused
            ]
            try:
                video = frames_of(unit, frames, self.fps)
            except VideoError as error:
                faults |= {item.id: str(error) for item in items}
                records = [Measurement(reason=str(error))]
                break
            for front in dict.fromkeys(condition.front for condition in able):
                alike = [condition for condition in able if condition.front == front]
                for item, encoded in self._encoded(video, items, alike, faults):
                    for condition in alike:
                        if condition.key not in refused:
                            with (
                                contained(faults, item.id, PromptError),
                                contained(refused, condition.key, BudgetError),
                            ):
                                records.append(self._record(encoded, item, condition))
        records += [Measurement(condition=key, reason=reason) for key, reason in refused.items()]
        return records + [Measurement(item=item, reason=reason) for item, reason in faults.items()]

    def _encoded(
        self, video: Video, items: Sequence[Item], conditions: Sequence[Condition], faults: dict[str, str]
    ) -> Iterator[tuple[Item, Encoded]]:
        """Yield every question's prompt; the vision encoder runs once where the processor allows it.

        What acts before its output is the same in all conditions.
        Questions that cannot be asked are left out, with the reason in `faults`.
        """
        methods = [condition.method for condition in conditions if condition.method is not None]
        needs: frozenset[Need] = frozenset().union(*(method.needs for method in methods)) & ENCODER_NEEDS
        device = self.adapter.device
        wording: Wording | None = None
        front = conditions[0].front if conditions else None
        # Some processors make prompts together with the pixels only; of merged frames prompts need the pixels too.
        with_pixels = front is not None and front.stage is Stage.ENCODER
        for item in items:
            text = item.prompt(self.benchmark.closing)
            try:
                if wording is None and not with_pixels:
                    try:
                        inputs, wording = worded(self.processor, video, text)
                        (features,) = self.adapter.features(on_device(inputs, device), needs, front)
                    except UnsupportedCallError:
                        with_pixels = True
                if wording is None:
                    inputs = on_device(chat(self.processor, video, text), device)
                    encoded = self.adapter.encode(inputs, None, needs, front)
                else:
                    encoded = prompt_about(self.adapter, self.processor, features, wording, text)
            except PromptError as error:
                faults[item.id] = str(error)
                continue
            yield item, encoded

    def _record(self, encoded: Encoded, item: Item, condition: Condition) -> Measurement:
        """Return the answer to one question under one condition."""
        answer, score = self._answer(encoded, item, condition)
        ms = sum(trace.select_ms for trace in answer.traces)
        return Measurement(item.id, condition.key, self._values(encoded, item, answer, score), ms=ms)

    def _values(self, encoded: Encoded, item: Item, answer: Answer, score: float) -> dict[str, Any]:
        """Return the values of a record."""
        traces = answer.traces
        total = sum(span.features.prompted.num_tokens for span in encoded.videos)
        values: dict[str, Any] = {"said": answer.text, "score": score, "kept": total, "total": total, "layers": 1.0}
        if traces:
            values["kept"] = sum(trace.kept for trace in traces)
            values["layers"] = sum(trace.layer_retention * trace.total for trace in traces) / total
        values["prompt"] = list(answer.prompt_tokens)
        if self.indices:
            grid = traces[0].grid if traces else None
            values["indices"] = [list(trace.indices) for trace in traces]
            values["grid"] = [grid.frames, grid.height, grid.width] if grid else None
        return values | {"question": item.question, "answer": item.answer}

    def _answer(self, encoded: Encoded, item: Item, condition: Condition) -> tuple[Answer, float]:
        """Return the answer and its score."""
        method = condition.method
        if self.way == "choice":
            said = choice(self.adapter, encoded, item.answers, self._tokens(item), method, seed=self.seed)
            return said, float(said.text == item.answer)
        result = reply(
            self.adapter, self.processor, encoded, method, max_new_tokens=self.max_new_tokens, seed=self.seed
        )
        if item.kind == "multiple choice" and item.listed:
            score = float(chosen(result.text, item.options, item.answers) == item.answer)
        else:
            score = judge(item.kind, result.text, item.answer)
        return result, score

    def _tokens(self, item: Item) -> Tensor:
        """Return the token of each of an item's possible answers.

        Raises
        ------
        PromptError
            If it has none, one is not one token or is unknown, or two are the same one.
        """
        tokens = single_tokens(self.processor.tokenizer, item.answers)
        if tokens is None or not len(tokens):
            raise PromptError(f"question {item.id!r} cannot be answered by one token each: use --answer generate")
        return tokens

    def tabulate(self, results: Results) -> Table:
        """Return the table of accuracies.

        The result has ``benchmark, paper, figure, published, questions, videos, failed: [{video, reason, questions}],
        rows, refused``; rows are those of `accuracy_rows` with ``figure`` (the benchmark's own average) and
        ``of_answered`` (the accuracy over the questions that could be asked).
        """
        failed = self._failed(results)
        if not results.refused and not any(record["samples"] for record in results.units.values()):
            reason = failed[0]["reason"]
            raise EvaluationError(f"none of the {len(self.items)} questions could be asked, first because {reason}")
        clusters = numbered([str(item.video) for item in self.items])
        rows = accuracy_rows(results, {item.id: item.groups for item in self.items}, clusters)
        for row, condition in zip(rows, results.measured, strict=True):
            samples = results.samples[condition.key]
            scores = [float(samples[item.id]["score"]) if item.id in samples else 0.0 for item in self.items]
            row["figure"] = self.benchmark.average(self.items, scores)
            row["of_answered"] = float(np.mean([s["score"] for s in samples.values()])) if samples else None
        refused = [
            {**row, "videos": len(reasons)}
            for row, reasons in zip(results.refused_rows(), results.refused.values(), strict=True)
        ]
        return accuracy_table(
            {
                "benchmark": self.benchmark.title,
                "paper": self.benchmark.paper,
                "figure": self.benchmark.figure,
                "published": {"questions": self.benchmark.questions, "videos": self.benchmark.videos},
                "questions": len(self.items),
                "videos": len(set(clusters)),
                "failed": failed,
                "rows": rows,
                "refused": refused,
            }
        )

    def _failed(self, results: Results) -> list[dict[str, Any]]:
        """Return why questions could not be asked: a row for every question, one for all of an unreadable video."""
        failed = []
        for unit, record in results.units.items():
            if "failed" in record:
                count = sum(str(item.video) == unit for item in self.items)
                failed.append({"video": unit, "reason": record["failed"], "questions": count})
                continue
            for item, reason in record.get("faults", {}).items():
                failed.append({"video": f"question {item} on {Path(unit).name}", "reason": reason, "questions": 1})
        return failed


def frames_of(path: str | Path, frames: int, fps: float | None) -> Video:
    """Return `frames` frames of a video, evenly spaced; with `fps`, its frames at that rate, at most `frames`.

    Raises
    ------
    VideoError
    """
    return read_video(path, frames=frames) if fps is None else read_video(path, fps=fps, max_frames=frames)


def items_of(
    benchmark: Benchmark,
    data: Path,
    *,
    subset: int | None = None,
    seed: int = 0,
    allow_missing: bool = False,
    note: Callable[[str], None] = lambda text: None,
) -> list[Item]:
    """Return a benchmark's questions, or `subset` of them drawn by the seed.

    Parameters
    ----------
    note : callable
        Called with a sentence if the number of questions is not the published one.

    Raises
    ------
    EvaluationError
        If files are missing, doubled or malformed, or videos are missing that `allow_missing` does not allow.
    """
    items = benchmark.read(data)
    count = len(items)
    if benchmark.questions and count != benchmark.questions:
        note(f"{data} has {count} questions, {benchmark.questions} are published: compare figures with that in mind")
    if subset is not None and subset < count:
        places = set(random.Random(seed).sample(range(count), subset))
        items = [item for place, item in enumerate(items) if place in places]
    if not allow_missing:
        check_videos(items)
    return items
