"""A tiny Nemotron Omni: Mamba, experts, full attention, Mamba, an MLP, and an audio tower."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vidsieve.testing.tiny_models import IMAGE, VIDEO, random_model, rows_to_batch, text_config
from workbench.families import Batch, Tiny

AUDIO = 117
KINDS = ("linear_attention", "moe", "full_attention", "linear_attention", "mlp")
HEIGHT, WIDTH = 2, 4
"""Tokens of a tubelet."""
TEXT = {
    "model_type": "nemotron_h",
    "head_dim": 16,
    "ssm_state_size": 16,
    "mamba_num_heads": 4,
    "mamba_head_dim": 32,
    "n_groups": 2,
    "chunk_size": 8,
    "n_routed_experts": 4,
    "moe_intermediate_size": 48,
    "moe_shared_expert_intermediate_size": 48,
}
VISION = {
    "model_type": "radio",
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "patch_size": 4,
    "max_img_size": 32,
    "video_temporal_patch_size": 2,
}
HEARING = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "subsampling_conv_channels": 8,
    "num_mel_bins": 16,
    "projection_hidden_size": 32,
    "projection_bias": False,
}


def model(seed: int = 0, layers: int = 5) -> Any:
    """Return a random Nemotron Omni, `layers` layers of width 64."""
    kinds = [KINDS[number % len(KINDS)] for number in range(layers)]
    return random_model(
        "NemotronH_Omni_Reasoning_V3",
        seed,
        0.08,
        vision_config=VISION,
        text_config={**text_config(layers), **TEXT, "layers_block_type": kinds},
        audio_config=HEARING,
        vision_hidden_size=32,
        projector_hidden_size=64,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        audio_token_id=AUDIO,
    )


def inputs(batch: Batch, words: list[int], pad: str = "left") -> dict[str, Tensor]:
    """Return inputs whose tubelets have the times of two frames each; a call's videos are all as long as the first."""
    draw, frames = torch.Generator().manual_seed(1), batch[0][0]
    tubelets = [[100 + 2 * i, 101 + 2 * i, 118, *[IMAGE] * (HEIGHT * WIDTH), 119, 112] for i in range(frames)]
    video = [i for tubelet in tubelets for i in tubelet][:-1]
    pixels = torch.randn(sum(map(len, batch)), frames, 6, 8 * HEIGHT, 8 * WIDTH, generator=draw)
    return rows_to_batch([[video] * len(videos) for videos in batch], words, pad, draw) | {
        "pixel_values_videos": pixels
    }


TINY = Tiny(model, inputs, layers=5)
