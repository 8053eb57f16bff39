"""Prompts from the families' own processors: each video fits, and is told the grid that it has."""

from __future__ import annotations

import numpy as np
import pytest
import transformers

from vidsieve.adapters.pruning import adapter_for
from vidsieve.loading import load
from vidsieve.testing.calls import Case, prefill
from vidsieve.testing.equivalence import TOLERANCE
from vidsieve.testing.tiny_models import IMAGE, VIDEO, processor_for
from vidsieve.types import TokenGrid
from workbench.families import tiny

PATCHES = {"patch_size": 4, "merge_size": 2, "do_resize": False, "size": {"shortest_edge": 64, "longest_edge": 2**14}}
PAIRS = ("Qwen2VLVideoProcessor", PATCHES | {"temporal_patch_size": 2, "cap_pixels_per_frame": False})
SQUARE = {"size": {"height": 48, "width": 48}, "do_center_crop": False}
STILL = tuple(i for i in range(32) if i not in (16, 17, 20, 21) and i < 24)
"""Of four frames of 2×4 tokens: the third one's left half, and the whole fourth, do not change; one token stays."""
MADE = {
    "video_llama_3": ("VideoLlama3", ("VideoLlama3VideoProcessor", PATCHES), {}, TokenGrid(4, 2, 4, (*STILL, 24))),
    "exaone4_5": ("Exaone4_5_", PAIRS, {}, TokenGrid(2, 2, 4)),
    "hyperclovax_vision_v2": ("HyperCLOVAXVisionV2", PAIRS, {}, TokenGrid(2, 2, 4)),
    "llava_next_video": (
        "LlavaNextVideo",
        ("LlavaNextVideoVideoProcessor", SQUARE),
        {"patch_size": 8, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1},
        TokenGrid(4, 3, 3),
    ),
    "perception_lm": ("PerceptionLM", ("PerceptionLMVideoProcessor", SQUARE), {"patch_size": 8}, TokenGrid(4, 3, 3)),
    "video_llava": ("VideoLlava", ("VideoLlavaVideoProcessor", SQUARE), {"patch_size": 8}, TokenGrid(4, 1, 37)),
}
TEXT = "<|im_start|> user <|vision_start|><|video_pad|><|vision_end|> what colour <|im_end|> <|im_start|> assistant"


@pytest.mark.parametrize("family", MADE)
def test_a_prompt_of_the_familys_own_processor_is_pruned_right(family):
    name, (kind, settings), further, grid = MADE[family]
    tokenizer = processor_for("qwen2_5_vl").tokenizer
    tokenizer.video_token, tokenizer.video_token_id = "<|video_pad|>", VIDEO
    tokenizer.image_token, tokenizer.image_token_id = "<|image_pad|>", IMAGE
    processor = getattr(transformers, f"{name}Processor")(
        video_processor=getattr(transformers, kind)(**settings),
        image_processor=transformers.Qwen2VLImageProcessor(),
        tokenizer=tokenizer,
        **further,
    )
    frames = np.random.default_rng(0).integers(0, 255, (4, 16, 32, 3), dtype=np.uint8)
    frames[2, :, :16] = frames[1, :, :16]
    frames[3] = frames[2]
    inputs = dict(processor(text=[TEXT], videos=[frames], return_tensors="pt"))
    tiny_family = tiny(family)
    case = Case(adapter_for(tiny_family.model(0, tiny_family.layers)), inputs, load("random", retention=0.5))
    assert case.adapter.encode(inputs).videos[0].features.grid == grid
    assert prefill(case)[0] <= TOLERANCE
