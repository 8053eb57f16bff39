"""A tiny VideoLLaMA 3: frames of 4×8 patches in 2×4 tokens, of which the processor leaves some."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vidsieve.testing.tiny_models import IMAGE, VIDEO, VISION, random_model, rows_to_batch, text_config
from workbench.families import Batch, Tiny

SIZE, PATCHES, COMMA = 8, [4, 8], 99


def model(seed: int = 0, layers: int = 3) -> Any:
    """Return a random VideoLLaMA 3, `layers` layers of width 64."""
    return random_model(
        "VideoLlama3",
        seed,
        vision_config=VISION | {"patch_size": 4},
        text_config=text_config(layers, model_type="qwen2"),
        image_token_id=IMAGE,
        video_token_id=VIDEO,
    )


def inputs(batch: Batch, words: list[int], pad: str = "left", image: bool = False) -> dict[str, Tensor]:
    """Return prompts with a time before each frame; the first frame of a video is whole, later ones mostly not."""
    draw = torch.Generator().manual_seed(1)
    flat = [frames for videos in batch for frames in videos]
    masks = [torch.rand(frames, SIZE, generator=draw) > 0.4 for frames in flat]
    for mask in masks:
        mask[0], mask[:, 0] = True, True
    left = iter(masks)
    parts = [[_timed(next(left)) for _ in videos] for videos in batch]
    found = rows_to_batch(parts, words, pad, draw, [IMAGE] * SIZE if image else [])
    found |= {
        "pixel_values_videos": torch.randn(sum(flat) * 4 * SIZE, 48, generator=draw),
        "video_grid_thw": torch.tensor([[frames, *PATCHES] for frames in flat]),
        "video_merge_sizes": torch.full((len(flat),), 2),
        "video_compression_mask": torch.cat([mask.flatten() for mask in masks]),
    }
    if image:
        found["pixel_values"] = torch.randn(len(batch) * 4 * SIZE, 48, generator=draw)
        found["image_grid_thw"] = torch.tensor([[1, *PATCHES]] * len(batch))
        found["image_merge_sizes"] = torch.full((len(batch),), 2)
    return found


def _timed(mask: Tensor) -> list[int]:
    """Return the ids of a video with a mask (T, n): a time, the tokens that are left, a comma between frames."""
    frames = [[100 + number, *[VIDEO] * count] for number, count in enumerate(mask.sum(1).tolist())]
    return [i for frame in frames for i in (*frame, COMMA)][:-1]


TINY = Tiny(model, inputs)
