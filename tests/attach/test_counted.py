"""Families that count positions: images beside videos, signals of the encoder, ready features."""

from __future__ import annotations

import pytest
import torch
from transformers.modeling_outputs import BaseModelOutputWithPooling

from vidsieve.adapters.pruning import adapter_for
from vidsieve.adapters.session import attach
from vidsieve.errors import NeedError, PromptError, UnsupportedCallError
from vidsieve.loading import load
from vidsieve.testing.calls import CALLS, Case
from vidsieve.testing.equivalence import TOLERANCE, check_family
from vidsieve.types import ENCODER_NEEDS
from workbench.families import tiny

STACKED = ["llava_next_video", "perception_lm", "video_llava"]
GRIDS = ["exaone4_5", "hyperclovax_vision_v2"]
IMAGES = ["llava_next_video", "perception_lm", *GRIDS, "video_llama_3"]
SIGNALS = ["llava_next_video", *GRIDS]


@pytest.fixture
def made(request):
    kind = tiny(request.param)
    return adapter_for(kind.model(0, kind.layers)), kind


@pytest.mark.parametrize("made", IMAGES, indirect=True)
def test_images_beside_videos_stay_whole(made):
    adapter, kind = made
    inputs = kind.inputs([[2], [3]], [3, 9], "left", True)
    check_family(adapter.model, inputs)
    encoded = adapter.encode(inputs)
    plan = adapter.plan(encoded, load("random", retention=0.3))
    assert len(encoded.images) == 2
    for row, image in enumerate(encoded.images):
        assert torch.isin(image.columns, plan.kept_positions[row]).all()


@pytest.mark.parametrize("made", [*STACKED, "video_llama_3", "hyperclovax_vision_v2"], indirect=True)
@pytest.mark.parametrize("call", ["prefill logits", "8 greedy tokens", "second turn"])
def test_a_method_inside_the_llm_equals_the_reference(made, call):
    adapter, kind = made
    method = load("fastv", retention=0.6, layer=1)
    difference, equal = CALLS[call](Case(adapter, kind.inputs([[3, 2], [2]], [3, 9], "left"), method))
    assert difference <= TOLERANCE and equal is not False


def test_images_beside_a_video_are_refused_by_name_where_they_are_not_supported():
    kind = tiny("video_llava")
    with pytest.raises(UnsupportedCallError, match="not supported for video_llava"):
        adapter_for(kind.model(0, 3)).encode(kind.inputs([[2]], [3], "left", True))


@pytest.mark.parametrize("made", SIGNALS, indirect=True)
@pytest.mark.parametrize("call", ["prefill logits", "8 greedy tokens"])
def test_visionzip_equals_the_reference(made, call):
    adapter, kind = made
    method = load("visionzip", retention=0.5, contextual=0.4)
    difference, equal = CALLS[call](Case(adapter, kind.inputs([[3, 2], [2]], [3, 9], "left"), method))
    assert difference <= TOLERANCE and equal is not False


@torch.no_grad()
def test_signals_of_llava_next_video_are_those_of_the_layer_that_is_projected():
    kind = tiny("llava_next_video")
    model, inputs = kind.model(0, kind.layers), kind.inputs([[2]], [3], "left")
    found = adapter_for(model).encode(inputs, needs=ENCODER_NEEDS).videos[0].features.encoder
    pixels = inputs["pixel_values_videos"][0]
    tower = model.model.vision_tower
    tower.set_attn_implementation("eager")
    weights = tower(pixels, output_attentions=True).attentions[-2]  # the second of three layers: output −2 is its own
    patches = weights[:, :, 0, 1:].mean(1).unflatten(-1, (6, 6))
    wanted = torch.nn.functional.avg_pool2d(patches[:, None], 2).flatten()
    assert torch.allclose(found.attention, wanted, atol=1e-6)


@pytest.mark.parametrize("made", GRIDS, indirect=True)
def test_generate_and_a_plain_forward_count_what_is_kept(made):
    adapter, kind = made
    inputs, method = kind.inputs([[3]], [3], "left"), load("random", retention=0.3)
    with torch.no_grad(), attach(adapter.model, method) as session:
        logits = adapter.model(**inputs).logits[:, -1]
        out = adapter.model.generate(**inputs, max_new_tokens=1, output_logits=True, return_dict_in_generate=True)
    assert torch.allclose(out.logits[0], logits, atol=TOLERANCE)
    assert session.trace.positions == "compact"


def test_a_policy_cannot_start_from_a_layer_of_another_build():
    kind = tiny("exaone4_5")
    adapter = adapter_for(kind.model(0, kind.layers))
    with pytest.raises(NeedError, match="a Exaone4DecoderLayer: it has no norm before its attention"):
        adapter.layer_state(adapter.first_full_layer)


@torch.no_grad()
@pytest.mark.parametrize("made", STACKED, indirect=True)
def test_ready_features_say_which_frames_are_one_video(made):
    adapter, kind = made
    inputs = kind.inputs([[3, 3]], [3], "left")
    first = adapter.encode(inputs)
    rest = {name: value for name, value in inputs.items() if name != "pixel_values_videos"}
    frames = torch.stack([v.features.embeds.unflatten(0, (3, -1)) for v in first.videos])
    ready = {"video": BaseModelOutputWithPooling(pooler_output=frames)}
    again = adapter.encode(rest | {"mm_encoder_outputs": ready})
    for span, other in zip(first.videos, again.videos, strict=True):
        assert torch.equal(span.features.embeds, other.features.embeds) and span.features.grid == other.features.grid
    flat = {"video": BaseModelOutputWithPooling(pooler_output=frames.flatten(0, 1))}
    with pytest.raises(PromptError, match="do not say which frames are one video"):
        adapter.encode(rest | {"mm_encoder_outputs": flat})


@torch.no_grad()
@pytest.mark.parametrize("made", STACKED, indirect=True)
def test_a_video_encoded_before_gives_the_same_logits(made):
    adapter, kind = made
    inputs = kind.inputs([[3]], [3], "left")
    rest = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    ready = adapter.ready_features(adapter.encode(inputs).videos[0].features)
    found = adapter.model(**rest, mm_encoder_outputs=ready).logits
    assert torch.allclose(found, adapter.model(**inputs).logits, atol=TOLERANCE)
