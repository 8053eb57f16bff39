"""Prompts of the testbed's models, and the ids of their words."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from vidsieve.testbed.vocabulary import VOCABULARY

WORD_ID = {word: i for i, word in enumerate(VOCABULARY)}


def chat_inputs(processor: Any, frames: NDArray[np.uint8], questions: list[str]) -> dict[str, Any]:
    """Return the processor's inputs of a batch with one prompt per question about one video (T, H, W, 3).

    The pixels are there once; repeat them, or their features, for the batch.
    """
    texts = [
        processor.apply_chat_template(
            [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": question}]}],
            add_generation_prompt=True,
            tokenize=False,
        )
        for question in questions
    ]
    inputs = processor(text=texts[:1], videos=[frames], return_tensors="pt")
    placeholders = int((inputs["input_ids"] == processor.video_token_id).sum())
    expanded = [text.replace(processor.video_token, processor.video_token * placeholders) for text in texts]
    words = processor.tokenizer(expanded, return_tensors="pt", padding=True, padding_side="left")
    return {**words, "pixel_values_videos": inputs["pixel_values_videos"]}
