"""A tiny HyperCLOVA X Vision 2."""

from __future__ import annotations

from typing import Any

from vidsieve.testing.tiny_models import IMAGE, QWEN_VISION, VIDEO, random_model, text_config
from workbench.families import Tiny
from workbench.families._grids import grid_inputs

SCALES = {
    "embedding_multiplier": 2.0,
    "logits_scaling": 0.5,
    "residual_multiplier": 0.7,
    "attention_multiplier": 0.3,
}
"""None is 1, nor what attention has by default."""


def model(seed: int = 0, layers: int = 3) -> Any:
    """Return a random HyperCLOVA X Vision 2, `layers` layers of width 64."""
    return random_model(
        "HyperCLOVAXVisionV2",
        seed,
        vision_config=QWEN_VISION | {"depth": 2, "window_size": 16, "fullatt_block_indexes": [1]},
        text_config=text_config(layers, model_type="hyperclovax", head_dim=16, **SCALES),
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        tie_word_embeddings=False,
    )


TINY = Tiny(model, grid_inputs)
