"""Every family of `workbench.families` against its definition of correct; benchmarks/families.py tries more batches."""

from __future__ import annotations

import pytest

from vidsieve.adapters.families.qwen2_vl import Qwen2VLAdapter
from vidsieve.adapters.pruning import adapter_for
from vidsieve.errors import NeedError, PolicyError, StageError, UnsupportedCallError, UnsupportedModelError
from vidsieve.loading import load
from vidsieve.testing.calls import Case, prefill
from vidsieve.testing.equivalence import TOLERANCE, check_family
from vidsieve.training.controls import teacher_scores
from vidsieve.training.rollouts import Rollouts
from workbench.families import families, tiny

SOME = ("prefill logits", "8 greedy tokens", "2 beams", "second turn", "forward with labels")
"""benchmarks/families.py makes every call."""


@pytest.mark.parametrize("family", families())
def test_calls_on_a_ragged_batch_equal_their_reference(family):
    kind = tiny(family)
    check_family(kind.model(0, kind.layers), kind.inputs([[3, 2], [2]], [3, 9], "left"), calls=SOME)


@pytest.mark.parametrize("family", families())
def test_one_prompt_and_prompts_padded_on_the_right_are_read_alike(family):
    kind = tiny(family)
    adapter = adapter_for(kind.model(0, kind.layers))
    assert adapter.model.get_submodule(adapter.projector)  # timings put it on the clock
    for inputs in (kind.inputs([[3]], [5], "left"), kind.inputs([[3], [2]], [3, 9], "right")):
        assert prefill(Case(adapter, inputs, load("random", retention=0.3)))[0] <= TOLERANCE


@pytest.mark.parametrize("method", ["prunevid", "sparsevlm"])
@pytest.mark.parametrize("family", families())
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
    kind = tiny(family)
    adapter = adapter_for(kind.model(0, 6))
    with pytest.raises(NeedError, match="in a way that vidsieve cannot compute"):
        adapter.check(load("prunevid", retention=0.3))
    with pytest.raises(NeedError, match="a policy that starts from no layer"):
        adapter.layer_state()
    with pytest.raises(NeedError, match="in a way that vidsieve cannot compute"):
        teacher_scores(Rollouts(adapter, kind.inputs([[2]], [5], "left")), "attention")


def test_an_older_transformers_is_refused_by_name(monkeypatch):
    kind = tiny("qwen2_vl")
    model = kind.model(0, kind.layers)
    monkeypatch.setattr(Qwen2VLAdapter, "oldest", "5.999")
    with pytest.raises(UnsupportedModelError, match=r"qwen2_vl needs transformers 5\.999 or newer, and 5\.\d+"):
        adapter_for(model)


@pytest.mark.families("cohere_compass")
def test_a_layer_without_root_mean_squares_is_refused():
    kind = tiny("cohere_compass")
    with pytest.raises(NeedError, match="norms of a CohereCompassDecoderLayer"):
        adapter_for(kind.model(0, 4)).layer_state(3)
