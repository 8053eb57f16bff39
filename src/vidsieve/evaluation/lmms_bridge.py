"""vidsieve as a model of lmms-eval: greedy answers from the code behind `vidsieve eval`, so the texts are the same.

The entry point of the group ``lmms_eval.models`` names `manifest`. lmms-eval is imported only inside functions that it
calls: this module loads without it.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, NoReturn

import msgspec
import torch
from msgspec import Meta

from vidsieve._version import __version__
from vidsieve.adapters.pruning import adapter_for
from vidsieve.errors import (
    BudgetError,
    EvaluationError,
    PromptError,
    UnknownNameError,
    UnsupportedCallError,
    VideoError,
)
from vidsieve.evaluation.benchmarks.questions import QUESTIONS
from vidsieve.evaluation.conditions import Condition, method_for
from vidsieve.evaluation.items import Item
from vidsieve.evaluation.tasks.questions import QuestionsTask
from vidsieve.io.versions import installed, warn_untested
from vidsieve.loading import load_model
from vidsieve.registry import check_known
from vidsieve.retention import parse_retention

Count = Annotated[int, Meta(ge=1)]
DTYPES = ("float32", "bfloat16", "float16")


def manifest() -> Any:
    """Return the entry that lmms-eval registers: the model id ``vidsieve`` and the path of its class."""
    from lmms_eval.models.registry_v2 import ModelManifest

    if version := installed("lmms-eval"):
        warn_untested("lmms-eval", version)
    return ModelManifest(model_id="vidsieve", simple_class_path=f"{__name__}.VidsieveModel")


class Arguments(msgspec.Struct, frozen=True, kw_only=True):
    """The model arguments, ``--model_args``; docs/lmms.md describes them."""

    pretrained: Annotated[str, Meta(min_length=1)]
    method: Annotated[str, Meta(min_length=1)]
    policy: str | None = None
    retention: str | None = None
    frames: Count | None = None
    fps: Annotated[float, Meta(gt=0, le=1000)] | None = None
    max_frames: Count | None = None
    layout: str | None = None
    dtype: str | None = None
    device: str = "auto"
    seed: Annotated[int, Meta(ge=0)] = 0
    tokens_per_frame: Count | None = None
    earliest: bool = False
    batch_size: int = 1  # always passed by lmms-eval

    def __post_init__(self) -> None:
        if self.batch_size != 1:
            raise ValueError("prompts keep different tokens and run one at a time: leave batch_size out")
        if self.dtype not in (None, *DTYPES):
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}")
        extra = [name for name in ("policy", "retention", "earliest") if getattr(self, name)]
        if self.method == "full" and extra:
            raise ValueError(f"method=full keeps all tokens: leave {', '.join(extra)} out")
        if self.method == "all":
            raise ValueError("one run of lmms-eval measures one method: name it")
        if (self.fps and self.frames) or (self.max_frames and not self.fps):
            raise ValueError("give frames alone, or fps, with or without max_frames")


class AnswerSettings(msgspec.Struct, frozen=True):
    """The generation settings of a task that are applied to greedy answers, or change nothing about them."""

    max_new_tokens: Count = 1024
    until: str | tuple[str, ...] | None = None
    do_sample: bool | None = None
    temperature: float | None = None
    num_beams: int | None = None
    top_p: float | None = None
    top_k: int | None = None

    def __post_init__(self) -> None:
        sampled = self.do_sample if self.temperature is None else self.temperature > 0
        if (sampled and self.do_sample is not False) or (self.num_beams or 1) > 1:
            raise ValueError("vidsieve answers greedily: pass --gen_kwargs temperature=0,do_sample=False,num_beams=1")

    def cut(self, text: str) -> str:
        """Return an answer up to the first text of `until` in it."""
        stops = (self.until,) if isinstance(self.until, str) else self.until or ()
        ends = [place for stop in stops if stop and (place := text.find(stop)) >= 0]
        return text[: min(ends)].rstrip() if ends else text


def converted(values: Mapping[str, Any], kind: Any, source: str) -> Any:
    """Return `values` as a struct of class `kind`; `source` names them in errors.

    Raises
    ------
    EvaluationError
        If one is missing, of the wrong type, out of range, or contradicts another.
    """
    try:
        return msgspec.convert(dict(values), kind, strict=False)
    except msgspec.ValidationError as error:
        raise EvaluationError(f"{source}: {str(error).replace(' - at `$.', ' for `')}") from None


class Counts(msgspec.Struct, frozen=True):
    """The tokens behind an answer; lmms-eval writes them into each sample, and adds up the first two.

    `layer_retention` is the fraction of the video's tokens that the LLM's layers see on average.
    """

    input_tokens: int
    output_tokens: int
    prompt_tokens_before: int
    video_tokens: int
    video_tokens_kept: int
    layer_retention: float
    method: str
    vidsieve: str = __version__

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return msgspec.structs.asdict(self)


class Bridge:
    """Answers lmms-eval's requests about videos; takes the fields of `Arguments`.

    Raises
    ------
    UnknownNameError, EvaluationError, RetentionError, PolicyError, ModelError, BudgetError, NeedError, StageError
        If the arguments do not name a model and a method that can run on it.
    """

    is_simple = True
    rank: int
    task_dict: dict[str, Any]
    """Documents by task and split, filled in by lmms-eval."""

    def __init__(self, **values: Any) -> None:
        super().__init__()
        for name in values:
            if name not in Arguments.__struct_fields__:
                raise UnknownNameError("model argument", name, Arguments.__struct_fields__)
        # lmms-eval turns text that looks like a number into one, names of folders too.
        texts = {name: value if isinstance(value, bool) else str(value).strip() for name, value in values.items()}
        arguments = converted(texts, Arguments, "--model_args")
        check_known(arguments.method)
        compressor = None
        if arguments.method != "full":
            fields: dict[str, Any] = {"earliest": True} if arguments.earliest else {}
            fields["retention"] = parse_retention(arguments.retention or "0.25")
            compressor = method_for(arguments.method, arguments.pretrained, arguments.policy, **fields)
        dtype = None if arguments.dtype is None else getattr(torch, arguments.dtype)
        model, processor = load_model(arguments.pretrained, arguments.layout, dtype, arguments.device)
        adapter = adapter_for(model)
        if compressor is not None:
            adapter.check(compressor)
        if arguments.tokens_per_frame is not None:
            adapter.limit_frames(processor, arguments.tokens_per_frame)
        self._condition = Condition(compressor, arguments.frames or arguments.max_frames or 32)
        self._task = QuestionsTask(
            QUESTIONS, (), adapter, processor, arguments.pretrained, fps=arguments.fps, seed=arguments.seed
        )
        self._method = "full" if compressor is None else compressor.describe()

    @property
    def device(self) -> Any:
        """The model's device, on which lmms-eval gathers the results of several processes."""
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

        if not requests:
            return []
        ignored = {name for request in requests for name in request.args[1]} - {*AnswerSettings.__struct_fields__}
        if ignored:
            warnings.warn(f"generation settings without effect here: {', '.join(sorted(ignored))}", stacklevel=2)
        groups: dict[tuple[str, AnswerSettings], dict[int, str]] = {}
        for place, request in enumerate(requests):
            video, question, settings = self._request(*request.args)
            groups.setdefault((video, settings), {})[place] = question
        answers: dict[int, tuple[str, Counts]] = {}
        start = time.perf_counter()
        for (video, settings), questions in tqdm(groups.items(), desc="videos", disable=self.rank != 0):
            answers |= zip(questions, self._answers(video, list(questions.values()), settings), strict=True)
        seconds = time.perf_counter() - start
        counts = [one for _, one in answers.values()]
        new, number = sum(one.output_tokens for one in counts), len(counts)
        means = {
            "retention": sum(one.video_tokens_kept / one.video_tokens for one in counts) / number,
            "layer_retention": sum(one.layer_retention for one in counts) / number,
            "prompt_tokens": sum(one.input_tokens for one in counts) / number,
            "prompt_tokens_before": sum(one.prompt_tokens_before for one in counts) / number,
        }
        log_metrics(seconds, new, new / seconds, means)
        return [GenerationResult(*answers[place]) for place in range(len(requests))]

    def _request(
        self, context: str, settings: Mapping[str, Any], doc_to_visual: Any, doc_id: Any, task: str, split: str
    ) -> tuple[str, str, AnswerSettings]:
        """Return the video file, the question and the settings of a request."""
        visual = doc_to_visual(self.task_dict[task][split][doc_id])
        one = visual[0] if isinstance(visual, (list, tuple)) and len(visual) == 1 else visual
        if not isinstance(one, (str, Path)):
            kind = f"{len(one)} visuals" if isinstance(one, (list, tuple)) else f"a {type(one).__name__}"
            raise UnsupportedCallError(
                f"document {doc_id} of {task} ({split}) shows {kind}: vidsieve answers questions about one video file "
                "each, whose path doc_to_visual returns"
            )
        return str(one), context, converted(settings, AnswerSettings, f"generation settings of {task}")

    def _answers(self, video: str, questions: Sequence[str], settings: AnswerSettings) -> Iterator[tuple[str, Counts]]:
        """Yield the greedy answers to questions about one video."""
        # Not listed, for the task has written the whole prompt; lmms-eval judges the answers.
        items = [
            Item(f"{number}", Path(video), question, (), "", kind="free-form", listed=False)
            for number, question in enumerate(questions)
        ]
        task = replace(self._task, items=items, max_new_tokens=settings.max_new_tokens)
        tokenizer = task.processor.tokenizer
        for record in task.measure(task.units()[0], [self._condition]):
            if record.reason:
                raise (BudgetError if record.condition else PromptError if record.item else VideoError)(record.reason)
            sample = record.values
            before, after = sample["prompt"]
            new = len(tokenizer(sample["said"], add_special_tokens=False)["input_ids"])
            counts = Counts(after, new, before, sample["total"], sample["kept"], sample["layers"], self._method)
            yield settings.cut(sample["said"]), counts

    def loglikelihood(self, requests: Sequence[Any]) -> NoReturn:
        """Raise NotImplementedError: lmms-eval describes it as a log-probability and scores it as a loss."""
        raise NotImplementedError("vidsieve generates one answer: take a task with output_type generate_until")

    generate_until_multi_round = loglikelihood  # later rounds bring pictures and texts of their own

    def clean(self) -> None:
        """Free the model's memory."""
        del self._task
        super().clean()  # type: ignore[misc]


def __getattr__(name: str) -> Any:
    """Return the class `VidsieveModel`, whose base comes from lmms-eval."""
    if name != "VidsieveModel":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from lmms_eval.api.model import lmms

    return type(name, (Bridge, lmms), {"__module__": __name__, "__doc__": Bridge.__doc__})
