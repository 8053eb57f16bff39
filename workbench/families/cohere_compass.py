"""A tiny Cohere Compass: three sliding layers of eight tokens, then one of full attention without positions."""

from __future__ import annotations

from typing import Any

from vidsieve.testing.tiny_models import QWEN_IDS, QWEN_VISION, mrope, random_model, text_config
from workbench.families import Tiny
from workbench.families._qwen import qwen_inputs
from workbench.families.qwen3_vl_moe import VISION


def model(seed: int = 0, layers: int = 4) -> Any:
    """Return a random Cohere Compass, `layers` layers of width 64."""
    kinds = ["full_attention" if number % 4 == 3 else "sliding_attention" for number in range(layers)]
    rope = {"sliding_attention": mrope([4, 2, 2])["rope_parameters"], "full_attention": None}
    return random_model(
        "CohereCompass",
        seed,
        0.08,
        vision_config=QWEN_VISION | VISION,
        text_config=text_config(layers, sliding_window=8, layer_types=kinds, rope_parameters=rope),
        **QWEN_IDS,
    )


TINY = Tiny(model, qwen_inputs(timed=True), layers=4)
