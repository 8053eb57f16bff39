"""Methods inside the LLM: equal to a forward in which later layers do not see what was dropped."""

from __future__ import annotations

import copy

import pytest
import torch

import vidsieve
from vidsieve.adapters import adapter_for
from vidsieve.adapters.transformers_api import cache_kwargs, output_cache
from vidsieve.compressors.fastv import FastV
from vidsieve.errors import BudgetError, StageError, UnsupportedCallError
from vidsieve.testing.calls import CALLS
from vidsieve.testing.equivalence import CONFIGURATIONS, cell, configuration
from vidsieve.testing.reference import attended
from vidsieve.testing.tiny_models import FAMILIES, default_grid, inputs_for


def fastv(retention=0.8, **fields):
    return vidsieve.load("fastv", retention=retention, **fields)


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize(
    ("name", "attention"), [("ragged batch 2", "sdpa"), ("two videos", "eager"), ("video and image", "sdpa")]
)
@pytest.mark.parametrize("family", FAMILIES)
def test_equals_the_reference_masked_from_its_layer_on(family, name, call, attention):
    result = cell(family, name, call, attention, fastv())
    assert result.passed or (call == "static cache" and "needs a DynamicCache" in result.error), result


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_kept_is_what_the_models_own_attention_says(family):
    model, inputs = FAMILIES[family](), configuration(family, "ragged batch 2")
    with torch.no_grad(), vidsieve.attach(model, fastv()) as session:
        model(**inputs)
    for trace, weights in zip(session.trace, attended(adapter_for(model), inputs, 1), strict=True):
        best = weights.mean(0).topk(trace.kept).indices.sort().values
        assert list(trace.indices) == best.tolist()


@pytest.mark.parametrize("family", FAMILIES)
def test_every_layer_holds_what_it_saw(family):
    model, inputs = FAMILIES[family](), configuration(family, "batch 1")
    with vidsieve.attach(model, fastv()) as session:
        out = model.generate(**inputs, max_new_tokens=5, do_sample=False, return_dict_in_generate=True)
    (trace,) = session.trace
    prompt = session.trace.prompt_tokens[1]
    lengths = [output_cache(out).get_seq_length(layer) for layer in range(3)]
    newlines = 9 - trace.newlines if family == "llava_video" else 0
    assert lengths == [prompt + 4, prompt + 4, prompt + 4 - (trace.total - trace.kept) - newlines]
    # 0.8 · 3 layers = 2 full layers and 0.4 of one.
    assert trace.kept == int(0.4 * trace.total)
    assert trace.layer_retention == pytest.approx((2 + trace.kept / trace.total) / 3)
    assert "on average over layers" in str(session.trace)
    assert not any(layer._forward_pre_hooks or layer._forward_hooks for layer in adapter_for(model).decoder_layers)


def test_a_copied_cache_goes_on_like_the_original():
    model, inputs = FAMILIES["qwen2_5_vl"](), configuration("qwen2_5_vl", "batch 1")
    with torch.no_grad(), vidsieve.attach(model, fastv()):
        cache = output_cache(model(**inputs, use_cache=True))
        twin = copy.deepcopy(cache)
        word = torch.tensor([[41]])
        one, two = (model(input_ids=word, **cache_kwargs(model, some)).logits for some in (cache, twin))
    assert torch.equal(one, two)


def test_right_padding_is_moved_to_the_left():
    grid, outs = default_grid("smolvlm"), []
    for pad in ("left", "right"):
        inputs = inputs_for("smolvlm", [[grid], [grid]], words=[3, 9], pad=pad)
        model = FAMILIES["smolvlm"]()
        with vidsieve.attach(model, fastv()):
            out = model.generate(**inputs, max_new_tokens=6, do_sample=False)
        outs.append(out[:, inputs["input_ids"].shape[1] :])
    assert torch.equal(*outs)


def test_sampling_and_several_sequences():
    model, inputs = FAMILIES["llava_onevision"](), configuration("llava_onevision", "ragged batch 2")
    with vidsieve.attach(model, fastv()):
        outs = []
        for _ in range(2):
            torch.manual_seed(0)
            outs.append(model.generate(**inputs, max_new_tokens=4, do_sample=True, num_return_sequences=3))
    assert outs[0].shape == (6, inputs["input_ids"].shape[1] + 4) and torch.equal(*outs)


class _TwoStages(FastV):
    """FastV with a second cut: the stages of a method may be several, each choosing among what the last one left."""

    def stages(self, num_layers, num_tokens):
        half = round(num_tokens / 2)
        return ((1, half), (2, half if self.variant == "ours" else half // 2))


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "qwen3_vl"])
@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_several_stages(family, name):
    """A second stage that keeps everything changes nothing; one that does not keeps a part of the first's."""
    model, inputs = FAMILIES[family](), configuration(family, name)
    one = fastv(0.5, layer=1, variant="official")
    traces, outs = [], []
    for method in (one, _TwoStages(0.5), _TwoStages(0.5, "official")):
        with vidsieve.attach(model, method) as session:
            outs.append(model.generate(**inputs, max_new_tokens=5, do_sample=False, return_dict_in_generate=True))
        traces.append([set(trace.indices) for trace in session.trace])
    assert traces[0] == traces[1] and torch.equal(outs[0].sequences, outs[1].sequences)
    for first, second in zip(traces[0], traces[2], strict=True):
        assert second < first and len(second) == len(first) // 2
    lengths = [output_cache(outs[2]).get_seq_length(layer) for layer in range(3)]
    assert lengths[0] > lengths[1] > lengths[2]


def test_budgets():
    """The mean over layers is R, or less by less than one token a layer; R below what a token each costs is refused."""
    for layers, tokens, retention in ((28, 6272, 0.25), (28, 196, 0.1118), (28, 576, 0.5), (6, 100, 0.9)):
        ((layer, keep),) = fastv(retention, layer=3).stages(layers, tokens)
        gap = retention * tokens * layers - (layer * tokens + keep * (layers - layer))
        assert layer == 3 and keep >= 1 and -1e-6 <= gap < layers - layer
    with pytest.raises(BudgetError, match=r"cannot go below 0\.1117; choose an earlier layer, or earliest=True"):
        fastv(0.1116, layer=3).stages(28, 196)
    assert fastv(0.1117, layer=3).stages(28, 196) == ((3, 1),)
    with pytest.raises(BudgetError, match=r"cannot go below 0\.0367; no layer is earlier"):
        fastv(0.01, layer=3, earliest=True).stages(28, 1000)
    with pytest.raises(BudgetError, match=r"another for every video if 500 tokens are: give a retention from 0 to 1"):
        fastv(vidsieve.Tokens(500), earliest=True)
    ((_, keep),) = vidsieve.load("fastv", retention=vidsieve.Tokens(500), layer=2).stages(4, 800)
    assert 2 * 800 + 2 * keep == 4 * 500
    with pytest.raises(BudgetError, match="not among the model's 3"):
        fastv(layer=5).stages(3, 100)
    with pytest.raises(BudgetError, match="layer must be a whole number ≥ 1"):
        fastv(layer=0)
    assert fastv(0.1, layer=3, variant="official").stages(28, 25) == ((3, 2),)  # half to even


def test_what_cannot_be_right_is_refused():
    model, inputs = FAMILIES["llava_onevision"](), configuration("llava_onevision", "batch 1")
    with pytest.raises(StageError, match=r"vidsieve\.attach"):
        vidsieve.prune(model, inputs, fastv())
    with pytest.raises(BudgetError, match="cannot go below"):
        vidsieve.attach(model, fastv(0.2))
    with pytest.raises(StageError, match="after its first 2 layers"):
        vidsieve.attach(FAMILIES["qwen3_vl"](), fastv(layer=1))
    with vidsieve.attach(model, fastv()):
        with pytest.raises(UnsupportedCallError, match="needs a DynamicCache, got static"):
            model.generate(**inputs, max_new_tokens=2, cache_implementation="static")
        with pytest.raises(UnsupportedCallError, match="behind a video token"):
            model(**inputs, labels=inputs["input_ids"])
