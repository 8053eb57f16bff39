"""GLM: frames have the placeholder of images."""

from __future__ import annotations

import pytest
import torch

import vidsieve
from vidsieve.errors import UnsupportedCallError
from workbench.families import tiny


def test_a_call_with_a_video_and_an_image_is_refused():
    kind = tiny("glm4v")
    inputs = kind.inputs([[3]], [5], "left")
    image = {"pixel_values": torch.zeros(4, 96), "image_grid_thw": torch.tensor([[1, 2, 2]])}
    with (
        vidsieve.attach(model := kind.model(0, 3), vidsieve.load("random", retention=0.5)),
        pytest.raises(UnsupportedCallError, match="images and videos in one call"),
    ):
        model.generate(**inputs, **image, max_new_tokens=2)


def test_a_call_with_an_image_alone_is_the_models_own():
    kind = tiny("glm4v")
    inputs, model = kind.inputs([[1]], [5], "left"), kind.model(0, 3)
    inputs["pixel_values"] = inputs.pop("pixel_values_videos")
    inputs["image_grid_thw"] = inputs.pop("video_grid_thw")
    inputs["mm_token_type_ids"] = inputs["mm_token_type_ids"] // 2
    wanted = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    with vidsieve.attach(model, vidsieve.load("random", retention=0.5)):
        assert torch.equal(model.generate(**inputs, max_new_tokens=4, do_sample=False), wanted)
