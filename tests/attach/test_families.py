"""Every family of `workbench.families` against its definition of correct; benchmarks/families.py tries more batches."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import transformers

from vidsieve.adapters.pruning import adapter_for
from vidsieve.errors import NeedError, PolicyError, StageError, UnsupportedCallError
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


SOME = ("prefill logits", "8 greedy tokens", "2 beams", "second turn", "forward with labels")
"""benchmarks/families.py makes every call."""


@pytest.mark.parametrize("family", FAMILIES)
def test_calls_on_a_ragged_batch_equal_their_reference(family):
    kind = tiny(family)
    check_family(kind.model(0, kind.layers), kind.inputs([[3, 2], [2]], [3, 9], "left"), calls=SOME)


@pytest.mark.parametrize("family", FAMILIES)
def test_one_prompt_and_prompts_padded_on_the_right_are_read_alike(family):
    kind = tiny(family)
    adapter = adapter_for(kind.model(0, kind.layers))
    assert adapter.model.get_submodule(adapter.projector)  # timings put it on the clock
    for inputs in (kind.inputs([[3]], [5], "left"), kind.inputs([[3], [2]], [3, 9], "right")):
        assert prefill(Case(adapter, inputs, load("random", retention=0.3)))[0] <= TOLERANCE


@pytest.mark.parametrize("method", ["prunevid", "sparsevlm"])
@pytest.mark.parametrize("family", FAMILIES)
def test_methods_inside_the_llm_equal_the_reference_or_are_refused(family, method):
    kind = tiny(family)
    adapter = adapter_for(kind.model(0, 6))
    if adapter.definition == "shortened":
        return  # no shortened prompt equals the run of a method inside the LLM; tests/attach/test_hybrids.py has these
    case = Case(adapter, kind.inputs([[3]], [5], "left"), load(method, retention=0.3))
    try:
        difference, _ = prefill(case)
    except (NeedError, PolicyError, StageError, UnsupportedCallError):
        assert family not in ("cosmos3_edge", "llava_next_video", "qwen2_vl")
        return
    assert difference <= TOLERANCE


@pytest.mark.parametrize("family", ["glm4v", "glm_ocr"])
def test_an_llm_that_turns_other_pairs_of_numbers_is_refused(family):
    pytest.importorskip(f"transformers.models.{family}")
    kind = tiny(family)
    adapter = adapter_for(kind.model(0, 6))
    with pytest.raises(NeedError, match="in a way that vidsieve cannot compute"):
        adapter.check(load("prunevid", retention=0.3))
    with pytest.raises(NeedError, match="a policy that starts from no layer"):
        adapter.layer_state()


def test_a_layer_without_root_mean_squares_is_refused():
    pytest.importorskip("transformers.models.cohere_compass")
    kind = tiny("cohere_compass")
    with pytest.raises(NeedError, match="norms of a CohereCompassDecoderLayer"):
        adapter_for(kind.model(0, 4)).layer_state(3)
