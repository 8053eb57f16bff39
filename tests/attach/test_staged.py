"""Methods with several stages, with a part before the LLM, and with merging: equal to a forward without a cache."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

import vidsieve
from vidsieve.adapters import adapter_for
from vidsieve.compressors.fastv import FastV
from vidsieve.compressors.inside import LayerChoice
from vidsieve.compressors.sparsevlm import SparseVLM
from vidsieve.errors import BudgetError, NeedError, SelectionError
from vidsieve.selection import top_indices
from vidsieve.testing import GivenView
from vidsieve.testing.calls import CALLS
from vidsieve.testing.equivalence import cell, configuration
from vidsieve.testing.tiny_models import FAMILIES

SIGNALS = [
    family
    for family in FAMILIES
    if "attention inside the vision encoder" in {need.value for need in adapter_for(FAMILIES[family]()).provides}
]


MAIN = ("prefill logits", "8 greedy tokens")
"""Calls for methods beside the one that is tried in all of them: the way to each is the same."""


class _TwoStages(FastV):
    """FastV twice, the second time among what the first left."""

    def stages(self, num_layers, num_tokens):
        return ((1, max(1, num_tokens // 2)), (2, max(1, num_tokens // 5)))


class _TwoSteps(SparseVLM):
    """SparseVLM in a model of three layers; without version 2's division, which the recorded cases prove."""

    def stages(self, num_layers, num_tokens):
        return ((1, max(1, int(0.7 * num_tokens))), (2, max(1, int(0.4 * num_tokens))))

    def scores(self, view):
        attention = view.attention("text", view.layer - 1)
        tensors = {"video": view.video, "text": view.text, "rope_bias": torch.ones(attention.shape[1:])}
        rows = {("text", view.layer - 1): attention}
        given = GivenView(view.layer, view.depth, view.grid, view.indices, rows=rows, tensors=tensors)
        return super().scores(given)


class _OwnLayer(_TwoStages):
    """The same by the attention that the stage's own layer would compute."""

    def step(self, view, keep):
        return LayerChoice(top_indices(view.attention("last", view.layer)[:, 0].mean(0), keep))


class _FarLayer(_TwoStages):
    """FastV by the attention of the first layer, at a stage where only two later ones are known."""

    def stages(self, num_layers, num_tokens):
        return ((2, num_tokens // 2),)

    def step(self, view, keep):
        return LayerChoice(top_indices(view.attention("last", 0)[:, 0].mean(0), keep))


def test_attention_of_a_layer_long_before_is_refused():
    model, inputs = FAMILIES["llava_onevision"](), configuration("llava_onevision", "batch 1")
    with vidsieve.attach(model, _FarLayer(0.7)), pytest.raises(SelectionError, match=r"before layer 2 .*, not 0"):
        model(**inputs)
    assert not any(layer._forward_pre_hooks for layer in adapter_for(model).decoder_layers)


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("family", SIGNALS)
def test_holitom_equals_the_same_merge_without_a_cache(family, call):
    method = vidsieve.load("holitom", retention=0.6, layer=2)
    result = cell(family, "ragged batch 2", call, "sdpa", method)
    assert result.passed or (call == "static cache" and "needs a DynamicCache" in result.error), result


@pytest.mark.parametrize("family", SIGNALS)
def test_flashvid_equals_the_same_steps_without_a_cache(family):
    method = vidsieve.load("flashvid", retention=0.6, layer=2)
    for call in MAIN:
        result = cell(family, "ragged batch 2", call, "sdpa", method)
        assert result.passed, result


@pytest.mark.parametrize("name", ["batch 1", "ragged batch 2"])
@pytest.mark.parametrize("family", FAMILIES)
def test_prunevid_equals_the_masks(family, name):
    method = vidsieve.load("prunevid", retention=0.6, layer=2, threshold=0.0)
    for call in MAIN:
        result = cell(family, name, call, "sdpa", method)
        assert result.passed, result


def test_prunevid_reads_every_word_behind_the_video_and_every_head():
    model, inputs = FAMILIES["llava_onevision"](), configuration("llava_onevision", "batch 1")
    method = vidsieve.load("prunevid", retention=1.0 - 1e-9, layer=2, inner_kept=0.3)
    adapter, seen = adapter_for(model), []
    hook = adapter.decoder_layers[1].self_attn.register_forward_hook(lambda *a: seen.append(a[2][1]))
    model.set_attn_implementation("eager")
    with torch.no_grad():
        model(**inputs)
    hook.remove()
    video = adapter.encode(inputs).videos[0]
    weights = seen[0][0, :, int(video.tail_columns.max()) + 1 :][:, :, video.columns].amax((0, 1))
    with torch.no_grad(), vidsieve.attach(model, method) as session:
        model(**inputs)
    (trace,) = session.trace
    assert set(trace.indices) == set(weights.topk(trace.kept).indices.tolist()) and trace.kept < trace.total


@pytest.mark.parametrize("threshold", [0.1, 0.9])
@pytest.mark.parametrize("name", ["batch 1", "ragged batch 2"])
@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "qwen3_vl"])
def test_framefusion_equals_the_same_steps_without_a_cache(family, name, threshold):
    """At the low threshold tokens are merged before the LLM and inside; at the high one most are dropped inside."""
    method = vidsieve.load("framefusion", retention=0.7, threshold=threshold)
    for call in MAIN:
        result = cell(family, name, call, "sdpa", method)
        assert result.passed, result


@pytest.mark.parametrize("threshold", [0.1, 0.3, 0.9])
@pytest.mark.parametrize("retention", [0.45, 0.7, 0.9])
def test_framefusion_meets_its_budget_whatever_it_merges(threshold, retention):
    model, inputs = FAMILIES["qwen2_5_vl"](), configuration("qwen2_5_vl", "ragged batch 2")
    with (
        torch.no_grad(),
        vidsieve.attach(model, vidsieve.load("framefusion", retention=retention, threshold=threshold)) as session,
    ):
        model(**inputs)
    for trace in session.trace:
        assert retention - 3 / trace.total <= trace.layer_retention <= retention + 1e-9
        assert set(trace.layers) <= {1, 2} and (trace.layers or trace.kept == int(retention * trace.total))


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("name", ["batch 1", "ragged batch 2"])
@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "qwen3_vl"])
def test_sparsevlm_equals_the_same_steps_without_a_cache(family, name, version):
    method = _TwoSteps(0.6, version=version)
    for call in MAIN:
        result = cell(family, name, call, "sdpa", method)
        assert result.passed, result


@pytest.mark.parametrize("version", [1, 2])
def test_sparsevlm_behind_another_method_is_told_all_it_reads(version):
    method = vidsieve.Pipeline(vidsieve.load("uniform", retention=0.5), _TwoSteps(version=version), 0.4)
    result = cell("llava_onevision", "ragged batch 2", "8 greedy tokens", "sdpa", method)
    assert result.passed, result


@pytest.mark.parametrize("name", ["batch 1", "ragged batch 2"])
@pytest.mark.parametrize("family", FAMILIES)
def test_topv_equals_the_masks(topv, family, name):
    method = vidsieve.load("topv", retention=0.8, layer=2)
    for call in MAIN:
        result = cell(family, name, call, "sdpa", method)
        assert result.passed, result


@pytest.mark.parametrize(
    ("name", "fields", "times"),
    [
        ("topv", {"layer": 2}, 0),
        ("fastv", {"layer": 1}, 1),
        ("framefusion", {"threshold": 0.99}, 1),
    ],
)
def test_attention_is_computed_where_it_is_read_and_once(topv, monkeypatch, name, fields, times):
    """TopV never reads it, FrameFusion where it drops; two videos of one prompt share one computation."""
    from vidsieve.adapters.inside import view

    calls = []
    rows = view.attention_rows
    monkeypatch.setattr(view, "attention_rows", lambda *args: calls.append(args) or rows(*args))
    model, inputs = FAMILIES["llava_onevision"](), configuration("llava_onevision", "two videos")
    with torch.no_grad(), vidsieve.attach(model, vidsieve.load(name, retention=0.7, **fields)) as session:
        model(**inputs)
    assert len(session.trace) == 2 and any(trace.layers for trace in session.trace)
    assert len(calls) == times


@pytest.mark.parametrize("kind", [_TwoStages, _OwnLayer])
@pytest.mark.parametrize("name", ["batch 1", "ragged batch 2"])
@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "qwen3_vl"])
def test_several_stages_equal_the_masks(family, name, kind):
    for call in MAIN:
        result = cell(family, name, call, "sdpa", kind(0.5))
        assert result.passed, result


@pytest.mark.parametrize("name", ["batch 1", "ragged batch 2"])
@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "qwen3_vl"])
def test_pyramiddrop_equals_the_masks(family, name):
    method = vidsieve.load("pyramiddrop", retention=0.6, layers=(1, 2), fractions=(0.5, 0.25))
    for call in MAIN:
        result = cell(family, name, call, "sdpa", method)
        assert result.passed, result


@pytest.mark.parametrize("layers", [6, 12, 28, 32, 36])
@pytest.mark.parametrize("retention", [0.34, 0.36, 0.46875, 0.5, 0.7, 0.9, 0.99])
def test_pyramiddrop_spends_its_budget_in_the_papers_proportions(layers, retention):
    stages = vidsieve.load("pyramiddrop", retention=retention).stages(layers, 6272)
    edges, kept = [*(at for at, _ in stages), layers], [count for _, count in stages]
    seen = edges[0] * 6272 + sum(count * (b - a) for count, a, b in zip(kept, edges, edges[1:], strict=False))
    assert 0 <= retention * 6272 * layers - seen <= layers
    free = [count for count in kept if count < 6272]
    assert kept == sorted(kept)[::-1] and all(abs(a - 2 * b) <= 2 for a, b in pairwise(free))
    if layers == 32:
        assert [at for at, _ in stages] == [8, 16, 24]
        if retention == 0.46875:
            assert kept == [3136, 1568, 784]


def test_below_its_floor_a_method_may_start_earlier_and_says_where():
    for name, floor in (("pyramiddrop", "0.2502"), ("fastv", "0.0716")):
        with pytest.raises(BudgetError, match=rf"below {floor}; choose .*earliest=True"):
            vidsieve.load(name, retention=0.05).stages(28, 6272)
    stages = vidsieve.load("pyramiddrop", retention=0.1, earliest=True).stages(28, 6272)
    assert [at for at, _ in stages] == [1, 3, 4]
    assert vidsieve.load("fastv", retention=0.05, earliest=True).stages(28, 6272) == ((1, int(0.4 / 27 * 6272)),)
    model, inputs = FAMILIES["llava_onevision"](), configuration("llava_onevision", "batch 1")
    method = vidsieve.load("fastv", retention=0.5, earliest=True)
    with torch.no_grad(), vidsieve.attach(model, method) as session:
        model(**inputs)
    assert session.trace.videos[0].layers == (1,) and "(fewer from layer 1 on, by attention in layer 0)" in str(
        session.trace
    )


def test_pyramiddrops_release_counts_positions_anew():
    """The answer differs where positions are counted anew; that they are the release's, the recorded cases prove."""
    model, inputs = FAMILIES["llava_onevision"](), configuration("llava_onevision", "batch 1")
    kept, fields = [], {"layers": (1, 2), "fractions": (0.5, 0.25)}
    for variant in ("ours", "official"):
        method = vidsieve.load("pyramiddrop", retention=0.75, variant=variant, **fields)
        with torch.no_grad(), vidsieve.attach(model, method) as session:
            out = model.generate(
                **inputs, max_new_tokens=4, do_sample=False, output_logits=True, return_dict_in_generate=True
            )
        kept.append((session.trace.videos[0].indices, out.logits[0]))
    assert len(kept[1][0]) == int(0.25 * session.trace.videos[0].total)
    assert not torch.equal(kept[0][1], kept[1][1])


@pytest.mark.parametrize(
    "fields", [{"layers": (3, 2, 4)}, {"layers": (0, 1, 2)}, {"fractions": (0.5, 0.6, 0.1)}, {"fractions": (0.5,)}]
)
def test_steps_that_make_no_pyramid_are_refused(fields):
    with pytest.raises(BudgetError):
        vidsieve.load("pyramiddrop", **fields)


def test_both_parts_keep_the_mean_over_layers():
    model, inputs = FAMILIES["llava_onevision"](), configuration("llava_onevision", "batch 1")
    with torch.no_grad(), vidsieve.attach(model, vidsieve.load("holitom", retention=0.6, layer=2)) as session:
        model(**inputs)
    (trace,) = session.trace
    entering = int(trace.total * 0.6 / (2.5 / 3))
    assert trace.kept == entering // 2
    assert trace.layer_retention == pytest.approx((2 * entering + trace.kept) / 3 / trace.total)
    assert abs(trace.layer_retention - 0.6) < 2 / trace.total


def test_more_than_the_part_inside_can_keep_is_kept_there():
    method = vidsieve.load("holitom", retention=0.95, layer=2)
    assert method.outer(4).retention == 1.0 and method.stages(4, 100) == ((2, 90),)


def test_what_merges_takes_others_in():
    """With similarities of one and weights by hand: the last of two weighs a half, the first a quarter."""
    from vidsieve.compressors.holitom import absorbed

    hidden = torch.tensor([[4.0, 0.0], [8.0, 0.0], [0.0, 1.0], [16.0, 0.0], [0.0, 3.0]])
    made = absorbed(hidden, torch.tensor([0, 2]))
    assert made.tolist() == [[4 / 4 + 8 / 4 + 16 / 2, 0.0], [0.0, 1 / 2 + 3 / 2]]


def test_families_without_encoder_signals_say_so():
    missing = [family for family in FAMILIES if family not in SIGNALS]
    for family in missing:
        with pytest.raises(NeedError, match="holitom needs attention inside the vision encoder"):
            vidsieve.attach(FAMILIES[family](), vidsieve.load("holitom"))
