"""What the tiny models of GLM's vision line share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from vidsieve.testing.tiny_models import IMAGE, VIDEO, mrope, random_model, rows_to_batch, text_config
from workbench.families import Batch
from workbench.families._qwen import HEIGHT, WIDTH

IDS = {"image_token_id": IMAGE, "video_token_id": VIDEO, "image_start_token_id": 118, "image_end_token_id": 119}
VIDEO_START, VIDEO_END = 116, 117


def glm_inputs(batch: Batch, words: list[int], pad: str = "left") -> dict[str, Tensor]:
    """Return the inputs of a batch, as `Tiny.inputs`: frames under the image placeholder, a time after each."""
    draw = torch.Generator().manual_seed(1)

    def placeholders(frames: int) -> list[int]:
        parts = [i for frame in range(frames) for i in (118, *[IMAGE] * (HEIGHT * WIDTH), 119, 100 + frame)]
        return [VIDEO_START, *parts, VIDEO_END]

    ids = rows_to_batch([[placeholders(frames) for frames in videos] for videos in batch], words, pad, draw)
    grids = torch.tensor([[frames, 2 * HEIGHT, 2 * WIDTH] for videos in batch for frames in videos])
    return ids | {
        "pixel_values_videos": torch.randn(int(grids.prod(1).sum()), 96, generator=draw),
        "video_grid_thw": grids,
        "mm_token_type_ids": 2 * (ids["input_ids"] == IMAGE).long(),
    }


def glm_model(name: str, sections: Sequence[int] = (4, 2, 2), **text: Any) -> Callable[[int, int], Any]:
    """Return the function that makes a model of transformers' classes `name`; `text` are fields of its LLM."""

    def model(seed: int = 0, layers: int = 3) -> Any:
        vision = {"depth": 2, "hidden_size": 32, "num_heads": 2, "patch_size": 4, "out_hidden_size": 64}
        return random_model(
            name,
            seed,
            0.08,
            vision_config=vision | {"image_size": 32, "intermediate_size": 64},
            text_config=text_config(layers, head_dim=16, **mrope(list(sections))) | text,
            video_start_token_id=VIDEO_START,
            video_end_token_id=VIDEO_END,
            **IDS,
        )

    return model
