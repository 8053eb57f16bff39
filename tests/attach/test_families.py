"""Every family of `workbench.families` against its definition of correct; benchmarks/families.py tries more batches."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import transformers

from vidsieve.adapters.pruning import adapter_for
from vidsieve.loading import load
from vidsieve.testing.calls import Case, prefill
from vidsieve.testing.equivalence import TOLERANCE, check_family
from workbench.families import families, tiny


def _reason(family: str) -> str:
    return f"{family} is not in transformers {transformers.__version__}"


FAMILIES = [
    pytest.param(name, marks=pytest.mark.skipif(find_spec(f"transformers.models.{name}") is None, reason=_reason(name)))
    for name in families()
]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_call_of_a_ragged_batch_equals_its_reference(family):
    kind = tiny(family)
    check_family(kind.model(0, kind.layers), kind.inputs([[3, 2], [2]], [3, 9], "left"))


@pytest.mark.parametrize("family", FAMILIES)
def test_one_prompt_and_prompts_padded_on_the_right_are_read_alike(family):
    kind = tiny(family)
    adapter = adapter_for(kind.model(0, kind.layers))
    for inputs in (kind.inputs([[3]], [5], "left"), kind.inputs([[3], [2]], [3, 9], "right")):
        assert prefill(Case(adapter, inputs, load("random", retention=0.3)))[0] <= TOLERANCE
