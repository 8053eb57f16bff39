"""Reuse: frames that repeat the last encoded one are not encoded, and nothing else changes."""

from __future__ import annotations

import pytest
import torch

import vidsieve
from vidsieve.adapters import adapter_for
from vidsieve.compressors.composed import AllTokens
from vidsieve.errors import BudgetError, PolicyError, StageError, UnknownNameError, UnsupportedCallError
from vidsieve.evaluation.conditions import Condition, known_fields, method_for
from vidsieve.registry import check_known
from vidsieve.testing.tiny_models import FAMILIES, default_grid, inputs_for
from workbench.families import tiny

BATCHES = {"batch 1": [[5]], "ragged batch 2": [[4, 4], [4]]}
ENCODED = {"batch 1": [3], "ragged batch 2": [2, 2, 2]}
"""Frames that are encoded where every second one repeats the one before."""


def repeated(family, batch, near=0.0):
    """Return a tiny model, and inputs in which every second frame is the one before, with a cell moved by `near`."""
    if family in FAMILIES:
        model, grids = FAMILIES[family](), [[default_grid(family, n) for n in videos] for videos in batch]
        inputs = inputs_for(family, grids, words=[3, 9][: len(batch)])
    else:
        model, inputs = tiny(family).model(0, 3), tiny(family).inputs(batch, [3, 9][: len(batch)], "left")
    pixels = inputs["pixel_values_videos"].clone()
    grids = inputs.get("video_grid_thw")
    videos = pixels if grids is None else torch.split(pixels, grids.prod(1).tolist())
    for number, video in enumerate(videos):
        frames = video if grids is None else video.view(int(grids[number][0]), -1, video.shape[-1])
        frames[1::2] = frames[: len(frames) // 2 * 2 : 2]
        # A patch of LLaVA's frames, the four patches of a token of Qwen's.
        (frames[1::2, :, :8, :8] if grids is None else frames[1::2, :4]).add_(near)
    return model, inputs | {"pixel_values_videos": pixels}


def tower(model):
    """Return the blocks of the vision tower."""
    return adapter_for(model).encoder_blocks({})


def rows(model, work):
    """Return how many rows of patches (LLaVA: of frames) each of the tower's blocks sees in `work`."""
    seen = [0] * len(tower(model))

    def count(number):
        def hook(module, args, kwargs):
            seen[number] += len(args[0] if args else kwargs["hidden_states"])

        return hook

    hooks = [b.register_forward_pre_hook(count(n), with_kwargs=True) for n, b in enumerate(tower(model))]
    with torch.no_grad():
        work()
    for hook in hooks:
        hook.remove()
    return seen


FOUR = ("llava_onevision", "qwen2_vl", "qwen2_5_vl", "qwen3_vl")
METHODS = {
    "reuse": {"retention": 1.0},
    "divprune": {"retention": 0.4},
    "visionzip": {"retention": 0.4, "contextual": 0.4},
    "fastv": {"retention": 0.8, "layer": 2},
    "dycoke": {"retention": 0.6, "layer": 1},
}


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("family", FOUR)
def test_a_run_is_the_one_without_it_to_the_bit_and_the_tower_sees_fewer_rows(family, batch, name):
    model, inputs = repeated(family, BATCHES[batch])
    method = AllTokens() if name == "reuse" else vidsieve.load(name, **METHODS[name])
    reusing = vidsieve.Pipeline(vidsieve.Reuse(0.0), method, method.retention)
    adapter, outputs = adapter_for(model), []

    def run(compressor):
        encoded = adapter.encode(inputs, None, compressor.needs, compressor.front)
        plan = adapter.plan(encoded, compressor, torch.Generator().manual_seed(0))
        with plan.acting():
            outputs.append((plan, model(**plan.inputs).logits))

    whole, fewer = rows(model, lambda: run(method)), rows(model, lambda: run(reusing))
    (plan, wanted), (other, got) = outputs
    frames = sum(sum(videos) for videos in BATCHES[batch])
    assert fewer == [count * sum(ENCODED[batch]) // frames for count in whole] and all(fewer)
    assert torch.equal(plan.kept_positions, other.kept_positions)
    for modality, ready in plan.inputs["mm_encoder_outputs"].items():
        again = other.inputs["mm_encoder_outputs"][modality]
        parts = [(ready.pooler_output, again.pooler_output)]
        parts += zip(getattr(ready, "deepstack_features", []), getattr(again, "deepstack_features", []), strict=True)
        for one, two in parts:
            assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    assert torch.equal(wanted, got)
    if name != "reuse":  # nothing selects without it, so that there is no trace
        assert [trace.encoded for trace in other.traces] == ENCODED[batch]


@pytest.mark.parametrize("family", FOUR)
def test_frames_that_all_differ_are_all_encoded(family):
    model, inputs = repeated(family, [[4]], near=1e-6)
    with torch.no_grad():
        encoded = adapter_for(model).encode(inputs, front=vidsieve.Reuse(0.0))
    assert encoded.videos[0].features.encoded == 4


@pytest.mark.parametrize("family", FOUR)
@pytest.mark.parametrize(("tolerance", "count"), [(0.009, 4), (0.011, 2)])
def test_the_tolerance_is_in_units_of_the_pixels_of_one_cell(family, tolerance, count):
    """Every second frame has one cell that is brighter by 0.01 all over; the mean over a frame would be far less."""
    model, inputs = repeated(family, [[4]], near=0.01)
    with torch.no_grad():
        encoded = adapter_for(model).encode(inputs, front=vidsieve.Reuse(tolerance))
    assert encoded.videos[0].features.encoded == count


def test_frames_are_compared_with_the_last_encoded_one_and_do_not_drift():
    frames = torch.arange(7.0)[:, None, None].expand(7, 2, 3)
    assert vidsieve.Reuse(2.0).sources(frames).tolist() == [0, 0, 0, 3, 3, 3, 6]
    assert vidsieve.Reuse(2.0).sources(frames.bfloat16()).tolist() == [0, 0, 0, 3, 3, 3, 6]
    assert vidsieve.Reuse().sources(frames[:1]).tolist() == [0]
    back = torch.tensor([0.0, 1.0, 0.0])[:, None, None]
    assert vidsieve.Reuse().sources(back).tolist() == [0, 1, 2]


@pytest.mark.parametrize("tolerance", [0.0, 1.0])
def test_pixels_that_are_no_numbers_are_encoded(tolerance):
    frames = torch.full((2, 1, 3), float("nan"))
    assert vidsieve.Reuse(tolerance).sources(frames).tolist() == [0, 1]


@pytest.mark.parametrize("tolerance", [-0.1, float("nan"), "0.1"])
def test_a_wrong_tolerance_is_refused(tolerance):
    with pytest.raises(BudgetError, match="tolerance must be a number"):
        vidsieve.Reuse(tolerance)


@pytest.mark.parametrize(("name", "fields"), [("reuse", {}), ("reuse+divprune", {"retention": 0.4})])
def test_a_session_generates_the_same_and_says_what_was_encoded(name, fields):
    model, inputs = repeated("qwen3_vl", [[5]])
    plain = vidsieve.load("divprune", retention=0.4) if fields else None
    with torch.no_grad():
        if plain is None:
            wanted = model.generate(**inputs, max_new_tokens=4)
        else:
            with vidsieve.attach(model, plain):
                wanted = model.generate(**inputs, max_new_tokens=4)
        with vidsieve.attach(model, vidsieve.load(name, **fields)) as session:
            got = model.generate(**inputs, max_new_tokens=4)
    assert torch.equal(wanted, got)
    assert str(session.trace).startswith(f"{name} (ours): kept {16 if fields else 40} of 40 video tokens")
    assert "; encoded 3 of 5 frames; positions" in str(session.trace)
    assert session.trace.videos[0].as_dict()["encoded_frames"] == 3


def test_it_stays_with_a_method_at_another_budget_and_between_layers():
    front = vidsieve.Reuse(0.1)
    method = vidsieve.Pipeline(front, vidsieve.load("fastv", layer=1), 0.8)
    assert method.front is front and method.retention == 0.8 and method.title == "reuse+fastv"
    assert method.with_retention(0.5).front is front and not method.with_retention(1.0).idle
    first = vidsieve.Pipeline(front, vidsieve.load("divprune"), 0.5)
    both = vidsieve.Pipeline(first, vidsieve.load("fastv", layer=1), 0.4)
    assert both.front is front and both.with_retention(0.3).front is front and both.title == "reuse+divprune+fastv"
    model, inputs = repeated("llava_onevision", [[5]])
    with torch.no_grad(), vidsieve.attach(model, both) as session:
        model.generate(**inputs, max_new_tokens=2)
    assert session.trace.videos[0].encoded == 3


def test_what_cannot_be_in_a_row_is_refused():
    front, method = vidsieve.Reuse(), vidsieve.load("divprune", retention=0.5)
    reusing = vidsieve.Pipeline(front, method, 0.5)
    with pytest.raises(StageError, match="already"):
        vidsieve.Pipeline(front, reusing, 0.5)
    with pytest.raises(StageError, match="both methods bring one"):
        vidsieve.Pipeline(reusing, vidsieve.Pipeline(front, vidsieve.load("fastv"), 0.5), 0.4)
    with pytest.raises(StageError, match="acts alone"):
        vidsieve.Pipeline(method)
    assert vidsieve.Pipeline(front, method).retention == 0.5
    for second in (front, vidsieve.Reuse(0.1)):
        with pytest.raises(StageError, match="reuse acts before the vision encoder: it comes first"):
            vidsieve.Pipeline(method, second, 0.25)
    with pytest.raises(UnsupportedCallError, match="made of methods, got 'divprune'"):
        vidsieve.Pipeline(front, "divprune", 0.25)
    with pytest.raises(BudgetError, match="give the retention of divprune and fastv together"):
        vidsieve.Pipeline(method, vidsieve.load("fastv"))
    with pytest.raises(BudgetError, match="reuse keeps every token"):
        vidsieve.load("reuse", retention=0.5)


def test_names_on_a_command_line():
    method = method_for("reuse+vidcom2:official", "anything", **known_fields("reuse+vidcom2:official"))
    assert (method.title, method.variant, method.front) == ("reuse+vidcom2", "official", vidsieve.Reuse())
    assert Condition(method).described()["method"] == "reuse+vidcom2"
    assert Condition(method).key != Condition(vidsieve.load("vidcom2", variant="official")).key
    assert method_for("reuse", "anything", **known_fields("reuse")).front == vidsieve.Reuse()
    assert method_for("reuse+fastv", None, **known_fields("reuse+fastv", earliest=True)).earliest
    assert vidsieve.load("reuse+uniform", tolerance=0.1, retention=0.5).front == vidsieve.Reuse(0.1)
    for name in ("reuse", "reuse+vidcom2", "reuse+vidcom2:official"):
        check_known(name)
    for name in ("reuse+all", "reuse+full", "reuse+nothing", "again+vidcom2"):
        with pytest.raises(UnknownNameError):
            check_known(name)
    with pytest.raises(PolicyError, match="takes no policy"):
        vidsieve.load("reuse", "somewhere")
    with pytest.raises(UnknownNameError, match="field of reuse"):
        vidsieve.load("reuse", layer=1)
