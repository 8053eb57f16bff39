"""Answers to a benchmark's questions under several conditions: a video is read and encoded once for all of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vidsieve.adapters.adapter import Adapter
from vidsieve.adapters.encoded import Encoded, on_device
from vidsieve.adapters.trace import VideoTrace
from vidsieve.answering import chat, choice, reply
from vidsieve.compressors.base import Compressor
from vidsieve.errors import (
    BudgetError,
    NeedError,
    PromptError,
    StageError,
    UnknownNameError,
    UnsupportedCallError,
    VideoError,
)
from vidsieve.evaluation.items import Item
from vidsieve.io.faults import contained
from vidsieve.options import chosen
from vidsieve.training.data.wording import Wording, prompt_about, worded
from vidsieve.training.judging import judge
from vidsieve.types import ENCODER_NEEDS, Need
from vidsieve.video.reading import Video, read_video

WAYS = ("generate", "choice")
"""How an answer is had: generated text judged by its kind of question, or the likeliest of the options' letters."""


@dataclass(frozen=True)
class Condition:
    """How many frames are read, and what keeps their tokens; no method: all of them."""

    frames: int
    compressor: Compressor | None = None
    policy: str = ""
    """Folder of a policy that the user named, to tell conditions of one method apart."""

    @property
    def key(self) -> str:
        """A name that no other condition of a run has."""
        return "/".join(str(value) for value in self.described().values())

    def described(self) -> dict[str, Any]:
        """Return what a table says of the condition."""
        method = self.compressor
        if method is None:
            said = {"method": "full", "variant": "-", "part": "", "policy": "", "retention": "1"}
        else:
            kept = method.retention
            said = {
                "method": method.name,
                "variant": method.variant,
                "part": method.part,
                "policy": self.policy,
                "retention": f"{kept:g}" if isinstance(kept, float) else f"{kept.count}t",
            }
        return {**said, "frames": self.frames}


@dataclass(frozen=True)
class Examiner:
    """Asks a model about videos.

    Parameters
    ----------
    adapter, processor : of the model
    conditions : sequence of Condition
    closing : str or None
        What ends a prompt after its options; None: what its kind of question has.
    way : str
        One of `WAYS`.
    fps : float, optional
        Frames a second, of which a condition's `frames` are then the most.
    max_new_tokens, seed : int
    keep : bool
        Whether kept indices are noted.
    """

    adapter: Adapter
    processor: Any
    conditions: Sequence[Condition]
    closing: str | None = None
    way: str = "generate"
    fps: float | None = None
    max_new_tokens: int = 16
    seed: int = 0
    keep: bool = False
    refused: dict[str, str] = field(init=False)
    """By condition, why this model cannot be asked under it."""

    def __post_init__(self) -> None:
        if self.way not in WAYS:
            raise UnknownNameError("way to answer", self.way, WAYS)
        refused = {}
        for condition in self.conditions:
            try:
                if condition.compressor is not None:
                    self.adapter.check(condition.compressor)
            except (BudgetError, NeedError, StageError, UnsupportedCallError) as error:
                refused[condition.key] = str(error)
        object.__setattr__(self, "refused", refused)

    @torch.no_grad()
    def measure(self, items: Sequence[Item]) -> dict[str, Any]:
        """Return what the model says to questions about one video.

        Returns
        -------
        dict
            ``samples``: per item and condition ``item, condition, said, score, kept, total, layers, prompt``, and
            ``indices, grid`` where they are kept. ``refused``: by condition, why its method cannot run on this model or
            keep so little of this video. ``faults``: by item, why its question could not be asked, or not under some
            condition. ``select_ms``: by condition. Or ``failed``: why the video could not be read.
        """
        samples: list[dict[str, Any]] = []
        refused, faults = dict(self.refused), dict[str, str]()
        spent: dict[str, list[float]] = {}
        for frames in sorted({condition.frames for condition in self.conditions}):
            asked = [condition for condition in self.conditions if condition.frames == frames]
            asked = [condition for condition in asked if condition.key not in self.refused]
            try:
                video = frames_of(items[0].video, frames, self.fps)
            except VideoError as error:
                return {"failed": str(error), "samples": [], "refused": refused, "faults": {}, "select_ms": {}}
            for item, encoded in self._encoded(video, items, asked, faults):
                for condition in asked:
                    if condition.key in refused:
                        continue
                    with contained(faults, item.id, PromptError), contained(refused, condition.key, BudgetError):
                        said, score, prompt, traces = self._answer(encoded, item, condition)
                        spent.setdefault(condition.key, []).append(sum(trace.select_ms for trace in traces))
                        samples.append(
                            {
                                "item": item.id,
                                "condition": condition.key,
                                "said": said,
                                "score": score,
                                **_kept(encoded, traces),
                                "prompt": list(prompt),
                                **(_indices(traces) if self.keep else {}),
                            }
                        )
        return {"samples": samples, "refused": refused, "faults": faults, "select_ms": spent}

    def _encoded(
        self, video: Video, items: Sequence[Item], conditions: Sequence[Condition], faults: dict[str, str]
    ) -> Iterator[tuple[Item, Encoded]]:
        """Yield every question's prompt, the video through the vision encoder once where the processor allows it.

        Questions that cannot be asked are left out, and noted in `faults`.
        """
        methods = [condition.compressor for condition in conditions if condition.compressor is not None]
        needs: frozenset[Need] = frozenset().union(*(method.needs for method in methods)) & ENCODER_NEEDS
        device = self.adapter.device
        wording: Wording | None = None
        with_pixels = False  # prompts of some processors are made with the pixels only
        for item in items:
            text = item.prompt(self.closing)
            try:
                if wording is None and not with_pixels:
                    try:
                        made, wording = worded(self.processor, video, text)
                        (features,) = self.adapter.features(on_device(made, device), needs)
                    except UnsupportedCallError:
                        with_pixels = True
                if wording is None:
                    encoded = self.adapter.encode(on_device(chat(self.processor, video, text), device), needs=needs)
                else:
                    encoded = prompt_about(self.adapter, self.processor, features, wording, text)
            except PromptError as error:
                faults[item.id] = str(error)
                continue
            yield item, encoded

    def _answer(
        self, encoded: Encoded, item: Item, condition: Condition
    ) -> tuple[str, float, tuple[int, int], tuple[VideoTrace, ...]]:
        method = condition.compressor
        if self.way == "choice":
            best, prompt, traces = choice(self.adapter, encoded, self._tokens(item), method, seed=self.seed)
            word = item.answers[best]
            return word, float(word == item.answer), prompt, traces
        said = reply(self.adapter, self.processor, encoded, method, max_new_tokens=self.max_new_tokens, seed=self.seed)
        if item.kind == "multiple choice" and item.listed:
            score = float(chosen(said.text, item.options, item.answers) == item.answer)
        else:
            score = judge(item.kind, said.text, item.answer)
        return said.text, score, said.prompt_tokens, said.traces

    def _tokens(self, item: Item) -> Tensor:
        """Return the token of each of an item's possible answers.

        Raises
        ------
        PromptError
            If it has none, one is not one token, or two are the same one.
        """
        ids = [self.processor.tokenizer(word, add_special_tokens=False)["input_ids"] for word in item.answers]
        if not ids or any(len(tokens) != 1 for tokens in ids) or len({tokens[0] for tokens in ids}) < len(ids):
            raise PromptError(f"question {item.id!r} cannot be answered by one token each: use --answer generate")
        return torch.tensor([tokens[0] for tokens in ids])


def frames_of(path: str | Path, frames: int, fps: float | None) -> Video:
    """Return so many frames of a video taken evenly, or, with a rate, its frames at that rate and at most so many.

    Raises
    ------
    VideoError
    """
    return read_video(path, frames=frames) if fps is None else read_video(path, fps=fps, max_frames=frames)


def _indices(traces: Sequence[VideoTrace]) -> dict[str, Any]:
    """Return which tokens of every video are left, and their grid; of all tokens neither."""
    grid = traces[0].grid if traces else None
    return {
        "indices": [list(trace.indices) for trace in traces],
        "grid": [grid.frames, grid.height, grid.width] if grid else None,
    }


def _kept(encoded: Encoded, traces: Sequence[VideoTrace]) -> dict[str, Any]:
    """Return how many tokens are left of how many, and the share that the LLM's layers see on average."""
    total = sum(span.features.grid.num_tokens for span in encoded.videos)
    if not traces:
        return {"kept": total, "total": total, "layers": 1.0}
    layers = sum(trace.layer_retention * trace.total for trace in traces) / total
    return {"kept": sum(trace.kept for trace in traces), "total": total, "layers": layers}
