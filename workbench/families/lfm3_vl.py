"""A tiny LFM3-VL: two short convolutions, full attention, a convolution, a sliding window, a convolution."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from vidsieve.testing.tiny_models import QWEN_IDS, VISION, random_model, text_config
from workbench.families import Batch, Tiny
from workbench.families._qwen import qwen_inputs


def model(seed: int = 0, layers: int = 6) -> Any:
    """Return a random LFM3-VL, `layers` layers of width 64, a window of 24 tokens."""
    text = text_config(layers, model_type="lfm3", head_dim=16, sliding_window=24)
    vision = VISION | {"num_hidden_layers": 4, "num_key_value_heads": 1, "patch_size": 4}
    return random_model(
        "Lfm3Vl",
        seed,
        vision_config=vision,
        text_config=text,
        projector_hidden_size=64,
        tie_word_embeddings=False,
        **QWEN_IDS,
    )


def inputs(batch: Batch, words: list[int], pad: str = "left") -> dict[str, Tensor]:
    """Return what LFM3-VL's processor does: Qwen3-VL's inputs without ``mm_token_type_ids``."""
    made = qwen_inputs(timed=True)(batch, words, pad)
    return {name: value for name, value in made.items() if name != "mm_token_type_ids"}


TINY = Tiny(model, inputs, layers=6)
