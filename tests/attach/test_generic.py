"""A class that no family is registered for: tried by its signatures, and proven on the first prompt."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

import vidsieve
from vidsieve import registry
from vidsieve.adapters import adapter_for
from vidsieve.errors import StageError, UnsupportedCallError, UnsupportedModelError
from vidsieve.loading import load
from vidsieve.testing.calls import Case, beams, greedy, labels, prefill, second_turn
from vidsieve.testing.equivalence import TOLERANCE, check_family
from vidsieve.testing.tiny_models import (
    IMAGE,
    QWEN_IDS,
    QWEN_VISION,
    VIDEO,
    VISION,
    inputs_for,
    llava_onevision,
    random_model,
    rows_to_batch,
    text_config,
)
from vidsieve.types import TokenGrid
from workbench.families import tiny
from workbench.families._qwen import qwen_inputs

UNKNOWN = pytest.mark.filterwarnings("ignore:.* is of no family that vidsieve knows")


def forget(monkeypatch, model):
    """Let no family be registered for a model."""
    monkeypatch.delitem(registry.families._table, type(model).__name__)
    return model


@pytest.fixture
def unknown(monkeypatch):
    """A tiny Qwen2-VL that no family is registered for, and its inputs."""
    kind = tiny("qwen2_vl")
    return forget(monkeypatch, kind.model(0, 2)), kind.inputs([[3]], [5], "left")


def uniform():
    return load("uniform", retention=0.25)


@UNKNOWN
@pytest.mark.parametrize("family", ["qwen2_vl", "qwen3_vl_moe", "qwen3_5"])
def test_every_call_of_an_unknown_family_equals_its_reference(monkeypatch, family):
    kind = tiny(family)
    model = forget(monkeypatch, kind.model(0, kind.layers))
    check_family(model, kind.inputs([[3]], [5], "left"))
    check_family(model, kind.inputs([[3, 2], [2]], [3, 9], "left"))


def hyperclovax():
    """A tiny model with a grid, counted positions, and features in a list."""
    vision = QWEN_VISION | {"model_type": "qwen2_5_vl_vision", "depth": 2, "window_size": 16}
    model = random_model(
        "HyperCLOVAXVisionV2",
        0,
        vision_config=vision | {"fullatt_block_indexes": [1]},
        text_config=text_config(2, model_type="hyperclovax"),
        tie_word_embeddings=False,
        **{name: QWEN_IDS[name] for name in ("video_token_id", "image_token_id")},
    )
    return model, qwen_inputs(timed=False)


def video_llava():
    """A tiny model with stacked frames of 3×3 patches and a class token, and features in a tensor."""
    model = random_model(
        "VideoLlava",
        0,
        vision_config=VISION | {"model_type": "clip_vision_model", "image_size": 24, "patch_size": 8},
        text_config=text_config(2, model_type="llama"),
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        vision_feature_select_strategy="full",
    )

    def inputs(batch, words, pad):
        draw = torch.Generator().manual_seed(1)
        found = rows_to_batch([[[VIDEO] * 20 for _ in videos] for videos in batch], words, pad, draw)
        found["pixel_values_videos"] = torch.randn(sum(map(len, batch)), 2, 3, 24, 24, generator=draw)
        return found

    return model, inputs


@UNKNOWN
def test_a_family_with_stacked_frames_equals_its_reference(monkeypatch):
    model, inputs = video_llava()
    forget(monkeypatch, model)
    check_family(model, inputs([[2]], [5], "left"))
    check_family(model, inputs([[2, 2], [2]], [3, 9], "left"))


@UNKNOWN
def test_a_family_whose_generate_drops_positions_is_exact_with_compact_ones_alone(monkeypatch):
    model, make = hyperclovax()
    forget(monkeypatch, model)
    for inputs in (make([[2]], [5], "left"), make([[3, 2], [2]], [3, 9], "left")):
        del inputs["mm_token_type_ids"]
        unproven(model, inputs, "does not hand position_ids on to its LLM: use positions='compact'")
        case = Case(adapter_for(model, positions="compact"), inputs, load("random", retention=0.3))
        for call in (prefill, greedy, beams, second_turn, labels):
            gap, equal = call(case)
            assert gap <= TOLERANCE, call
            assert equal is not False, call


@UNKNOWN
def test_frames_are_told_by_runs_of_placeholders_or_by_the_grid(unknown, monkeypatch):
    def grid(model, inputs, positions="installed"):
        return adapter_for(model, positions=positions).encode(inputs).videos[0].features.grid

    assert grid(*unknown) == TokenGrid(3, 2, 4)
    model, make = video_llava()
    forget(monkeypatch, model)
    assert grid(model, make([[2]], [5], "left")) == TokenGrid(2, 1, 10)
    # Four frames that the encoder merges in pairs, with a time before each pair.
    model, make = hyperclovax()
    forget(monkeypatch, model)
    encode = model.model.get_video_features

    def merged(pixel_values_videos, video_grid_thw, **options):
        ready = encode(pixel_values_videos, video_grid_thw, **options)
        ready.pooler_output = [part.unflatten(0, (-1, 2, 8)).mean(1).flatten(0, 1) for part in ready.pooler_output]
        return ready

    monkeypatch.setattr(model.model, "get_video_features", merged)
    video, timed = make([[4]], [5], "left"), qwen_inputs(timed=True)([[2]], [5], "left")
    inputs = {name: timed[name] for name in ("input_ids", "attention_mask")}
    inputs |= {name: video[name] for name in ("pixel_values_videos", "video_grid_thw")}
    assert grid(model, inputs, "compact") == TokenGrid(2, 2, 4)


def test_a_warning_names_the_class_and_the_cost(unknown):
    model, inputs = unknown
    with pytest.warns(UserWarning, match=r"Qwen2VLForCond.* is of no family .* costs about three more"):
        session = vidsieve.attach(model, uniform())
    with session:
        model.generate(**inputs, max_new_tokens=2, do_sample=False)
    assert session.trace.videos[0].kept == 6


@UNKNOWN
def test_a_session_proves_the_first_prompt_alone(unknown):
    model, inputs = unknown
    ran = []
    hook = model.model.language_model.register_forward_hook(lambda *_: ran.append(1))
    model.train()
    with vidsieve.attach(model, uniform()), torch.no_grad():
        for wanted in (5, 1):  # alone, through the adapter, two tokens decoded, and the call itself
            ran.clear()
            model(**inputs)
            assert len(ran) == wanted
    hook.remove()
    assert all(module.training for module in model.modules())


@UNKNOWN
@pytest.mark.parametrize("pad", ["left", "right"])
def test_half_precision_and_padding_prove_alike(unknown, pad):
    model, _ = unknown
    model.to(torch.bfloat16)
    with vidsieve.attach(model, uniform()) as session, torch.no_grad():
        model(**tiny("qwen2_vl").inputs([[3], [2]], [3, 9], pad))
    assert len(session.trace.videos) == 2


# -- a class that lacks something -----------------------------------------------------------------------------------


def refused(model, match):
    with pytest.raises(UnsupportedModelError, match=match):
        vidsieve.attach(model, uniform())


def test_something_else_lacks_everything():
    wanted = (
        "no adapter for Linear, and it lacks what families have in common: forward takes no mm_encoder_outputs; "
        "forward takes no pixel_values_videos; its model has no get_video_features; its model has no "
        "language_model.layers; its configuration states no video_token_id. `vidsieve list` shows the families."
    )
    refused(torch.nn.Linear(2, 2), wanted)
    with pytest.raises(UnsupportedCallError, match="a model is needed first, not the method uniform"):
        vidsieve.attach(uniform(), torch.nn.Linear(2, 2))


def test_each_part_of_the_contract_is_missed_by_name(unknown, monkeypatch):
    model, _ = unknown
    kind, inner = type(model), type(model.model)

    with monkeypatch.context() as patch:
        patch.setattr(kind, "forward", lambda self, video_grid_thw=None, mm_encoder_outputs=None: 0)
        refused(model, "in common: forward takes no pixel_values_videos. `vidsieve list`")
    with monkeypatch.context() as patch:
        patch.setattr(kind, "forward", lambda self, video_grid_thw=None, pixel_values_videos=None: 0)
        refused(model, "in common: forward takes no mm_encoder_outputs. `vidsieve list`")
    with monkeypatch.context() as patch:
        patch.delattr(inner, "get_video_features")
        refused(model, "in common: its model has no get_video_features. `vidsieve list`")
    with monkeypatch.context() as patch:
        patch.setattr(inner, "get_video_features", lambda self, pixel_values_videos, sizes: 0)
        refused(model, "in common: get_video_features takes sizes, which forward does not. `vidsieve list`")
    with monkeypatch.context() as patch:
        patch.setattr(inner, "get_rope_index", lambda self, input_ids, mm_token_type_ids, times, video_grid_thw: 0)
        refused(model, "in common: get_rope_index takes times, which forward does not. `vidsieve list`")
    with monkeypatch.context() as patch:
        patch.setattr(inner, "get_rope_index", lambda self, input_ids, video_grid_thw: 0)
        refused(model, "in common: get_rope_index takes no mm_token_type_ids. `vidsieve list`")
    with monkeypatch.context() as patch:
        patch.setitem(model.model._modules, "language_model", torch.nn.Identity())
        refused(model, r"in common: its model has no language_model\.layers. `vidsieve list`")
    with monkeypatch.context() as patch:
        patch.setattr(model, "config", SimpleNamespace())
        refused(model, "in common: its configuration states no video_token_id. `vidsieve list`")


# -- a class that fits, and behaves otherwise -----------------------------------------------------------------------


def unproven(model, inputs, match):
    with (
        vidsieve.attach(model, uniform()),
        pytest.raises(UnsupportedModelError, match=f"no adapter for .*{match}.*To add a family"),
    ):
        model.generate(**inputs, max_new_tokens=2)


@UNKNOWN
def test_other_positions_are_found(unknown, monkeypatch):
    model, inputs = unknown
    made = model.model.compute_3d_position_ids
    monkeypatch.setattr(model.model, "compute_3d_position_ids", lambda **given: 2 * made(**given), raising=True)
    unproven(model, inputs, "given other position_ids")


@UNKNOWN
def test_features_that_are_changed_on_their_way_are_found(unknown, monkeypatch):
    model, inputs = unknown
    inner, forward = model.model, model.model.forward

    def scaled(pixel_values_videos=None, video_grid_thw=None, mm_encoder_outputs=None, **given):
        if pixel_values_videos is not None:
            mm_encoder_outputs = {"video": inner.get_video_features(pixel_values_videos, video_grid_thw)}
            mm_encoder_outputs["video"].pooler_output = [2 * part for part in mm_encoder_outputs["video"].pooler_output]
        return forward(video_grid_thw=video_grid_thw, mm_encoder_outputs=mm_encoder_outputs, **given)

    monkeypatch.setattr(inner, "forward", scaled)
    unproven(model, inputs, "given other inputs_embeds")


@UNKNOWN
def test_lost_deep_features_are_found(monkeypatch):
    kind = tiny("qwen3_vl_moe")
    model = forget(monkeypatch, kind.model(0, 2))
    monkeypatch.setattr("vidsieve.adapters.families.generic.deep_features", lambda ready: [])
    found = model.model.forward

    def forgiving(mm_encoder_outputs=None, **given):
        if mm_encoder_outputs is not None and not hasattr(mm_encoder_outputs["video"], "deepstack_features"):
            blank = [0 * part for part in mm_encoder_outputs["video"].pooler_output]
            mm_encoder_outputs["video"].deepstack_features = [blank, blank]
        return found(mm_encoder_outputs=mm_encoder_outputs, **given)

    monkeypatch.setattr(model.model, "forward", forgiving)
    unproven(model, kind.inputs([[3]], [5], "left"), "given other deepstack_visual_embeds")


@UNKNOWN
def test_what_happens_outside_the_llm_is_found(unknown, monkeypatch):
    model, inputs = unknown
    forward = model.model.forward

    def louder(pixel_values_videos=None, **given):
        out = forward(pixel_values_videos=pixel_values_videos, **given)
        out.last_hidden_state = out.last_hidden_state * (1 if pixel_values_videos is None else 2)
        return out

    monkeypatch.setattr(model.model, "forward", louder)
    unproven(model, inputs, "its LLM is given the same")


@UNKNOWN
def test_what_a_model_raises_behind_the_adapter_is_told(unknown, monkeypatch):
    model, inputs = unknown
    forward = model.model.forward

    def breaking(mm_encoder_outputs=None, **given):
        if mm_encoder_outputs is not None:
            raise RuntimeError("no such key")
        return forward(**given)

    monkeypatch.setattr(model.model, "forward", breaking)
    unproven(model, inputs, "RuntimeError: no such key")


@UNKNOWN
def test_tokens_outside_the_frames_are_told(monkeypatch):
    model = forget(monkeypatch, llava_onevision())
    unproven(model, inputs_for("llava_onevision", [[TokenGrid(3, 4, 4)]]), "49 tokens of a video are no 3 frames")


@UNKNOWN
def test_what_the_model_alone_refuses_is_the_callers(unknown):
    model, inputs = unknown
    inputs["input_ids"] = inputs["input_ids"][:, :-12]
    inputs["attention_mask"] = inputs["attention_mask"][:, :-12]
    with vidsieve.attach(model, uniform()), pytest.raises(ValueError, match="do not match"):
        model(**inputs)


# -- what is refused ------------------------------------------------------------------------------------------------


@UNKNOWN
def test_what_is_not_known_of_a_class_is_refused(unknown):
    model, inputs = unknown
    with pytest.raises(StageError, match=r"fastv acts .* before the LLM alone"):
        vidsieve.attach(model, load("fastv", retention=0.5))
    with pytest.raises(UnsupportedCallError, match="legacy positions of qwen2_vl are not known"):
        vidsieve.attach(model, uniform(), positions="legacy")
    with pytest.raises(UnsupportedCallError, match="has one layout only"):
        vidsieve.attach(model, uniform(), layout="grid")
    with pytest.raises(UnsupportedCallError, match=r"sounds in a call \(input_features\)"):
        vidsieve.prune(model, inputs | {"input_features": torch.zeros(1)}, uniform())
    with pytest.raises(UnsupportedCallError, match="images and videos in one call"):
        image = inputs["input_ids"].clone()
        image[0, -8:-4] = IMAGE
        vidsieve.prune(model, inputs | {"input_ids": image}, uniform())
