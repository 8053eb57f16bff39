"""A placeholder that the model itself says is a word like any other in the turns that follow."""

from __future__ import annotations

import pytest
import torch
from transformers import LogitsProcessor, LogitsProcessorList

import vidsieve
from vidsieve.adapters import adapter_for
from vidsieve.adapters.transformers_api import cache_kwargs, output_cache
from vidsieve.errors import PromptError, UnsupportedCallError
from vidsieve.testing.reference import reference_greedy, reference_logits
from vidsieve.testing.tiny_models import FAMILIES, default_grid, inputs_for, placeholder

WORDS = torch.arange(40, 46)[None]


class Says(LogitsProcessor):
    """Makes one token certain at one step."""

    def __init__(self, at, token, prompt):
        self.at, self.token, self.prompt = at, token, prompt

    def __call__(self, input_ids, scores):
        if input_ids.shape[1] - self.prompt == self.at:
            scores = torch.full_like(scores, -1e9)
            scores[:, self.token] = 0
        return scores


def said(family, at):
    """Return model, inputs, and a first turn of six tokens in which the placeholder is said at step `at`."""
    model, inputs = FAMILIES[family](), inputs_for(family, [[default_grid(family, 4)]])
    hook = LogitsProcessorList([Says(at, placeholder(family), inputs["input_ids"].shape[1])])
    return model, inputs, {"max_new_tokens": 6, "do_sample": False, "logits_processor": hook}


def selections(model, inputs, method):
    adapter = adapter_for(model)
    return adapter.select(adapter.encode(inputs), method, torch.Generator().manual_seed(0))[0]


@pytest.mark.parametrize("family", list(FAMILIES))
@pytest.mark.parametrize("at", [0, 2, 5])
def test_the_next_turn_is_answered_as_by_the_masked_reference(family, at):
    model, inputs, options = said(family, at)
    method = vidsieve.load("divprune", retention=0.3)
    with torch.no_grad(), vidsieve.attach(model, method):
        out = model.generate(**inputs, **options, return_dict_in_generate=True)
        answer = out.sequences[:, inputs["input_ids"].shape[1] :]
        assert int(answer[0, at]) == placeholder(family)
        talk = torch.cat([out.sequences, WORDS], 1)
        again = model.generate(
            input_ids=talk,
            attention_mask=torch.ones_like(talk),
            **cache_kwargs(model, output_cache(out)),
            max_new_tokens=3,
            do_sample=False,
        )
        wanted = reference_greedy(
            adapter_for(model), inputs, selections(model, inputs, method), 3, extra_ids=torch.cat([answer, WORDS], 1)
        )
    assert torch.equal(again[:, talk.shape[1] :], wanted)


@pytest.mark.parametrize("family", list(FAMILIES))
def test_one_step_of_forward_takes_the_placeholder_as_a_word(family):
    model, inputs, _ = said(family, 0)
    method, token = vidsieve.load("divprune", retention=0.3), torch.tensor([[placeholder(family)]])
    with torch.no_grad(), vidsieve.attach(model, method):
        cache = output_cache(model(**inputs, use_cache=True))
        logits = model(input_ids=token, **cache_kwargs(model, cache)).logits[:, -1]
        wanted = reference_logits(adapter_for(model), inputs, selections(model, inputs, method), token)[:, -1]
        torch.testing.assert_close(logits, wanted, atol=1e-4, rtol=1e-4)
        with pytest.raises(UnsupportedCallError, match="another video"):
            model(input_ids=token.expand(1, 4), **cache_kwargs(model, cache))


@pytest.mark.parametrize("family", list(FAMILIES))
def test_a_conversation_that_is_read_anew_says_that_the_answer_holds_it(family):
    model, inputs, options = said(family, 2)
    with vidsieve.attach(model, vidsieve.load("divprune", retention=0.3)):
        out = model.generate(**inputs, **options)
        talk = torch.cat([out, WORDS], 1)
        call = inputs | {"input_ids": talk, "attention_mask": torch.ones_like(talk)}
        if "mm_token_type_ids" in inputs:
            more = torch.zeros(1, talk.shape[1] - inputs["input_ids"].shape[1], dtype=torch.int64)
            call["mm_token_type_ids"] = torch.cat([inputs["mm_token_type_ids"], more], 1)
        with pytest.raises(PromptError, match="if an answer of the model itself holds the placeholder, take it out"):
            model.generate(**call, max_new_tokens=3)
