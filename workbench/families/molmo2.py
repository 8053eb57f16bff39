"""A tiny Molmo2."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vidsieve.testing.tiny_models import VISION, random_model, rows_to_batch, text_config
from workbench.families import Batch, Tiny

PATCH, FRAME, FRAME_END = 130, 131, 132
"""Ids beyond the vocabulary that the model speaks, as in its checkpoints."""
SIDE, TOKENS = 5, 3
"""Patches and tokens along one side of a frame."""


def model(seed: int = 0, layers: int = 3) -> Any:
    """Return a random Molmo2, `layers` layers of width 64, the first with a RoPE of its own."""
    heads = {"head_dim": 16, "num_key_value_heads": 2, "num_attention_heads": 2}
    rope = {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}
    return random_model(
        "Molmo2",
        seed,
        vision_config=VISION | heads | {"image_size": [4 * SIDE, 4 * SIDE], "patch_size": 4},
        adapter_config=heads
        | {"vision_feature_layer": [1, 0], "hidden_size": 32, "intermediate_size": 64, "text_hidden_size": 64},
        text_config=text_config(
            layers,
            head_dim=16,
            additional_vocab_size=16,
            rope_parameters=rope,
            rope_scaling_layers=list(range(1, layers)),
        ),
        image_patch_id=PATCH,
        frame_start_token_id=FRAME,
        frame_end_token_id=FRAME_END,
        image_start_token_id=133,
        image_end_token_id=134,
        low_res_image_start_token_id=135,
    )


def inputs(batch: Batch, words: list[int], pad: str = "left") -> dict[str, Tensor]:
    """Return inputs as the processor makes them: a time, then a frame between markers; 2×2 patches a token."""
    draw = torch.Generator().manual_seed(1)
    size = TOKENS**2

    def placeholders(frames: int) -> list[int]:
        return [i for frame in range(frames) for i in (100 + frame, 10, FRAME, *[PATCH] * size, FRAME_END)]

    ids = rows_to_batch([[placeholders(frames) for frames in videos] for videos in batch], words, pad, draw)
    counts = [frames for videos in batch for frames in videos]
    # The odd patch at the end shares its token with padding, −1.
    raster = torch.nn.functional.pad(torch.arange(SIDE**2).view(SIDE, SIDE), (0, 1, 0, 1), value=-1)
    windows = raster.view(TOKENS, 2, TOKENS, 2).transpose(1, 2).reshape(1, size, 4)
    shifts = SIDE**2 * torch.arange(sum(counts)).view(-1, 1, 1)
    return ids | {
        "pixel_values_videos": torch.randn(sum(counts), SIDE**2, 48, generator=draw),
        "video_token_pooling": torch.where(windows < 0, -1, windows + shifts).flatten(0, 1),
        "video_grids": torch.tensor([[frames, TOKENS, TOKENS] for frames in counts]),
        "mm_token_type_ids": (ids["input_ids"] >= PATCH).long(),
    }


TINY = Tiny(model, inputs)
