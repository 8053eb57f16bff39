"""A tiny ERNIE 4.5 VL: a dense layer, then experts."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from vidsieve.testing.tiny_models import IMAGE, QWEN_VISION, VIDEO, mrope, random_model, text_config
from workbench.families import Batch, Tiny
from workbench.families._qwen import qwen_inputs

IDS = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "image_start_token_id": 116,
    "image_end_token_id": 117,
    "video_start_token_id": 118,
    "video_end_token_id": 119,
}


def model(seed: int = 0, layers: int = 3) -> Any:
    """Return a random ERNIE 4.5 VL, `layers` layers of width 64."""
    vision = {key: QWEN_VISION[key] for key in ("hidden_size", "intermediate_size", "num_heads", "patch_size")}
    experts = {"moe_num_experts": 4, "moe_k": 2, "moe_num_shared_experts": 1, "moe_intermediate_size": [32, 16]}
    return random_model(
        "Ernie4_5_VLMoe",
        seed,
        vision_config=vision | {"depth": 2},
        text_config=text_config(layers, **mrope([3, 3, 2]), **experts),
        tie_word_embeddings=False,
        **IDS,
    )


def inputs(batch: Batch, words: list[int], pad: str = "left") -> dict[str, Tensor]:
    """Return inputs as ERNIE's processor makes them: markers count as visual to the experts; two frames a token."""
    made = qwen_inputs(timed=False, patch=48, rows=2)(batch, words, pad)
    markers = (made["input_ids"] == 118) | (made["input_ids"] == 119)
    return made | {"moe_mm_token_type_ids": made["mm_token_type_ids"].masked_fill(markers, 2)}


TINY = Tiny(model, inputs)
