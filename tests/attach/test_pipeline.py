"""Two methods in a row under one budget."""

from __future__ import annotations

import pickle

import pytest
import torch

import vidsieve
from vidsieve.errors import BudgetError, StageError
from vidsieve.testing.equivalence import cell, configuration
from vidsieve.testing.tiny_models import FAMILIES


def two(second="fastv", total=0.4, first="uniform", **fields):
    return vidsieve.Pipeline(vidsieve.load(first, retention=0.5), vidsieve.load(second, **fields), total)


@pytest.mark.parametrize("name", ["batch 1", "ragged batch 2"])
@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "qwen3_vl"])
def test_equals_the_reference(family, name):
    for call in ("prefill logits", "8 greedy tokens", "second turn"):
        result = cell(family, name, call, "sdpa", two(layer=1))
        assert result.passed, result


@pytest.mark.parametrize(
    ("second", "fields"),
    [
        ("pyramiddrop", {"layers": (1, 2), "fractions": (0.5, 0.25)}),
    ],
)
def test_what_the_second_reads_and_merges_reaches_it(second, fields):
    for name in ("batch 1", "ragged batch 2"):
        result = cell("llava_onevision", name, "8 greedy tokens", "sdpa", two(second, **fields))
        assert result.passed, result


def test_the_total_is_the_mean_over_layers():
    model, inputs = FAMILIES["llava_onevision"](), configuration("llava_onevision", "batch 1")
    with torch.no_grad(), vidsieve.attach(model, two(layer=1)) as session:
        model(**inputs)
    (trace,) = session.trace
    assert trace.method == "uniform+fastv" and trace.nominal == "0.4"
    assert abs(trace.layer_retention - 0.4) <= 1.01 / trace.total
    # Half enters; of it the one stage keeps what makes 0.8 over three layers: 0.7.
    assert trace.kept == int(0.7 * (trace.total // 2))


def test_while_decoding_the_total_is_what_is_read():
    model, inputs = FAMILIES["qwen2_5_vl"](), configuration("qwen2_5_vl", "batch 1")
    method = two("dycoke", total=0.1, layer=1, similarity=1.0)
    with torch.no_grad(), vidsieve.attach(model, method) as session:
        model.generate(**inputs, max_new_tokens=5, do_sample=False)
    (trace,) = session.trace
    assert trace.kept == trace.total // 2 and trace.method == "uniform+dycoke"
    assert trace.decoded == pytest.approx(int(0.2 * trace.kept) / trace.kept)


def test_it_survives_pickling_and_another_budget():
    method = pickle.loads(pickle.dumps(two(layer=1)))
    assert method == two(layer=1)
    assert method.with_retention(0.45).second.retention == 0.9
    assert method.needs == vidsieve.load("fastv").needs


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (lambda: two(total=0.6), BudgetError, "more than uniform .* keeps: ask for 0.5 at most"),
        (lambda: two(first="fastv"), StageError, "first of two methods acts before the LLM"),
        (lambda: two("random"), StageError, "second of two methods acts inside"),
        (lambda: two("dycoke", inner=False), StageError, "second of two methods acts inside"),
        (lambda: two("holitom"), StageError, "has a part before the LLM itself"),
        (lambda: two(total=vidsieve.Tokens(5)), BudgetError, "both budgets as ratios or both as Tokens"),
    ],
)
def test_what_does_not_go_together(make, error, text):
    with pytest.raises(error, match=text):
        make()


def test_below_the_seconds_floor():
    model = FAMILIES["llava_onevision"]()
    with pytest.raises(BudgetError, match="cannot go below"):
        vidsieve.attach(model, two(total=0.1, layer=2))
