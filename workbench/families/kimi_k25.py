"""A tiny Kimi-K2.5: one dense layer with latent attention, then two with experts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vidsieve.testing.tiny_models import IMAGE, VISION, VOCABULARY, random_model, rows_to_batch, text_config
from workbench.families import Batch, Tiny

VIDEO = VOCABULARY
"""The first id beyond the words, as in its checkpoints: no embedding belongs to it."""
BEGIN, CONTENT, END = 118, 117, 119
HEIGHT, WIDTH = 2, 4
"""Merged tokens of a chunk."""
CHUNK = 2
"""Frames averaged in a chunk; the last of a video has one."""
LATENT = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 16,
    "q_lora_rank": 24,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
}
EXPERTS = {
    "first_k_dense_replace": 1,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "moe_intermediate_size": 32,
}


def model(seed: int = 0, layers: int = 3) -> Any:
    """Return a random Kimi-K2.5, `layers` layers of width 64."""
    return random_model(
        "Kimi_K25",
        seed,
        vision_config=VISION
        | {"patch_size": 4, "pos_emb_height": 8, "pos_emb_width": 8}
        | {"rope_parameters": {"rope_type": "axial", "rope_theta": 1e4}},
        text_config=text_config(layers, model_type="deepseek_v3", **LATENT, **EXPERTS),
        projection_hidden_size=32,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=BEGIN,
        vision_end_token_id=END,
        tie_word_embeddings=False,
    )


def inputs(batch: Batch, words: list[int], pad: str = "left") -> dict[str, Tensor]:
    """Return inputs as the processor makes them: a time, the word "video" between markers, and the chunk."""
    draw = torch.Generator().manual_seed(1)

    def placeholders(chunks: int) -> list[int]:
        size = HEIGHT * WIDTH
        return [i for k in range(chunks) for i in (20, 21 + k, 22, BEGIN, 11, CONTENT, *[VIDEO] * size, END)]

    ids = rows_to_batch([[placeholders(chunks) for chunks in videos] for videos in batch], words, pad, draw)
    counts = [chunks for videos in batch for chunks in videos]
    grids = torch.tensor(
        [[CHUNK if k + 1 < chunks else 1, 2 * HEIGHT, 2 * WIDTH] for chunks in counts for k in range(chunks)]
    )
    pixels = torch.randn(int(grids.prod(1).sum()), 3, 4, 4, generator=draw)
    return ids | {"pixel_values_videos": pixels, "video_grid_thw": grids}


TINY = Tiny(model, inputs)
