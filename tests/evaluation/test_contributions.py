"""What tokens contribute to an answer: the estimate against all subsets, attention against transformers' own."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
import torch

from vidsieve.adapters.pruning import adapter_for
from vidsieve.errors import EvaluationError
from vidsieve.evaluation.contributions import attention_received, contributions, effects
from vidsieve.loading import load_model
from vidsieve.testbed.model import chat_inputs
from vidsieve.testbed.questions import make_questions
from vidsieve.testbed.world import make_cast, render
from vidsieve.training.rollouts import Rollouts


@pytest.fixture(scope="module")
def asked():
    model, processor = load_model("testbed")
    cast = make_cast("dense", 9001, 0)
    question = next(q for q in make_questions(cast, 9001, 0) if q.kind == "shape")
    return adapter_for(model), processor, chat_inputs(processor, render(cast, 9001, 0), [question.text]), question


def test_effects_are_differences_of_means():
    masks = np.array([[i in some for i in range(6)] for some in combinations(range(6), 2)])
    values = np.random.default_rng(0).normal(size=len(masks))
    found, error = effects(masks, values)
    for token in range(6):
        inside, outside = values[masks[:, token]], values[~masks[:, token]]
        assert found[token] == pytest.approx(inside.mean() - outside.mean())
        assert error[token] == pytest.approx(np.sqrt(inside.var() / len(inside) + outside.var() / len(outside)))
    never, infinite = effects(np.array([[True, False], [True, False]]), np.ones(2))
    assert never.tolist() == [0, 0] and np.isinf(infinite).all(), "in all subsets or in none: nothing to compare"


def test_the_tokens_that_show_the_object_are_found_and_repeat(asked):
    adapter, processor, inputs, question = asked
    found = contributions(adapter, inputs, subsets=192, seed=3)
    assert processor.tokenizer.decode([found.answer]) == question.answer
    assert set(np.argsort(-found.contribution)[: len(question.targets)]) == set(question.targets)
    assert found.sure[list(question.targets)].all() and found.sure.sum() <= len(question.targets) + 4
    again = contributions(adapter, inputs, subsets=192, seed=3)
    assert np.array_equal(found.contribution, again.contribution)
    with pytest.raises(EvaluationError, match="give two or more"):
        contributions(adapter, inputs, subsets=1)


def test_attention_is_what_transformers_computes(asked):
    adapter, _, inputs, _ = asked
    rollouts = Rollouts(adapter, inputs)
    found, encoded = attention_received(rollouts), rollouts.encoded
    adapter.model.set_attn_implementation({"text_config": "eager"})
    try:
        with torch.no_grad():
            whole = adapter.build(encoded, encoded.per_row(encoded.everything())).inputs
            out = adapter.model(**whole, use_cache=False, output_attentions=True).attentions
    finally:
        adapter.model.set_attn_implementation({"text_config": "sdpa"})
    rows = torch.stack([layer[0, :, -1].mean(0) for layer in out[:-1]]).mean(0)[encoded.videos[0].columns]
    np.testing.assert_allclose(found, rows.numpy(), atol=1e-6)
