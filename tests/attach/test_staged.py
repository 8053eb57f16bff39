"""Methods with several stages, with a part before the LLM, and with merging: equal to a forward without a cache."""

from __future__ import annotations

import pytest
import torch

import vidsieve
from vidsieve.adapters import adapter_for
from vidsieve.compressors.fastv import FastV
from vidsieve.errors import NeedError
from vidsieve.testing.equivalence import CALLS, cell, configuration
from vidsieve.testing.tiny_models import FAMILIES

SIGNALS = [family for family in FAMILIES if "attention inside the vision encoder" in {
    need.value for need in adapter_for(FAMILIES[family]()).provides
}]  # fmt: skip


class _TwoStages(FastV):
    """FastV twice, the second time among what the first left."""

    def stages(self, num_layers, num_tokens):
        return ((1, max(1, num_tokens // 2)), (2, max(1, num_tokens // 5)))


class _OwnLayer(_TwoStages):
    """The same by the attention that the stage's own layer would compute."""

    own_layer = True


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("name", ["batch 1", "ragged batch 2"])
@pytest.mark.parametrize("family", SIGNALS)
def test_holitom_equals_the_same_merge_without_a_cache(family, name, call):
    method = vidsieve.load("holitom", retention=0.6, layer=2)
    result = cell(family, name, call, "sdpa", method)
    assert result.passed or (call == "static cache" and "needs a DynamicCache" in result.error), result


@pytest.mark.parametrize("kind", [_TwoStages, _OwnLayer])
@pytest.mark.parametrize("name", ["batch 1", "ragged batch 2"])
@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "qwen3_vl"])
def test_several_stages_equal_the_masks(family, name, kind):
    for call in ("prefill logits", "8 greedy tokens"):
        result = cell(family, name, call, "sdpa", kind(0.5))
        assert result.passed, result


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
