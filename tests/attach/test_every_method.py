"""Every method without training on every family: it keeps its budget, or says why it cannot run."""

from __future__ import annotations

import pytest
import torch

import vidsieve
from vidsieve import registry
from vidsieve.adapters import adapter_for
from vidsieve.errors import BudgetError, StageError, UnsupportedCallError
from vidsieve.testing.equivalence import configuration
from vidsieve.testing.tiny_models import FAMILIES

FREE = [name for name in registry.compressors if not registry.compressors.get(name).trained]
SHALLOW = {
    "pyramiddrop": {"layers": (1, 2), "fractions": (0.5, 0.25)},
    "dycoke": {"layer": 1},
}
"""Settings for models of three layers."""
DEEP = "adds visual features after its first 2 layers"
REFUSED = {
    ("framefusion", "qwen3_vl"): (StageError, DEEP),
    ("prunevid", "qwen3_vl"): (StageError, DEEP),
    ("pyramiddrop", "qwen3_vl"): (StageError, DEEP),
    **{("sparsevlm", family): (BudgetError, "not all among the model's 3") for family in FAMILIES},
}
"""What the tiny models cannot do: layers that are too early for deep features, and three steps in three layers."""


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", FREE)
def test_it_keeps_its_budget_or_says_why_not(name, family):
    model, method = FAMILIES[family](), vidsieve.load(name, retention=0.9, **SHALLOW.get(name, {}))
    inputs = configuration(family, "ragged batch 2")
    refused = REFUSED.get((name, family))
    if method.front is not None and method.front.stage not in adapter_for(model).fronts:
        refused = (UnsupportedCallError, f"{name} acts inside the vision encoder, and the {family} adapter")
    if refused is not None:
        error, text = refused
        with pytest.raises(error, match=text):
            vidsieve.attach(model, method)
        return
    with torch.no_grad(), vidsieve.attach(model, method) as session:
        model.generate(**inputs, max_new_tokens=2, do_sample=False)
    assert {trace.row for trace in session.trace} == {0, 1}
    for trace in session.trace:
        assert 0.9 - 2 / trace.total <= trace.layer_retention <= 0.9
        assert trace.kept == len(set(trace.indices)) < trace.total
