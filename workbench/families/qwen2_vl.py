"""A tiny Qwen2-VL."""

from __future__ import annotations

from typing import Any

from vidsieve.testing.tiny_models import QWEN_IDS, QWEN_VISION, mrope, random_model, text_config
from workbench.families import Tiny
from workbench.families._qwen import qwen_inputs


def model(seed: int = 0, layers: int = 3) -> Any:
    """Return a random Qwen2-VL, `layers` layers of width 64 with M-RoPE sections (2, 3, 3)."""
    vision = {key: QWEN_VISION[key] for key in ("num_heads", "patch_size", "spatial_merge_size", "temporal_patch_size")}
    vision |= {"depth": 2, "embed_dim": 32, "hidden_size": 64, "mlp_ratio": 2}
    return random_model(
        "Qwen2VL", seed, vision_config=vision, text_config=text_config(layers, **mrope([2, 3, 3])), **QWEN_IDS
    )


TINY = Tiny(model, qwen_inputs(timed=False))
