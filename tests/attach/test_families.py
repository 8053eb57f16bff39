"""Every family of `workbench.families`: batch 1 and ragged 2, all calls, against its definition of correctness."""

from __future__ import annotations

import pytest

from vidsieve.adapters.pruning import adapter_for
from vidsieve.loading import load
from vidsieve.testing.calls import Case, prefill
from vidsieve.testing.equivalence import TOLERANCE, check_family
from workbench.families import families, tiny


@pytest.mark.parametrize("family", families())
def test_every_call_of_a_family_equals_its_reference(family):
    kind = tiny(family)
    model = kind.model(0, kind.layers)
    check_family(model, kind.inputs([[3]], [5], "left"))
    check_family(model, kind.inputs([[3, 2], [2]], [3, 9], "left"))


@pytest.mark.parametrize("family", families())
def test_prompts_padded_on_the_right_are_read_alike(family):
    kind = tiny(family)
    inputs = kind.inputs([[3], [2]], [3, 9], "right")
    case = Case(adapter_for(kind.model(0, kind.layers)), inputs, load("random", retention=0.3))
    assert prefill(case)[0] <= TOLERANCE
