"""transformers' names: looked up once, taken in either spelling, and an error at attach where one is gone."""

from __future__ import annotations

import warnings

import pytest
import torch
import transformers
from transformers import DynamicCache

import vidsieve
from vidsieve.adapters import transformers_api
from vidsieve.adapters.inside import hooks
from vidsieve.adapters.inside.decoding import DecodeRun
from vidsieve.adapters.transformers_api import cache_argument, output_cache
from vidsieve.errors import UnsupportedCallError, UnsupportedTransformersError
from vidsieve.io import versions
from vidsieve.testing.tiny_models import FAMILIES, default_grid, inputs_for

METHODS = {"divprune": {"retention": 0.3}, "fastv": {"retention": 0.8}, "dycoke": {"retention": 0.4, "layer": 1}}


def prompt(family):
    return inputs_for(family, [[default_grid(family, 8)]])


def renamed(forward, name):
    """Return `forward` as a future version may have it: the cache under another name, or (None) not there at all."""

    def newer(self, hidden_states=None, attention_mask=None, position_ids=None, input_ids=None, **kwargs):
        raise AssertionError("a call that an error at attach should have stopped")

    def with_name(
        self,
        hidden_states=None,
        attention_mask=None,
        position_ids=None,
        input_ids=None,
        kv_store=None,
        mm_encoder_outputs=None,
        **kwargs,
    ):
        raise AssertionError("a call that an error at attach should have stopped")

    return with_name if name else newer


@pytest.mark.parametrize("family", list(FAMILIES))
@pytest.mark.parametrize("name", ["kv_store", None])
@pytest.mark.parametrize("method", list(METHODS))
def test_a_renamed_or_removed_cache_argument_is_an_error_at_attach(family, name, method, monkeypatch):
    model, loaded = FAMILIES[family](), vidsieve.load(method, **METHODS[method])
    adapter = vidsieve.adapters.adapter_for(model)
    places = [type(model)] + ([type(adapter.decoder_layers[0])] if method != "divprune" else [])
    for place in places:
        with monkeypatch.context() as patch:
            patch.setattr(place, "forward", renamed(place.forward, name))
            with pytest.raises(UnsupportedTransformersError, match=r"install a version from 5\.19 to"):
                vidsieve.attach(model, loaded)
            with pytest.raises(UnsupportedTransformersError):
                vidsieve.adapters.adapter_for(model).check(loaded)


@pytest.mark.parametrize("method", ["fastv", "dycoke"])
def test_a_layer_that_is_called_with_other_names_than_it_declares_is_an_error(method, monkeypatch):
    family = "qwen2_5_vl"
    model, loaded = FAMILIES[family](), vidsieve.load(method, **METHODS[method])
    layer = type(vidsieve.adapters.adapter_for(model).decoder_layers[0])
    before = layer.__call__

    def called(self, *args, **kwargs):
        kwargs["kv_store"] = kwargs.pop(cache_argument(self), None)
        return before(self, *args, **kwargs)

    monkeypatch.setattr(layer, "__call__", called)
    with vidsieve.attach(model, loaded), pytest.raises(UnsupportedTransformersError, match="was called without"):
        model.generate(**prompt(family), max_new_tokens=4, do_sample=False)


@pytest.mark.parametrize("method", ["fastv", "dycoke"])
def test_hooks_that_never_act_are_an_error(method, monkeypatch):
    model = FAMILIES["llava_onevision"]()
    monkeypatch.setattr(hooks.OwnPasses, "__call__", lambda self, given: False)
    with vidsieve.attach(model, vidsieve.load(method, **METHODS[method])):
        with pytest.raises(UnsupportedTransformersError, match="saw no"):
            model.generate(**prompt("llava_onevision"), max_new_tokens=4, do_sample=False)


def test_steps_that_are_decoded_unseen_are_an_error(monkeypatch):
    model = FAMILIES["llava_onevision"]()
    before = DecodeRun._before

    def blind(self, number):
        hook = before(self, number)
        return lambda module, args, kwargs: None if args[0].shape[1] == 1 else hook(module, args, kwargs)

    monkeypatch.setattr(DecodeRun, "_before", blind)
    with vidsieve.attach(model, vidsieve.load("dycoke", **METHODS["dycoke"])):
        with pytest.raises(UnsupportedTransformersError, match="saw none of the steps in which 5 tokens"):
            model.generate(**prompt("llava_onevision"), max_new_tokens=5, do_sample=False)


@pytest.mark.parametrize("family", list(FAMILIES))
@pytest.mark.parametrize("method", list(METHODS))
def test_either_name_of_the_cache_gives_the_same_steps(family, method):
    model, inputs = FAMILIES[family](), prompt(family)
    found = {}
    for name in ("cache", "past_key_values"):
        with (
            warnings.catch_warnings(),
            torch.no_grad(),
            vidsieve.attach(model, vidsieve.load(method, **METHODS[method])),
        ):
            warnings.simplefilter("error")
            cache = DynamicCache(config=model.config.get_text_config())
            first = model(**inputs, **{name: cache})
            assert output_cache(first) is cache
            steps = [model(input_ids=torch.tensor([[token]]), **{name: cache}).logits for token in (40, 41, 42)]
            out = model.generate(
                **inputs, **{name: DynamicCache()}, max_new_tokens=4, do_sample=False, return_dict_in_generate=True
            )
            more = torch.cat([out.sequences, torch.arange(40, 44)[None]], 1)
            again = model.generate(input_ids=more, **{name: output_cache(out)}, max_new_tokens=4, do_sample=False)
        found[name] = torch.cat(steps), out.sequences, again
    for one, two in zip(found["cache"], found["past_key_values"], strict=True):
        assert torch.equal(one, two)


def test_text_only_calls_take_either_name():
    model = FAMILIES["llava_onevision"]()
    ids = torch.arange(10, 20)[None]
    wanted = model.generate(input_ids=ids, max_new_tokens=3, do_sample=False)
    with vidsieve.attach(model, vidsieve.load("divprune", retention=0.3)):
        for name in {"cache", cache_argument(model)}:
            got = model.generate(input_ids=ids, **{name: DynamicCache()}, max_new_tokens=3, do_sample=False)
            assert torch.equal(got, wanted)


def test_two_caches_in_one_call_are_refused():
    model, inputs = FAMILIES["llava_onevision"](), prompt("llava_onevision")
    with vidsieve.attach(model, vidsieve.load("divprune", retention=0.3)):
        with pytest.raises(UnsupportedCallError, match="are the same argument"):
            model(**inputs, cache=DynamicCache(), past_key_values=DynamicCache())


def test_an_untested_version_is_a_warning_that_names_the_tested_ones(monkeypatch):
    monkeypatch.setattr(versions, "_warned", set())
    monkeypatch.setattr(transformers_api.transformers, "__version__", "6.1.0")
    model = FAMILIES["llava_onevision"]()
    with pytest.warns(UserWarning, match=r"transformers 6\.1\.0 is untested .* passed with 5\.19 to 5\.\d+"):
        vidsieve.attach(model, vidsieve.load("divprune")).close()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        vidsieve.attach(model, vidsieve.load("divprune")).close()  # once is enough


def test_the_installed_version_is_tested():
    assert versions.is_tested("transformers", transformers.__version__)
    assert versions.is_tested("transformers", "5.19.0") and not versions.is_tested("transformers", "5.18.3")
