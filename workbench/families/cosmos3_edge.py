"""A tiny Cosmos 3 Edge."""

from __future__ import annotations

from typing import Any

from vidsieve.testing.tiny_models import QWEN_IDS, VISION, mrope, random_model, text_config
from workbench.families import Tiny
from workbench.families._qwen import qwen_inputs


def model(seed: int = 0, layers: int = 3) -> Any:
    """Return a random Cosmos 3 Edge, `layers` layers of width 64."""
    return random_model(
        "Cosmos3Edge",
        seed,
        vision_config=VISION | {"patch_size": 4, "num_patches": 64},
        text_config=text_config(layers, head_dim=16, **mrope([4, 2, 2], mrope_interleaved=True)),
        projector_hidden_size=64,
        **QWEN_IDS,
    )


TINY = Tiny(model, qwen_inputs(timed=True, patch=48))
