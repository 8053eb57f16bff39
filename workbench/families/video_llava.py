"""A tiny Video-LLaVA: frames of 6×6 patches and a class token."""

from __future__ import annotations

from typing import Any

from vidsieve.testing.tiny_models import random_model, text_config
from workbench.families import Tiny
from workbench.families._stacked import CLIP_LAYERS, LLAVA_IDS, SIDE, stacked_inputs


def model(seed: int = 0, layers: int = 3) -> Any:
    """Return a random Video-LLaVA, `layers` layers of width 64 over two CLIPs of three, read at the second."""
    text = text_config(layers, model_type="llama")
    return random_model("VideoLlava", seed, vision_config=CLIP_LAYERS, text_config=text, **LLAVA_IDS)


# Images come without the class token, under the name that the processor still gives them.
TINY = Tiny(model, stacked_inputs(37, 36, {"pixel_values_images": (3, SIDE, SIDE)}))
