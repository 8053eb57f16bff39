"""Questions about videos that stay encoded: what a page asks again and again, with another method or retention."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vidsieve.adapters.encoded import Encoded, on_device
from vidsieve.adapters.pruning import adapter_for
from vidsieve.answering import Answer, Clock, chat, reply
from vidsieve.compressors.base import Compressor
from vidsieve.errors import PromptError, UnknownNameError, UnsupportedCallError
from vidsieve.training.data.wording import prompt_about, worded
from vidsieve.types import ENCODER_NEEDS, Need
from vidsieve.video.reading import Video, read_video

REMEMBERED = 4
"""Videos that stay encoded."""


@dataclass(frozen=True)
class Reply:
    """An answer, the video that it is about, and whether its features were there already."""

    answer: Answer
    video: Video
    reused: bool


class Desk:
    """Answers questions; a video is decoded and encoded once. One question at a time.

    Parameters
    ----------
    model, processor : of a supported family
    methods : mapping
        Name: method; None keeps all tokens.
    frames : int
        Frames taken evenly from a video.
    max_new_tokens : int

    Raises
    ------
    NeedError, StageError, PolicyMismatchError
        If a method does not fit the model.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        methods: Mapping[str, Compressor | None],
        *,
        frames: int = 16,
        max_new_tokens: int = 64,
    ) -> None:
        self.adapter, self.processor, self.methods = adapter_for(model), processor, dict(methods)
        self.frames, self.max_new_tokens = frames, max_new_tokens
        needs: frozenset[Need] = frozenset()
        for method in self.methods.values():
            if method is not None:
                self.adapter.check(method)
                needs |= method.needs & ENCODER_NEEDS
        self._needs = needs
        self._known: OrderedDict[tuple[str, int, int], tuple[Video, Any, Any]] = OrderedDict()
        self._lock = threading.Lock()

    @torch.no_grad()
    def ask(self, path: str | Path, question: str, method: str, retention: float) -> Reply:
        """Return the answer to a question about a video.

        Raises
        ------
        PromptError
            If the question is empty.
        UnknownNameError, VideoError, BudgetError, RetentionError
        """
        if not question.strip():
            raise PromptError("the question is empty: ask something")
        if method not in self.methods:
            raise UnknownNameError("method", method, self.methods)
        chosen = self.methods[method]
        if chosen is not None:
            chosen = chosen.with_retention(retention)
        clock = Clock()
        with self._lock:
            video, encoded, reused = self._encoded(Path(path), question, clock)
            made = reply(self.adapter, self.processor, encoded, chosen, max_new_tokens=self.max_new_tokens, clock=clock)
        return Reply(made, video, reused)

    def _encoded(self, path: Path, question: str, clock: Clock) -> tuple[Video, Encoded, bool]:
        """Return a video and a prompt about it, and whether the video was known."""
        stamp = path.stat() if os.path.isfile(path) else None
        key = (str(path.resolve()), stamp.st_mtime_ns if stamp else 0, stamp.st_size if stamp else 0)
        device = self.adapter.device
        if key in self._known:
            self._known.move_to_end(key)
            video, features, wording = self._known[key]
            with clock.part("encode", device):
                return video, prompt_about(self.adapter, self.processor, features, wording, question), True
        with clock.part("decode"):
            video = read_video(path, frames=self.frames)
        try:
            with clock.part("preprocess"):
                made, wording = worded(self.processor, video, question)
        except UnsupportedCallError:  # prompts of this processor are made with the pixels only
            with clock.part("encode", device):
                inputs = on_device(chat(self.processor, video, question), device)
                return video, self.adapter.encode(inputs, needs=self._needs), False
        with clock.part("encode", device):
            (features,) = self.adapter.features(on_device(made, device), self._needs)
            self._known[key] = video, features, wording
            while len(self._known) > REMEMBERED:
                self._known.popitem(last=False)
            return video, prompt_about(self.adapter, self.processor, features, wording, question), False
