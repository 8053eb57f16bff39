"""From a video file and a question to an answer, with the time of each part."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from vidsieve.adapters.adapter import Adapter
from vidsieve.adapters.encoded import Encoded, on_device
from vidsieve.adapters.plan import Plan
from vidsieve.adapters.pruning import adapter_with
from vidsieve.adapters.trace import VideoTrace
from vidsieve.adapters.transformers_api import synchronise
from vidsieve.compressors.base import Compressor
from vidsieve.errors import EvaluationError, PromptError

if TYPE_CHECKING:  # a machine that only computes may have no decoder
    from vidsieve.video.reading import Video

PARTS = ("read video", "preprocess", "encode", "select", "prefill", "generate")
"""From the file to the answer; "encode" includes the projector, "generate" begins after the first token."""


@dataclass
class Clock:
    """Milliseconds spent in each part of one answer."""

    ms: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def part(self, name: str, device: Any = None) -> Iterator[None]:
        """Measure a block, device synchronised."""
        synchronise(device)
        start = time.perf_counter()
        yield
        synchronise(device)
        self.ms[name] = self.ms.get(name, 0.0) + 1e3 * (time.perf_counter() - start)

    @property
    def total(self) -> float:
        """Milliseconds in all parts."""
        return sum(self.ms.values())


@dataclass(frozen=True)
class Answer:
    """An answer, the tokens that were read for it, and the time of each part."""

    text: str
    method: str
    prompt_tokens: tuple[int, int]
    traces: tuple[VideoTrace, ...]
    ms: dict[str, float]
    scores: tuple[Tensor | None, ...] = ()
    """Of every video the scores (N,) of its tokens, from methods before the LLM that score them."""

    def as_dict(self) -> dict[str, Any]:
        """Return the answer as plain values for JSON."""
        return {
            "answer": self.text,
            "method": self.method,
            "prompt_tokens_before": self.prompt_tokens[0],
            "prompt_tokens_after": self.prompt_tokens[1],
            "videos": [t.as_dict() for t in self.traces],
            "ms": self.ms,
        }


class _FirstToken(LogitsProcessor):  # type: ignore[misc]
    """Records the time of the first logits, the end of the prefill."""

    def __init__(self, device: Any) -> None:
        self.device, self.at = device, 0.0

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        if not self.at:
            synchronise(self.device)
            self.at = time.perf_counter()
        return scores


def check_question(processor: Any, question: str) -> None:
    """Refuse a question that cannot be asked of a model.

    Raises
    ------
    PromptError
        If it is empty, or holds the model's placeholder of a video or image.
    """
    if not question.strip():
        raise PromptError("the question is empty")
    for name in ("video_token", "image_token"):
        token = getattr(processor, name, None)
        if isinstance(token, str) and token in question:
            raise PromptError(f"the question holds {token!r}, which stands for pixels in this model: leave it out")


def chat_text(processor: Any, question: str, videos: int = 1) -> str:
    """Return the prompt that asks one question about one video, or several, each still a single placeholder.

    Raises
    ------
    PromptError
        As `check_question`.
    """
    check_question(processor, question)
    text: str = processor.apply_chat_template(
        [{"role": "user", "content": [*[{"type": "video"}] * videos, {"type": "text", "text": question}]}],
        add_generation_prompt=True,
        tokenize=False,
    )
    return text


def chat(processor: Any, video: Video | list[Video], question: str, spacing: float | None = None) -> dict[str, Any]:
    """Return the processor's inputs that ask one question about one video, or several of equal length.

    `spacing` is as `timed` takes it.

    Raises
    ------
    PromptError
        As `chat_text`, and if the processor refuses the question or the frames.
    """
    videos = video if isinstance(video, list) else [video]
    text = chat_text(processor, question, len(videos))
    # Most processors do both by themselves where their model needs it; Cosmos 3 Edge's does not.
    further: dict[str, Any] = {"return_metadata": True}
    if "mm_token_type_ids" in processor.model_input_names:
        further["return_mm_token_type_ids"] = True
    if pixels := getattr(getattr(processor, "video_processor", None), "vidsieve_frame_pixels", None):
        least = processor.video_processor.size["shortest_edge"]
        further["videos_kwargs"] = {"size": {"shortest_edge": least, "longest_edge": pixels * len(videos[0].pixels)}}
    try:
        inputs = processor(
            text=[text],
            videos=[one.pixels for one in videos],
            video_metadata=[timed(one, spacing) for one in videos],
            do_sample_frames=False,
            return_tensors="pt",
            **further,
        )
    except ValueError as error:
        raise PromptError(f"{type(processor).__name__} refuses the prompt: {str(error).splitlines()[0]}") from error
    return {name: value for name, value in inputs.items() if name != "video_metadata"}


def timed(video: Video, spacing: float | None = None) -> Any:
    """Return transformers' metadata of a video from which every processor reads the times of its frames.

    Frames are named by their milliseconds, at 1000 frames a second, so that ``frames_indices / fps`` are
    `Video.timestamps` however they were chosen. Processors that take one rate alone compute it as
    ``len(frames_indices) / total_num_frames · fps``: that gives the mean rate of these frames, or a frame every
    `spacing` seconds.
    """
    from transformers.video_utils import VideoMetadata

    times, count = video.timestamps, len(video.pixels)
    if spacing is None:
        spacing = float(times[-1] - times[0]) / (count - 1) if count > 1 else video.duration
    return VideoMetadata(
        total_num_frames=max(count, round(1000 * count * spacing)),
        fps=1000.0,
        frames_indices=[round(1000 * second) for second in times.tolist()],
        duration=video.duration,
    )


@torch.no_grad()
def answer(
    model: Any,
    processor: Any,
    video: Video,
    question: str,
    compressor: Compressor | None = None,
    *,
    max_new_tokens: int = 64,
    seed: int = 0,
    clock: Clock | None = None,
) -> Answer:
    """Return the greedy answer to a question about a video, pruned by `compressor` (None: all tokens).

    Raises
    ------
    UnsupportedModelError, NeedError, PolicyMismatchError, PromptError
    """
    clock = clock or Clock()
    adapter = adapter_with(model, processor)
    if compressor is not None:
        adapter.check(compressor)
    device = adapter.device
    with clock.part("preprocess", device):
        inputs = on_device(chat(processor, video, question), device)
    with clock.part("encode", device):
        encoded = adapter.encode_for(inputs, compressor)
    return reply(adapter, processor, encoded, compressor, max_new_tokens=max_new_tokens, seed=seed, clock=clock)


@torch.no_grad()
def reply(
    adapter: Adapter,
    processor: Any,
    encoded: Encoded,
    compressor: Compressor | None = None,
    *,
    max_new_tokens: int = 64,
    seed: int = 0,
    clock: Clock | None = None,
) -> Answer:
    """Return the greedy answer to one encoded prompt, pruned by `compressor` (None: all tokens).

    Raises
    ------
    BudgetError, NeedError
    """
    result = generated(adapter, encoded, compressor, clock or Clock(), tokens=max_new_tokens, seed=seed)
    read = result.plan.inputs["input_ids"].shape[1]
    text = processor.batch_decode(result.ids[:, read:], skip_special_tokens=True)[0].strip()
    return _answer(text, encoded, compressor, result.plan, result.ms)


@dataclass(frozen=True)
class Generated:
    """Prompt and answer as ids (B, L), the plan that was run, and milliseconds of each part."""

    ids: Tensor
    plan: Plan
    ms: dict[str, float]


@torch.no_grad()
def generated(
    adapter: Adapter,
    encoded: Encoded,
    compressor: Compressor | None,
    clock: Clock,
    *,
    tokens: int,
    seed: int = 0,
    exactly: bool = False,
) -> Generated:
    """Generate greedily at most `tokens` tokens after an encoded prompt, or exactly so many, with each part on `clock`.

    What a method does inside the LLM is part of the prefill.

    Raises
    ------
    BudgetError, NeedError
    """
    device = adapter.device
    with clock.part("select", device):
        plan = adapter.plan(encoded, compressor, torch.Generator().manual_seed(seed))
    first = _FirstToken(device)
    start = time.perf_counter()
    with plan.acting():
        out = adapter.model.generate(
            **plan.inputs,
            max_new_tokens=tokens,
            do_sample=False,
            logits_processor=LogitsProcessorList([first]),
            **({"min_new_tokens": tokens} if exactly else {}),
        )
    synchronise(device)
    clock.ms["prefill"] = 1e3 * (first.at - start)
    clock.ms["generate"] = 1e3 * (time.perf_counter() - first.at)
    return Generated(out, plan, dict(clock.ms))


@torch.no_grad()
def choice(
    adapter: Adapter,
    encoded: Encoded,
    options: Sequence[str],
    option_ids: Tensor,
    compressor: Compressor | None = None,
    *,
    seed: int = 0,
) -> Answer:
    """Return the option whose token in `option_ids` (options,) int64 is the likeliest next one after an encoded prompt.

    It takes a single prefill, and no times are measured.

    Raises
    ------
    BudgetError, NeedError, EvaluationError
    """
    plan = adapter.plan(encoded, compressor, torch.Generator().manual_seed(seed))
    logits = next_token_logits(adapter, plan)[0]
    return _answer(options[int(likeliest(logits[option_ids.to(logits.device)]))], encoded, compressor, plan, {})


def likeliest(logits: Tensor) -> Tensor:
    """Return the number (…) int64 of the highest of some logits (…, options).

    Raises
    ------
    EvaluationError
        If one is not a number, which `torch.argmax` would take for the highest.
    """
    if logits.isnan().any():
        raise EvaluationError("the model's logits are not numbers: load it in another precision, such as bfloat16")
    return logits.argmax(-1)


def _answer(text: str, encoded: Encoded, compressor: Compressor | None, plan: Plan, ms: dict[str, float]) -> Answer:
    name = compressor.describe() if compressor is not None else "full"
    prompt = int(encoded.input_ids.shape[1]), int(plan.inputs["input_ids"].shape[1])
    return Answer(text, name, prompt, plan.traces, ms, tuple(selection.scores for selection in plan.selections))


@torch.no_grad()
def next_token_logits(adapter: Adapter, plan: Plan) -> Tensor:
    """Return the logits (B, V) of the token after each prompt, by one prefill without a cache."""
    with plan.acting():
        logits: Tensor = adapter.model(**plan.inputs, logits_to_keep=1, use_cache=False).logits
    return logits[:, -1]


def read(path: str | Path, clock: Clock, *, frames: int | None, fps: float | None, max_frames: int | None) -> Video:
    """Return a video's frames, and time the reading."""
    from vidsieve.video.reading import read_video

    with clock.part("read video"):
        return read_video(path, frames=frames, fps=fps, max_frames=max_frames)
