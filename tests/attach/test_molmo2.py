"""Molmo2: what it adds up, what it refuses, and calls that are none of ours."""

from __future__ import annotations

import pytest
import torch

import vidsieve
from vidsieve.adapters import adapter_for
from vidsieve.errors import NeedError, PromptError, UnsupportedCallError
from vidsieve.types import Need
from workbench.families.molmo2 import FRAME, FRAME_END, PATCH, inputs, model

pytestmark = pytest.mark.families("molmo2")
IMAGE, LOW, END = 133, 135, 134


def image_inputs():
    """Return a prompt with one image: a small view and a crop, 9 tokens each, of the same 25 patches."""
    ids = [5, LOW, *[PATCH] * 9, END, IMAGE, *[PATCH] * 9, END, 6, 7]
    pooling = inputs([[2]], [3])["video_token_pooling"]
    return {
        "input_ids": torch.tensor([ids]),
        "pixel_values": torch.randn(2, 25, 48, generator=torch.Generator().manual_seed(0)),
        "image_token_pooling": pooling,
        "image_grids": torch.tensor([[3, 3, 3, 3]]),
        "mm_token_type_ids": (torch.tensor([ids]) >= PATCH).long(),
    }


def test_a_method_that_reads_the_prompt_sees_what_the_llm_reads():
    tiny, batch, seen = model(), inputs([[2], [1]], [3, 6]), []
    adapter = adapter_for(tiny)
    hook = tiny.model.language_model.layers[0].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        tiny(**batch)
        encoded = adapter.encode(batch)
        for number in range(2):
            prompt = adapter.video_tokens(encoded, number, frozenset({Need.QUESTION})).prompt
            real = batch["attention_mask"][number].bool()
            assert torch.allclose(prompt.embeds, seen[0][number, real], atol=1e-6)
    hook.remove()


def test_methods_inside_the_llm_are_refused():
    with pytest.raises(NeedError, match="molmo2 adapter does not give"):
        vidsieve.attach(model(), vidsieve.load("fastv", retention=0.5))


def test_an_image_alone_passes_and_beside_a_video_is_refused():
    tiny, picture, video = model(), image_inputs(), inputs([[2]], [3])
    with torch.no_grad():
        wanted = tiny(**picture).logits
        with vidsieve.attach(tiny, vidsieve.load("random", retention=0.3)):
            assert torch.equal(tiny(**picture).logits, wanted)
            with pytest.raises(UnsupportedCallError, match="images and videos in one call"):
                tiny(**(picture | video))


def test_frames_between_the_markers_of_images_are_read():
    """As processors write them that use no markers of frames."""
    batch = inputs([[2]], [3])
    ids = batch["input_ids"].clone()
    ids[ids == FRAME], ids[ids == FRAME_END] = IMAGE, END
    plan = adapter_for(model()).prune(batch | {"input_ids": ids}, vidsieve.load("random", retention=0.3))
    kept = plan.inputs["input_ids"][0].tolist()
    assert (kept.count(IMAGE), kept.count(END), kept.count(PATCH)) == (2, 2, 5)


def test_missing_columns_are_named():
    batch = inputs([[2]], [3])
    del batch["mm_token_type_ids"]
    with pytest.raises(PromptError, match="mm_token_type_ids is missing"):
        adapter_for(model()).prune(batch, vidsieve.load("random", retention=0.3))
