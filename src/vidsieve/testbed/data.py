"""Endless training prompts from fresh scenes of the testbed; the same number gives the same prompt."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor

from vidsieve.adapters.base import Adapter
from vidsieve.adapters.batch import VideoFeatures
from vidsieve.rl.samples import Caption, Choice
from vidsieve.testbed.model import WORD_ID, chat_inputs, repeated_features
from vidsieve.testbed.questions import CAPTION_PROMPT, Question, make_caption, make_questions
from vidsieve.testbed.world import make_cast, render

_KEPT_SCENES = 64


class ScenePrompts:
    """Scenes under one seed, rendered and encoded on first use; the last few stay in memory.

    Parameters
    ----------
    adapter, processor : of the testbed's model
    world : {"A", "B"}
    seed : int
        Training seeds and evaluation seeds must differ.
    per_scene : int
        Prompts taken from a scene; neighbours in the order of samples come from different scenes.
    """

    def __init__(self, adapter: Adapter, processor: Any, world: str = "A", seed: int = 1, per_scene: int = 8) -> None:
        self.adapter, self.processor, self.world, self.seed, self.per_scene = adapter, processor, world, seed, per_scene
        self._scenes: OrderedDict[int, tuple[VideoFeatures, list[Question], str]] = OrderedDict()

    def _scene(self, index: int) -> tuple[VideoFeatures, list[Question], str]:
        if index not in self._scenes:
            cast = make_cast(self.world, self.seed, index)
            pixels = chat_inputs(self.processor, render(cast, self.seed, index), [CAPTION_PROMPT])
            with torch.no_grad():
                (features,) = self.adapter.video_features(pixels)
            self._scenes[index] = features, make_questions(cast, self.seed, index), make_caption(cast)
            if len(self._scenes) > _KEPT_SCENES:
                self._scenes.popitem(last=False)
        self._scenes.move_to_end(index)
        return self._scenes[index]

    def choice(self, number: int) -> Choice:
        """Return multiple-choice prompt `number`: question ⌊number / 32⌋ mod `per_scene` of one of 32 scenes."""
        block, place = divmod(number, 32 * self.per_scene)
        features, questions, _ = self._scene(block * 32 + place % 32)
        question = questions[(place // 32) % len(questions)]
        inputs = self._inputs(features, question.text, "")
        options = torch.tensor([WORD_ID[word] for word in question.options])
        return Choice(inputs, options, question.options.index(question.answer), question.answer)

    def caption(self, number: int) -> Caption:
        """Return caption prompt `number`, one a scene."""
        features, _, caption = self._scene(number)
        inputs = self._inputs(features, CAPTION_PROMPT, caption)
        ids = inputs["input_ids"]
        labels = torch.full_like(ids, -100)
        length = len(caption.split()) + 1
        labels[:, -length:] = ids[:, -length:]
        return Caption(inputs | {"labels": labels}, key=str(number))

    def _inputs(self, features: VideoFeatures, question: str, answer: str) -> dict[str, Any]:
        """Return one prompt's inputs with ready features; an answer is followed by the end of its turn."""
        text = self.processor.apply_chat_template(
            [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": question}]}],
            add_generation_prompt=True, tokenize=False,
        )  # fmt: skip
        video = self.processor.video_token
        count = features.grid.num_tokens + features.tail.shape[0]
        text = text.replace(video, video * count) + (f" {answer} <|im_end|>" if answer else "")
        ids: Tensor = self.processor.tokenizer(text, return_tensors="pt")["input_ids"]
        return {
            "input_ids": ids, "attention_mask": torch.ones_like(ids),
            "mm_encoder_outputs": {"video": repeated_features(features, 1)},
        }  # fmt: skip
