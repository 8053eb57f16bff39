"""What the tiny MiniCPM-V models share: the first video of a prompt has slices, further ones have none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vidsieve.testing.tiny_models import IMAGE, VIDEO, VISION, mrope, random_model, rows_to_batch, text_config
from workbench.families import Batch
from workbench.families.qwen3_5 import TEXT

NUMBER, NUMBER_END, SLICE, SLICE_END, FRAME, FRAME_END, NEWLINE = 114, 115, 116, 117, 118, 119, 10
OVERVIEW, PART, DOWN, ACROSS = (2, 4), (3, 1), 2, 3
"""Tokens of a frame and of a slice of it, and slices along a frame's sides."""


def minicpm_model(name: str, **fields: Any) -> Callable[[int, int], Any]:
    """Return the function that makes a model of transformers' classes `name`, its LLM a tiny Qwen3.5."""

    def model(seed: int = 0, layers: int = 4) -> Any:
        text = text_config(layers, head_dim=16, **mrope([2, 1, 1], mrope_interleaved=True)) | TEXT
        return random_model(
            name,
            seed,
            0.08,
            vision_config=VISION | {"patch_size": 4, "image_size": 64},
            text_config=text | {"model_type": "qwen3_5_text"},
            insert_layer_id=0,
            image_token_id=IMAGE,
            video_token_id=VIDEO,
            **fields,
        )

    return model


def minicpm_inputs(merged: int, numbered: bool) -> Callable[[Batch, list[int], str], dict[str, Tensor]]:
    """Return the function that makes inputs; a token is `merged`² patches.

    Videos are `numbered`, or else ``mm_token_type_ids`` mark their tokens.
    """

    def inputs(batch: Batch, words: list[int], pad: str = "left") -> dict[str, Tensor]:
        draw = torch.Generator().manual_seed(1)

        def frame(sliced: bool) -> list[int]:
            ids = [FRAME, *[VIDEO] * (OVERVIEW[0] * OVERVIEW[1]), FRAME_END]
            line = [SLICE, *[VIDEO] * (PART[0] * PART[1]), SLICE_END] * ACROSS
            return ids + (line + [NEWLINE, *line] * (DOWN - 1)) * sliced

        prompts = [
            [[NUMBER, 20 + k, NUMBER_END] * numbered + frame(k == 0) * frames for k, frames in enumerate(videos)]
            for videos in batch
        ]
        shapes = [
            shape
            for videos in batch
            for k, frames in enumerate(videos)
            for _ in range(frames)
            for shape in [OVERVIEW, *[PART] * (DOWN * ACROSS * (k == 0))]
        ]
        sizes = torch.tensor(shapes, dtype=torch.int32) * merged
        found = rows_to_batch(prompts, words, pad, draw) | {
            "pixel_values_videos": torch.randn(1, 3, 4, 4 * int(sizes.prod(1).sum()), generator=draw),
            "target_sizes_videos": sizes,
        }
        return found | ({} if numbered else {"mm_token_type_ids": 2 * (found["input_ids"] == VIDEO).long()})

    return inputs
