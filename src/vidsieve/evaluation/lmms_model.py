"""The model that lmms-eval asks: greedy answers come from the code behind `vidsieve eval`, and are the same texts.

``VidsieveModel``, the class that the manifest names, is made when it is asked for, since its base is lmms-eval's.
"""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

import torch

from vidsieve._version import __version__
from vidsieve.adapters.encoded import on_device
from vidsieve.adapters.pruning import adapter_for
from vidsieve.adapters.session import attach
from vidsieve.answering import chat
from vidsieve.errors import BudgetError, PromptError, UnsupportedCallError, VideoError
from vidsieve.evaluation.benchmarks.questions import QUESTIONS
from vidsieve.evaluation.conditions import Condition
from vidsieve.evaluation.items import Item
from vidsieve.evaluation.lmms import ModelArguments, Wish
from vidsieve.evaluation.tasks.questions import QuestionsTask, frames_of
from vidsieve.loading import load_model


@dataclass(frozen=True)
class Counts:
    """What an answer was read from; lmms-eval writes `to_dict` beside every sample as its token counts.

    Parameters
    ----------
    prompt : (int, int)
        Tokens of the prompt, before and after pruning.
    new : int
        Tokens of the answer's text.
    kept, total : int
        Tokens of the video.
    layers : float
        Share of the video's tokens that the LLM's layers see on average.
    method : str
    """

    prompt: tuple[int, int]
    new: int
    kept: int
    total: int
    layers: float
    method: str

    def to_dict(self) -> dict[str, Any]:
        """Return plain values; lmms-eval adds up the first two."""
        return {
            "input_tokens": self.prompt[1],
            "output_tokens": self.new,
            "prompt_tokens_before": self.prompt[0],
            "video_tokens": self.total,
            "video_tokens_kept": self.kept,
            "layer_retention": self.layers,
            "method": self.method,
            "vidsieve": __version__,
        }


@dataclass(frozen=True)
class LmmsRequest:
    """One request: a question about a video file, and how it is to be answered."""

    video: str
    question: str
    wish: Wish


class Bridge:
    """Answers lmms-eval's requests about videos; arguments as `ModelArguments` has them.

    Raises
    ------
    UnknownNameError, EvaluationError, RetentionError, PolicyError, ModelError, BudgetError, NeedError, StageError
        If the arguments do not name a model and a method that can run on it.
    """

    is_simple = True
    rank: int
    task_dict: dict[str, Any]
    """By task and split its documents; lmms-eval fills it in."""

    def __init__(self, **given: Any) -> None:
        super().__init__()
        arguments = ModelArguments.read(given)
        compressor = arguments.compressor()
        dtype = None if arguments.dtype is None else getattr(torch, arguments.dtype)
        model, processor = load_model(arguments.pretrained, arguments.layout, dtype, arguments.device)
        adapter = adapter_for(model)
        if compressor is not None:
            adapter.check(compressor)
        if arguments.tokens_per_frame is not None:
            adapter.limit_frames(processor, arguments.tokens_per_frame)
        self._condition = Condition(compressor, arguments.most_frames)
        self._task = QuestionsTask(
            QUESTIONS, (), adapter, processor, arguments.pretrained, fps=arguments.fps, seed=arguments.seed
        )
        self._method = "full" if compressor is None else compressor.describe()

    @property
    def device(self) -> Any:
        """Where the model is: lmms-eval gathers the results of several processes there."""
        return self._task.adapter.device

    def generate_until(self, requests: Sequence[Any]) -> list[Any]:
        """Return an answer to each request, in their order; every video is read and encoded once.

        Raises
        ------
        UnsupportedCallError
            If a document shows anything but one video file.
        VideoError, BudgetError, PromptError, EvaluationError
        """
        from lmms_eval.api.instance import GenerationResult
        from lmms_eval.models.model_utils.gen_metrics import log_metrics
        from tqdm import tqdm

        asked = [self._asked(*request.args) for request in requests]
        if not asked:
            return []
        ignored = sorted({name for one in asked for name in one.wish.ignored})
        if ignored:
            warnings.warn(f"generation settings that mean nothing here: {', '.join(ignored)}", stacklevel=2)
        groups: dict[tuple[str, Wish], list[int]] = {}
        for place, one in enumerate(asked):
            groups.setdefault((one.video, one.wish), []).append(place)
        answers: dict[int, tuple[str, Counts]] = {}
        start = time.perf_counter()
        for (video, wish), places in tqdm(groups.items(), desc="videos", disable=self.rank != 0):
            way = self._drawn if wish.options else self._greedy
            found = way(video, [asked[place].question for place in places], wish)
            answers |= {place: (wish.cut(text), counts) for place, (text, counts) in zip(places, found, strict=True)}
        seconds = time.perf_counter() - start
        new, means = sum(counts.new for _, counts in answers.values()), _means([one for _, one in answers.values()])
        log_metrics(seconds, new, new / seconds, means)
        print(
            f"vidsieve {__version__}, {self._method}: {means['retention']:.2%} of video tokens kept, "
            f"{means['layer_retention']:.2%} on average over layers, in {len(asked)} answers",
            file=sys.stderr,
        )
        return [GenerationResult(*answers[place]) for place in range(len(asked))]

    def _asked(
        self, context: str, settings: Mapping[str, Any], doc_to_visual: Any, doc_id: Any, task: str, split: str
    ) -> LmmsRequest:
        shown = doc_to_visual(self.task_dict[task][split][doc_id])
        one = shown[0] if isinstance(shown, (list, tuple)) and len(shown) == 1 else shown
        if not isinstance(one, (str, Path)):
            several = isinstance(one, (list, tuple))
            what = f"{len(one)} things to look at" if several else f"a {type(one).__name__}"
            raise UnsupportedCallError(
                f"document {doc_id} of {task} ({split}) shows {what}: vidsieve answers questions about one video file "
                "each, whose path doc_to_visual returns"
            )
        return LmmsRequest(str(one), context, Wish.read(settings))

    def _greedy(self, video: str, questions: Sequence[str], wish: Wish) -> Iterator[tuple[str, Counts]]:
        """Yield the greedy answers to questions about one video, as `vidsieve eval` has them."""
        # Not listed, for the task has written the whole prompt; lmms-eval judges the answers.
        items = [
            Item(f"{number}", Path(video), question, (), "", kind="free-form", listed=False)
            for number, question in enumerate(questions)
        ]
        task = replace(self._task, items=items, max_new_tokens=wish.max_new_tokens)
        for record in task.measure(task.units()[0], [self._condition]):
            if record.reason:
                raise (BudgetError if record.condition else PromptError if record.item else VideoError)(record.reason)
            sample = record.values
            counts = Counts(
                tuple(sample["prompt"]),
                self._length(sample["said"]),
                sample["kept"],
                sample["total"],
                sample["layers"],
                self._method,
            )
            yield sample["said"], counts

    @torch.no_grad()
    def _drawn(self, video: str, questions: Sequence[str], wish: Wish) -> Iterator[tuple[str, Counts]]:
        """Yield answers that are drawn, or found by beams; draws are of torch's generator, which lmms-eval seeds."""
        adapter, processor, method = self._task.adapter, self._task.processor, self._condition.method
        frames = frames_of(video, self._condition.frames, self._task.fps)
        options = {"max_new_tokens": wish.max_new_tokens, **dict(wish.options)}
        for question in questions:
            inputs = on_device(chat(processor, frames, question), adapter.device)
            before = after = int(inputs["input_ids"].shape[1])
            if method is None:
                encoded = adapter.encode(inputs)
                total = kept = sum(span.features.grid.num_tokens for span in encoded.videos)
                layers = 1.0
                built = adapter.build(encoded, encoded.per_row(encoded.everything()))
                ids = adapter.model.generate(**built.inputs, **options)
            else:
                with attach(adapter.model, method, seed=self._task.seed) as session:
                    ids = adapter.model.generate(**inputs, **options)
                (trace,) = session.trace
                kept, total, layers = trace.kept, trace.total, trace.layer_retention
                before, after = session.trace.prompt_tokens or (before, after)
            text = processor.batch_decode(ids[:, before:], skip_special_tokens=True)[0].strip()
            yield text, Counts((before, after), self._length(text), kept, total, layers, self._method)

    def _length(self, text: str) -> int:
        return len(self._task.processor.tokenizer(text, add_special_tokens=False)["input_ids"])

    def loglikelihood(self, requests: Sequence[Any]) -> NoReturn:
        """Refuse: see the text."""
        raise NotImplementedError(
            "vidsieve answers by generating. lmms-eval describes loglikelihood as a log-probability and scores it as a "
            "loss, so that no value is right for both: take a task with output_type generate_until"
        )

    def generate_until_multi_round(self, requests: Sequence[Any]) -> NoReturn:
        """Refuse: see the text."""
        raise NotImplementedError(
            "vidsieve answers one question about one video in each request; later rounds bring pictures and texts of "
            "their own: take a task with output_type generate_until"
        )

    def clean(self) -> None:
        """Free the model's memory: lmms-eval is done with it."""
        del self._task
        super().clean()  # type: ignore[misc]


def _means(counts: Sequence[Counts]) -> dict[str, float]:
    """Return what was kept on average over requests."""
    kept = [one.kept / one.total for one in counts]
    return {
        "retention": sum(kept) / len(kept),
        "layer_retention": sum(one.layers for one in counts) / len(counts),
        "prompt_tokens": sum(one.prompt[1] for one in counts) / len(counts),
        "prompt_tokens_before": sum(one.prompt[0] for one in counts) / len(counts),
    }


def __getattr__(name: str) -> Any:
    if name != "VidsieveModel":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from lmms_eval.api.model import lmms

    return type(name, (Bridge, lmms), {"__module__": __name__, "__doc__": Bridge.__doc__})
