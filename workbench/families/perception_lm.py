"""A tiny Perception LM: frames of 6×6 patches in 3×3 tokens."""

from __future__ import annotations

from typing import Any

from vidsieve.testing.tiny_models import IMAGE, VIDEO, random_model, text_config
from workbench.families import Tiny
from workbench.families._stacked import CLIP, SIDE, stacked_inputs


def model(seed: int = 0, layers: int = 3) -> Any:
    """Return a random Perception LM, `layers` layers of width 64.

    Its vision tower is a CLIP, which gives what the family's own one gives: a class token, then the patches. That one
    is timm's, which is not among the packages that the tests install.
    """
    from transformers import CLIPVisionConfig

    return random_model(
        "PerceptionLM",
        seed,
        vision_config=CLIPVisionConfig(**CLIP, model_args={"embed_dim": CLIP["hidden_size"]}),
        text_config=text_config(layers, model_type="llama"),
        projector_pooling_ratio=2,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
    )


# An image is two tiles.
TINY = Tiny(model, stacked_inputs(9, 2 * 9, {"pixel_values": (2, 3, SIDE, SIDE)}))
