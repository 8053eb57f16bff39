"""A tiny LLaVA-NeXT-Video: frames of 6×6 patches in 3×3 tokens."""

from __future__ import annotations

from typing import Any

from vidsieve.testing.tiny_models import random_model, text_config
from workbench.families import Tiny
from workbench.families._stacked import CLIP_LAYERS, LLAVA_IDS, SIDE, stacked_inputs


def model(seed: int = 0, layers: int = 3) -> Any:
    """Return a random LLaVA-NeXT-Video, `layers` layers of width 64 over a CLIP of three, read at the second."""
    return random_model(
        "LlavaNextVideo",
        seed,
        vision_config=CLIP_LAYERS,
        text_config=text_config(layers, model_type="llama"),
        image_grid_pinpoints=[[SIDE, SIDE]],
        **LLAVA_IDS,
    )


# An image is itself and one tile, whose rows end in newlines.
IMAGES = {"pixel_values": (2, 3, SIDE, SIDE), "image_sizes": [SIDE, SIDE]}
TINY = Tiny(model, stacked_inputs(9, 6 * 6 + 6 * 7, IMAGES))
