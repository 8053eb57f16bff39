"""Thinkers of Qwen's Omni models: the video shrinks, its sound stays, and so do the times of both."""

from __future__ import annotations

from importlib import import_module

import pytest
import torch
import transformers

import vidsieve
from vidsieve.adapters import adapter_for
from vidsieve.adapters.transformers_api import cache_kwargs, output_cache
from vidsieve.errors import PromptError, UnsupportedCallError, UnsupportedModelError
from vidsieve.loading import load, load_model
from vidsieve.testing.equivalence import check_family
from vidsieve.testing.tiny_models import IMAGE, processor_for
from vidsieve.types import Selection
from workbench.families._omni import AUDIO

pytestmark = pytest.mark.families("qwen2_5_omni", "qwen3_omni_moe")
OMNI = ("qwen2_5_omni", "qwen3_omni_moe")


def sounding(family):
    """Return a tiny model, and the function that makes inputs whose videos have sound."""
    kind = import_module(f"workbench.families.{family}").SOUNDING
    return kind.model(0, kind.layers), kind.inputs


@pytest.mark.parametrize("family", OMNI)
def test_every_call_on_videos_with_sound_equals_the_masked_reference(family):
    model, inputs = sounding(family)
    check_family(model, inputs([[3]], [5], "left"))
    check_family(model, inputs([[3], [2]], [3, 9], "left"))


@pytest.mark.parametrize("family", OMNI)
def test_sounds_stay_where_and_when_they_are(family):
    model, make = sounding(family)
    inputs = make([[3], [2]], [3, 9], "left")
    stock, _ = model.get_rope_index(
        inputs["input_ids"],
        video_grid_thw=inputs["video_grid_thw"],
        attention_mask=inputs["attention_mask"],
        use_audio_in_video=True,
        audio_seqlens=inputs["feature_attention_mask"].sum(-1),
        second_per_grids=inputs["video_second_per_grid"],
    )
    plan = adapter_for(model).prune(inputs, load("uniform", retention=0.25))
    for row in range(2):
        before = (inputs["input_ids"][row] == AUDIO).nonzero().flatten()
        after = (plan.inputs["input_ids"][row] == AUDIO).nonzero().flatten()
        assert torch.equal(plan.kept_positions[row, after], before)
        assert torch.equal(plan.inputs["position_ids"][1:, row, after], stock[:, row, before])
        assert plan.kept_positions.shape[1] < inputs["input_ids"].shape[1]


@pytest.mark.parametrize("family", OMNI)
def test_an_image_beside_a_video_with_sound_is_kept(family):
    model, make = sounding(family)
    inputs = make([[2]], [5], "left")
    ids, image = inputs["input_ids"], torch.tensor([[118, *[IMAGE] * 8, 119]])
    inputs["input_ids"] = torch.cat([ids[:, :-6], image, ids[:, -6:]], 1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    inputs |= {"pixel_values": torch.randn(32, 96), "image_grid_thw": torch.tensor([[1, 4, 8]])}
    check_family(model, inputs)


@pytest.mark.parametrize("family", OMNI)
def test_methods_read_the_prompt_with_its_sounds(family):
    model, make = sounding(family)
    inputs, seen = make([[3]], [5], "left"), {}
    hook = model.model.language_model.register_forward_pre_hook(lambda m, a, kwargs: seen.update(kwargs), with_kwargs=1)
    with torch.no_grad():
        model(**inputs)
        hook.remove()
        adapter = adapter_for(model)
        prompt = adapter.prompt(adapter.encode(inputs), 0)
    assert torch.allclose(prompt.embeds, seen["inputs_embeds"][0], atol=1e-6)


@pytest.mark.parametrize("family", OMNI)
def test_repeated_prompts_keep_their_own_sounds(family):
    model, make = sounding(family)
    inputs = make([[3], [2]], [5, 5], "left")
    adapter = adapter_for(model)
    with torch.no_grad():
        encoded = adapter.encode(inputs)
        kept = [Selection(torch.arange(0, 24, 2)), Selection(torch.arange(0, 16, 3))]
        both = model(**adapter.build(encoded, [[kept[0]], [kept[1]]]).inputs).logits
        swapped = model(**adapter.build(encoded, [[kept[1]], [kept[0]], [kept[1]]], rows=[1, 0, 1]).inputs).logits
    assert torch.allclose(swapped[:, -5:], both[[1, 0, 1], -5:], atol=1e-5)


def test_several_sounds_in_a_prompt_run_greedily_and_are_refused_for_beams():
    model, make = sounding("qwen2_5_omni")
    inputs = make([[2, 3]], [5], "left")
    with vidsieve.attach(model, load("uniform", retention=0.25)):
        model.generate(**inputs, max_new_tokens=2, do_sample=False)
        with pytest.raises(UnsupportedCallError, match="mix up the sounds"):
            model.generate(**inputs, max_new_tokens=2, num_beams=2)


def test_a_later_turn_with_a_sound_is_refused():
    model, make = sounding("qwen2_5_omni")
    inputs = make([[2]], [5], "left")
    with vidsieve.attach(model, load("uniform", retention=0.25)):
        cache = output_cache(model(**inputs))
        sound = torch.tensor([[AUDIO, 30]])
        with pytest.raises(UnsupportedCallError, match="brings a sound"):
            model(input_ids=sound, **cache_kwargs(model, cache))


def test_seconds_must_come_with_the_video():
    model, make = sounding("qwen2_5_omni")
    inputs = make([[2]], [5], "left")
    del inputs["video_second_per_grid"]
    with pytest.raises(PromptError, match="video_second_per_grid is missing"):
        vidsieve.prune(model, inputs, load("uniform", retention=0.25))


@pytest.fixture
def whole():
    """A whole model, with a talker that is switched off."""
    thinker, _ = sounding("qwen3_omni_moe")
    config = transformers.Qwen3OmniMoeConfig(thinker_config=thinker.config.to_dict(), enable_audio_output=False)
    return transformers.Qwen3OmniMoeForConditionalGeneration(config).eval()


def test_of_a_whole_checkpoint_the_thinker_is_loaded(whole, tmp_path):
    whole.save_pretrained(tmp_path)
    processor_for("qwen3_vl").save_pretrained(tmp_path)
    loaded, _ = load_model(str(tmp_path))
    assert type(loaded) is type(whole.thinker)
    theirs = whole.thinker.state_dict()
    assert all(torch.equal(value, theirs[name]) for name, value in loaded.state_dict().items())


def test_a_whole_model_is_pruned_through_its_thinker(whole):
    _, make = sounding("qwen3_omni_moe")
    inputs, method = make([[2]], [5], "left"), load("uniform", retention=0.25)
    with pytest.raises(UnsupportedModelError, match=r"pass model\.thinker"):
        vidsieve.attach(whole, method)
    with vidsieve.attach(whole.thinker, method) as session:
        whole.generate(**inputs, return_audio=False, thinker_max_new_tokens=2)
    assert session.trace.videos[0].kept == 4
