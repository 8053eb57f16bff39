"""Pruned calls equal a full forward in which the dropped tokens are masked out at unchanged positions."""

from __future__ import annotations

import pytest
import torch

import vidsieve
from vidsieve.adapters import adapter_for
from vidsieve.testing import equivalence
from vidsieve.testing.equivalence import CALLS, CONFIGURATIONS, cell, configuration
from vidsieve.testing.tiny_models import FAMILIES, default_grid, inputs_for
from vidsieve.types import Selection


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("name", CONFIGURATIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_equals_masked_reference(family, name, call, attention):
    result = cell(family, name, call, attention, vidsieve.load("random", retention=0.3))
    assert result.passed, result


@pytest.mark.parametrize("call", ["prefill logits", "8 greedy tokens", "forward with labels"])
@pytest.mark.parametrize("family", FAMILIES)
def test_merged_tokens_equal_the_reference_too(family, call):
    result = cell(family, "ragged batch 2", call, "sdpa", vidsieve.load("downsample", retention=0.3))
    assert result.passed, result


@pytest.mark.parametrize("family", FAMILIES)
def test_the_reference_notices_wrong_positions(family, monkeypatch):
    """Without the original positions the table would fail: the comparison has teeth."""
    kind = type(adapter_for(FAMILIES[family]()))
    original = kind.build

    def compact(self, encoded, selections, rows=None):
        pruned = original(self, encoded, selections, rows)
        count = torch.arange(pruned.inputs["position_ids"].shape[-1])
        pruned.inputs["position_ids"] = count.expand_as(pruned.inputs["position_ids"])
        return pruned

    monkeypatch.setattr(kind, "build", compact)
    result = cell(family, "batch 1", "prefill logits", "sdpa", vidsieve.load("random", retention=0.3))
    assert result.difference > 0.01


@pytest.mark.parametrize("name", CONFIGURATIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_rebuilding_with_every_token_equals_the_installed_model(family, name):
    """Our positions, masks and features are the installed model's own."""
    model, inputs = FAMILIES[family](), configuration(family, name)
    adapter = adapter_for(model)
    with torch.no_grad():
        encoded = adapter.encode(inputs)
        everything = [
            [Selection(torch.arange(encoded.videos[i].features.grid.num_tokens)) for i in encoded.of_row(row)]
            for row in range(encoded.input_ids.shape[0])
        ]
        rebuilt = model(**adapter.build(encoded, everything).inputs).logits
        plain = model(**inputs).logits
    real = inputs["attention_mask"].bool()
    assert float((rebuilt[real] - plain[real]).abs().max()) < 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_right_padded_batches_answer_as_left_padded_ones(family):
    model, grid = FAMILIES[family](), default_grid(family)
    outs = []
    for pad in ("left", "right"):
        inputs = inputs_for(family, [[grid], [grid]], words=[3, 9], pad=pad)
        with vidsieve.attach(model, vidsieve.load("divprune", retention=0.3)):
            out = model.generate(**inputs, max_new_tokens=6, do_sample=False)
        outs.append(out[:, inputs["input_ids"].shape[1] :])
    assert torch.equal(*outs)


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_reach_the_vision_tower(family):
    model, inputs = FAMILIES[family](), configuration(family, "batch 1")
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] >= 100, -100)
    with vidsieve.attach(model, vidsieve.load("uniform", retention=0.3)):
        model(**inputs, labels=labels).loss.backward()
    weight = next(p for n, p in model.named_parameters() if "patch_embed" in n and p.ndim > 1)
    assert float(weight.grad.abs().max()) > 1e-6


def test_different_frame_counts_in_one_batch():
    """Qwen takes videos of different lengths side by side (LLaVA-OneVision stacks them); each keeps its own share."""
    model = FAMILIES["qwen2_5_vl"]()
    inputs = inputs_for("qwen2_5_vl", [[default_grid("qwen2_5_vl", 2)], [default_grid("qwen2_5_vl", 5)]])
    result = equivalence._prefill(adapter_for(model), inputs, vidsieve.load("random", retention=0.5))
    assert result[0] <= equivalence.TOLERANCE
