"""What the tiny models with Qwen's vision tower and prompts share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vidsieve.testing.tiny_models import (
    IMAGE,
    QWEN_IDS,
    QWEN_VISION,
    VIDEO,
    mrope,
    random_model,
    rows_to_batch,
    text_config,
)
from workbench.families import Batch

HEIGHT, WIDTH = 2, 4
"""Merged tokens of a frame."""


def qwen_inputs(timed: bool, patch: int = 96, rows: int = 1) -> Callable[[Batch, list[int], str], dict[str, Tensor]]:
    """Return the function that makes inputs.

    `timed` prompts have a time before each frame; a patch has `patch` values, a token `rows` rows of the grid's time.
    """

    def inputs(batch: Batch, words: list[int], pad: str = "left") -> dict[str, Tensor]:
        draw = torch.Generator().manual_seed(1)
        size = HEIGHT * WIDTH

        def placeholders(frames: int) -> list[int]:
            if not timed:
                return [118, *[VIDEO] * (frames * size), 119]
            return [i for frame in range(frames) for i in (100 + frame, 118, *[VIDEO] * size, 119)]

        ids = rows_to_batch([[placeholders(frames) for frames in videos] for videos in batch], words, pad, draw)
        grids = torch.tensor([[rows * frames, 2 * HEIGHT, 2 * WIDTH] for videos in batch for frames in videos])
        return ids | {
            "pixel_values_videos": torch.randn(int(grids.prod(1).sum()), patch, generator=draw),
            "video_grid_thw": grids,
            "mm_token_type_ids": 2 * (ids["input_ids"] == VIDEO).long() + (ids["input_ids"] == IMAGE).long(),
        }

    return inputs


def qwen_model(
    name: str, vision: dict[str, Any], text: dict[str, Any], sections: list[int], spread: float = 0.12
) -> Callable[[int, int], Any]:
    """Return the function that makes a model of transformers' classes `name`."""

    def model(seed: int = 0, layers: int = 3) -> Any:
        return random_model(
            name,
            seed,
            spread,
            vision_config=QWEN_VISION | vision,
            text_config=text_config(layers, head_dim=16, **mrope(sections, mrope_interleaved=True)) | text,
            **QWEN_IDS,
        )

    return model
