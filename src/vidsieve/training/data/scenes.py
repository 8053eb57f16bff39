"""Endless training prompts from fresh scenes of the testbed; the same number gives the same prompt."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vidsieve.adapters.adapter import Adapter
from vidsieve.adapters.encoded import VideoFeatures, on_device
from vidsieve.testbed.model import WORD_ID, chat_inputs
from vidsieve.testbed.pseudo import make_pseudo
from vidsieve.testbed.questions import CAPTION_PROMPT, Question, make_caption, make_questions
from vidsieve.testbed.vocabulary import COLOURS, PLACES
from vidsieve.testbed.world import Cast, make_cast, render
from vidsieve.training.data.filtering import blind_answers
from vidsieve.training.data.samples import Caption, Choice

_KEPT_SCENES = 64

Drawing = tuple[Cast, NDArray[np.uint8]]
"""A scene, and its frames; what any thread can make."""
Sample = Choice | Caption


class ScenePrompts:
    """Scenes under one seed, rendered and encoded on first use; the last few stay in memory.

    Any thread may render ahead by `read_choice` and its siblings; `finished` gives the sample, equal to that of
    `choice`, in the thread that runs the model.

    Parameters
    ----------
    adapter, processor : of one of the testbed's models
    world : str, its name in `WORLDS`
    seed : int
        Training seeds and evaluation seeds must differ.
    per_scene : int
        Prompts taken from a scene; neighbours in the order of samples come from different scenes.
    blind_filter : bool
        Leave out questions that the model answers without the video (ineffective-sample filtering).
    captioned : bool
        Give each question the caption of its scene.
    """

    def __init__(
        self,
        adapter: Adapter,
        processor: Any,
        world: str = "dense",
        seed: int = 1,
        per_scene: int = 8,
        blind_filter: bool = False,
        captioned: bool = False,
    ) -> None:
        self.adapter, self.processor, self.world, self.seed, self.per_scene = adapter, processor, world, seed, per_scene
        self.blind_filter, self.captioned = blind_filter, captioned
        self._scenes: OrderedDict[int, tuple[VideoFeatures, list[Question], str]] = OrderedDict()
        self._drawn: dict[tuple[str, int], Drawing] = {}

    def read_choice(self, number: int) -> Callable[[], Sample]:
        """Return multiple-choice prompt `number` for `finished`, its scene rendered; any thread may call this."""
        return self._read(self.choice, number, self._index(number))

    def read_caption(self, number: int) -> Callable[[], Sample]:
        """Return caption prompt `number` for `finished`, its scene rendered; any thread may call this."""
        return self._read(self.caption, number, number)

    def read_pseudo(self, number: int) -> Callable[[], Sample]:
        """Return caption prompt `number` of a pseudo-video for `finished`, rendered; any thread may call this."""
        return self._later(self.pseudo, number, {("pseudo", number): make_pseudo(self.world, self.seed, number)})

    def finished(self, ready: Callable[[], Sample]) -> Sample:
        """Return a prompt that was read, ready for use; the thread that runs the model calls this."""
        return ready()

    def _read(self, take: Callable[[int], Sample], number: int, index: int) -> Callable[[], Sample]:
        return self._later(take, number, {} if index in self._scenes else {("scene", index): self._draw(index)})

    def _later(
        self, take: Callable[[int], Sample], number: int, drawn: dict[tuple[str, int], Drawing]
    ) -> Callable[[], Sample]:
        def ready() -> Sample:
            self._drawn = drawn
            try:
                return take(number)
            finally:
                self._drawn = {}

        return ready

    def _draw(self, index: int) -> Drawing:
        cast = make_cast(self.world, self.seed, index)
        return cast, render(cast, self.seed, index)

    def _scene(self, index: int) -> tuple[VideoFeatures, list[Question], str]:
        if index not in self._scenes:
            cast, frames = self._drawn.get(("scene", index)) or self._draw(index)
            features = self._features(frames)
            questions = make_questions(cast, self.seed, index)
            self._scenes[index] = features, self._seeing(questions), make_caption(cast)
            if len(self._scenes) > _KEPT_SCENES:
                self._scenes.popitem(last=False)
        self._scenes.move_to_end(index)
        return self._scenes[index]

    @torch.no_grad()
    def _features(self, frames: NDArray[np.uint8]) -> VideoFeatures:
        inputs = chat_inputs(self.processor, frames, [CAPTION_PROMPT])
        (features,) = self.adapter.video_features(on_device(inputs, self.adapter.device))
        return features

    def _seeing(self, questions: list[Question]) -> list[Question]:
        """Return the questions that take part: all, or those whose answer the model does not know beforehand."""
        if not self.blind_filter:
            return questions
        rows = [{"question": q.text, "options": list(q.options), "answer": q.answer} for q in questions]
        known = blind_answers(self.adapter.model, self.processor, rows, batch=len(rows))
        return [q for q, right in zip(questions, known, strict=True) if not right] or questions

    def asked(self, number: int) -> tuple[int, Question]:
        """Return the scene and the question of multiple-choice prompt `number`."""
        index, place = self._index(number), number % (32 * self.per_scene)
        questions = self._scene(index)[1]
        return index, questions[(place // 32) % len(questions)]

    def _index(self, number: int) -> int:
        block, place = divmod(number, 32 * self.per_scene)
        return block * 32 + place % 32

    def choice(self, number: int) -> Choice:
        """Return multiple-choice prompt `number`: question ⌊number / 32⌋ mod `per_scene` of one of 32 scenes."""
        index, question = self.asked(number)
        features = self._scene(index)[0]
        inputs = self._inputs(features, question.text, "")
        options = torch.tensor([WORD_ID[word] for word in question.options])
        right, targets = question.options.index(question.answer), torch.tensor(list(question.targets))
        caption = self.caption(index) if self.captioned else None
        return Choice(inputs, options, right, question.answer, targets=targets, caption=caption)

    def caption(self, number: int) -> Caption:
        """Return caption prompt `number`, one a scene."""
        features, _, caption = self._scene(number)
        return self._captioned(features, caption, str(number))

    def pseudo(self, number: int) -> Caption:
        """Return caption prompt `number` of a pseudo-video."""
        cast, frames = self._drawn.get(("pseudo", number)) or make_pseudo(self.world, self.seed, number)
        features = self._features(frames)
        # The model never saw such captions. Colours and places it reads off the video all the same; how sentences
        # follow each other it cannot know, and no token kept or dropped would help.
        return self._captioned(features, make_caption(cast), f"pseudo {number}", scored=(*COLOURS, *PLACES))

    def _captioned(
        self, features: VideoFeatures, caption: str, key: str, scored: Sequence[str] | None = None
    ) -> Caption:
        inputs = self._inputs(features, CAPTION_PROMPT, caption)
        ids = inputs["input_ids"]
        labels = torch.full_like(ids, -100)
        length = len(caption.split()) + 1
        labels[:, -length:] = ids[:, -length:]
        if scored is not None:
            labels[~torch.isin(labels, torch.tensor([WORD_ID[word] for word in scored]))] = -100
        return Caption(inputs | {"labels": labels}, key=key)

    def _inputs(self, features: VideoFeatures, question: str, answer: str) -> dict[str, Any]:
        """Return one prompt's inputs with ready features; an answer is followed by the end of its turn."""
        text = self.processor.apply_chat_template(
            [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": question}]}],
            add_generation_prompt=True,
            tokenize=False,
        )
        video = self.processor.video_token
        count = features.grid.num_tokens + features.tail.shape[0]
        text = text.replace(video, video * count) + (f" {answer} <|im_end|>" if answer else "")
        ids: Tensor = self.processor.tokenizer(text, return_tensors="pt")["input_ids"]
        return {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "mm_encoder_outputs": self.adapter.ready_features(features),
        }
