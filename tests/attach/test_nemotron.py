"""Nemotron Omni: one placeholder for images and videos, audio beside a video, and its own pruning."""

from __future__ import annotations

import pytest
import torch

import vidsieve
from vidsieve.adapters import adapter_for
from vidsieve.errors import NeedError, UnsupportedCallError
from workbench.families.nemotron_h_omni import AUDIO, TINY

pytestmark = pytest.mark.families("nemotron_h_omni")
RANDOM = vidsieve.load("random", retention=0.3)
GREEDY = {"max_new_tokens": 4, "do_sample": False}


@pytest.fixture(scope="module")
def model():
    return TINY.model(0, TINY.layers)


@pytest.fixture
def inputs():
    return TINY.inputs([[3]], [5], "left")


def with_tokens(inputs, token, count):
    ids = inputs["input_ids"]
    ids = torch.cat([ids[:, :2], torch.full((1, count), token), ids[:, 2:]], 1)
    return inputs | {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def test_its_own_pruning_is_refused_by_name_and_may_be_switched_off(model, inputs):
    model.video_pruning_rate = 0.5
    try:
        for call in (lambda: vidsieve.attach(model, RANDOM), lambda: vidsieve.prune(model, inputs, RANDOM)):
            with pytest.raises(
                UnsupportedCallError, match=r"video_pruning_rate = 0.5.*random.*set model.video_pruning"
            ):
                call()
    finally:
        model.video_pruning_rate = 0.0
    with vidsieve.attach(model, RANDOM) as session:
        model.generate(**inputs, **GREEDY)
    assert session.trace.videos[0].kept == 7


def test_audio_beside_a_video_stays(model, inputs):
    """The stock LLM on the embeddings that stay, audio among them, made by hand."""
    inputs["input_features"] = torch.randn(1, 64, 16, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        sound = model.get_audio_features(inputs["input_features"]).pooler_output
        inputs = with_tokens(inputs, AUDIO, len(sound))
        with vidsieve.attach(model, RANDOM) as session:
            logits, kept = model(**inputs).logits, session.kept_positions[0]
            model.generate(**inputs, **GREEDY)
        ids = inputs["input_ids"]
        embeds = model.get_input_embeddings()(ids)
        embeds[ids == adapter_for(model).video_token_id] = model.get_video_features(
            inputs["pixel_values_videos"]
        ).pooler_output[0]
        embeds[ids == AUDIO] = sound
        wanted = model.language_model(inputs_embeds=embeds[:, kept]).logits
    assert (ids[0, kept] == AUDIO).sum() == len(sound) and len(kept) < ids.shape[1]
    torch.testing.assert_close(logits, wanted, atol=1e-4, rtol=0)


def test_images_run_as_they_are_alone_and_are_refused_beside_a_video(model, inputs):
    image = {"pixel_values": torch.randn(16, 48), "image_grid_hw": torch.tensor([[4, 4]])}
    token = model.config.image_token_id
    alone = with_tokens({"input_ids": torch.randint(10, 100, (1, 12))}, token, 4) | image
    plain = model.generate(**alone, **GREEDY, return_dict_in_generate=True)
    with vidsieve.attach(model, RANDOM) as session:
        assert torch.equal(model.generate(**alone, **GREEDY), plain.sequences) and not len(session.trace)
        with pytest.raises(UnsupportedCallError, match="images and videos in one call are not supported for nemotron"):
            model.generate(**with_tokens(inputs, token, 4), **image, **GREEDY)


def test_features_that_are_ready_tell_their_grid_or_are_refused(model, inputs):
    adapter = adapter_for(model)
    bare = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        (video,) = adapter.features(inputs)
        ready = bare | {"mm_encoder_outputs": adapter.ready_features(video)}
        first, second = (vidsieve.prune(model, some, RANDOM) for some in (inputs, ready))
        assert torch.equal(model(**first).logits, model(**second).logits)
        stock = bare | {"mm_encoder_outputs": {"video": model.get_video_features(inputs["pixel_values_videos"])}}
        with pytest.raises(UnsupportedCallError, match="send pixel_values_videos"):
            vidsieve.prune(model, stock, RANDOM)


def test_methods_that_read_the_vision_encoder_are_refused(model):
    with pytest.raises(NeedError, match=r"visionzip needs .*nemotron_h_omni"):
        vidsieve.attach(model, vidsieve.load("visionzip", retention=0.5))
