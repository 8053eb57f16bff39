"""A tiny EXAONE 4.5: three layers with a window of 16 tokens, then one that sees all."""

from __future__ import annotations

from typing import Any

from vidsieve.testing.tiny_models import IMAGE, QWEN_VISION, VIDEO, random_model, text_config
from workbench.families import Tiny
from workbench.families._grids import grid_inputs


def model(seed: int = 0, layers: int = 4) -> Any:
    """Return a random EXAONE 4.5, `layers` layers of width 64; heads of its tower share keys."""
    vision = {"depth": 2, "window_size": 16, "fullatt_block_indexes": [1], "num_heads": 4, "num_key_value_heads": 2}
    text = text_config(layers, model_type="exaone4", sliding_window=16)
    return random_model(
        "Exaone4_5_",
        seed,
        vision_config=QWEN_VISION | vision,
        text_config=text,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
    )


TINY = Tiny(model, grid_inputs, layers=4)
