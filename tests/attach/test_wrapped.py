"""Models that others have wrapped or changed: PEFT, accelerate, torch, offloading, checkpointing, quantisation."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from accelerate import Accelerator, cpu_offload, disk_offload, dispatch_model
from peft import LoraConfig, PrefixTuningConfig, get_peft_model

import vidsieve
from vidsieve.adapters import adapter_for
from vidsieve.adapters.transformers_api import cache_argument, cache_kwargs, execution_device, output_cache
from vidsieve.compressors.cacovid import CaCoVIDPolicy
from vidsieve.errors import AttachError, PolicyError, UnsupportedCallError, UnsupportedModelError
from vidsieve.testing.tiny_models import FAMILIES, default_grid, inputs_for

# What PEFT and we call by names that work in every version of transformers that is allowed.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* (is|are) deprecated"),
    pytest.mark.filterwarnings("ignore:.past_key_values. is deprecated"),
    pytest.mark.filterwarnings("ignore:MatMul8bitLt"),
    pytest.mark.filterwarnings("ignore:You are calling .generate.. with the .input_ids. being on a device type"),
]
GREEDY = {"max_new_tokens": 5, "do_sample": False}


def prompt(family, frames=4):
    return inputs_for(family, [[default_grid(family, frames)]])


def method(name="divprune"):
    return vidsieve.load(name, retention=0.8 if name == "fastv" else 0.3)


def lora(model):
    torch.manual_seed(1)
    return get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)).eval()


# -- PEFT -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["divprune", "fastv"])
@pytest.mark.parametrize("family", ["llava_onevision", "qwen2_5_vl", "internvl"])
def test_lora_attaches_to_the_model_inside_and_equals_the_merged_model(family, name):
    inputs, wrapped = prompt(family), lora(FAMILIES[family]())
    with torch.no_grad(), vidsieve.attach(wrapped, method(name)) as session:
        logits, out = wrapped(**inputs).logits, wrapped.generate(**inputs, **GREEDY)
        assert len(session.trace) == 2 and session._model is wrapped.get_base_model()
        assert torch.equal(wrapped.get_base_model().generate(**inputs, **GREEDY), out)
    merged = lora(FAMILIES[family]()).merge_and_unload()
    with torch.no_grad(), vidsieve.attach(merged, method(name)):
        assert torch.equal(merged.generate(**inputs, **GREEDY), out)
        torch.testing.assert_close(merged(**inputs).logits, logits, atol=1e-5, rtol=1e-5)
    pruned = vidsieve.prune(wrapped, inputs, method("divprune"))
    assert pruned["input_ids"].shape[1] < inputs["input_ids"].shape[1]


def prefixed(model):
    """Return a model that begins to generate with three columns in its cache, as PEFT's prefix tuning makes it.

    With transformers 5.24 PEFT 0.21 hands its prefix over by a name that transformers then ignores: there the same is
    done by hand.
    """
    if cache_argument(model) == "past_key_values":
        return get_peft_model(model, PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")).eval()
    before, name = model.prepare_inputs_for_generation, cache_argument(model)

    def prepare(*args, **kwargs):
        inputs = before(*args, **kwargs)
        if inputs[name].get_seq_length() == 0:
            shape = adapter_for(model).layer_state(0).shape
            for layer in range(model.config.get_text_config().num_hidden_layers):
                inputs[name].update(*torch.zeros(2, 1, shape.num_kv_heads, 3, shape.head_dim), layer)
            if inputs.get("attention_mask") is not None:
                inputs["attention_mask"] = torch.nn.functional.pad(inputs["attention_mask"], (3, 0), value=1)
        return inputs

    model.prepare_inputs_for_generation = prepare
    return model


@pytest.mark.parametrize("name", ["fastv", "dycoke"])
@pytest.mark.parametrize("family", ["llava_onevision", "qwen2_5_vl"])
def test_prefix_tuning_under_a_method_inside_the_llm_is_refused_by_name(family, name):
    wrapped = prefixed(FAMILIES[family]())
    inside = vidsieve.load(name, retention=0.8, **({"layer": 1} if name == "dycoke" else {}))
    with vidsieve.attach(wrapped, inside), pytest.raises(UnsupportedCallError, match="prefix tuning"):
        wrapped.generate(**prompt(family), **GREEDY)


# -- accelerate -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["attach first", "prepare first"])
@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("family", ["qwen2_5_vl", "llava_onevision"])
def test_mixed_precision_prepared_and_unwrapped_again(family, keep, order):
    inputs, model = prompt(family), FAMILIES[family]()
    with torch.no_grad():
        stock = model(**inputs).logits
        with vidsieve.attach(model, method()):
            wanted, tokens = model(**inputs).logits, model.generate(**inputs, **GREEDY)
    assert wanted.shape[1] < stock.shape[1]
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    if order == "attach first":
        session = vidsieve.attach(model, method())
        prepared = accelerator.prepare(model)
    else:
        prepared = accelerator.prepare(model)
        session = vidsieve.attach(prepared, method())
    with torch.no_grad():
        assert prepared(**inputs).logits.shape == wanted.shape
        free = accelerator.unwrap_model(prepared, keep_fp32_wrapper=keep)
        got = free(**inputs).logits
        assert got.shape == wanted.shape and torch.allclose(got.float(), wanted, atol=0.2)
        assert torch.equal(free.generate(**inputs, **GREEDY)[:, : inputs["input_ids"].shape[1]], inputs["input_ids"])
        assert tokens.shape == free.generate(**inputs, **GREEDY).shape
        session.close()
        assert free(**inputs).logits.shape == stock.shape
        if not keep:
            assert torch.equal(free(**inputs).logits, stock)
            assert not {"forward", "generate", "_vidsieve_session"} & vars(free).keys()


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl", "internvl", "smolvlm"])
@pytest.mark.parametrize("how", ["cpu", "disk", "vision on disk"])
@pytest.mark.parametrize("name", ["divprune", "visionzip", "fastv"])
def test_offloaded_weights_are_brought(family, how, name, tmp_path):
    inputs, model = prompt(family), FAMILIES[family]()
    own = vidsieve.load(name, retention=0.8 if name == "fastv" else 0.3, **({"layer": 2} if name == "fastv" else {}))
    with vidsieve.attach(model, own):
        wanted = model.generate(**inputs, **GREEDY)
    if how == "cpu":
        model = cpu_offload(model, execution_device="cpu")
    elif how == "disk":
        model = disk_offload(model, str(tmp_path), execution_device="cpu")
    else:
        parts = dict.fromkeys(child for child, _ in model.model.named_children())
        places = {f"model.{part}": "disk" if "vis" in part else "cpu" for part in parts} | {"lm_head": "cpu"}
        model = dispatch_model(model, places, main_device="cpu", offload_dir=str(tmp_path), force_hooks=True)
    assert execution_device(model).type == "cpu"
    with vidsieve.attach(model, own):
        for _ in range(2):
            assert torch.equal(model.generate(**inputs, **GREEDY), wanted)


def test_weights_that_nothing_brings_are_an_error():
    with torch.device("meta"):
        model = FAMILIES["qwen2_5_vl"]()
    model.to("meta")
    with pytest.raises(UnsupportedCallError, match="meta device"):
        execution_device(model)


# -- wrapped by torch -------------------------------------------------------------------------------------------------


def test_data_parallel_is_refused_and_says_where_the_model_is():
    with pytest.raises(UnsupportedModelError, match=r"attach to model\.module"):
        vidsieve.attach(torch.nn.DataParallel(FAMILIES["qwen2_5_vl"]()), method())


@pytest.mark.parametrize("name", ["divprune", "fastv"])
@pytest.mark.parametrize("when", ["before", "while attached"])
def test_a_model_compiled_in_place_runs_as_it_is_written(name, when):
    inputs, model = prompt("qwen2_5_vl"), FAMILIES["qwen2_5_vl"]()
    with torch.no_grad(), vidsieve.attach(model, method(name)):
        wanted = model(**inputs).logits
    if when == "before":
        model.compile(backend="eager")
    with torch.no_grad(), vidsieve.attach(model, method(name)):
        if when != "before":
            model.compile(backend="eager")
        assert torch.equal(model(**inputs).logits, wanted)


def test_a_model_with_a_session_is_not_copied_or_saved():
    model = FAMILIES["qwen2_5_vl"]()
    with vidsieve.attach(model, method()):
        for attempt in (copy.deepcopy, pickle.dumps):
            with pytest.raises(AttachError, match="close it before copying or saving"):
                attempt(model)
    copy.deepcopy(model)


# -- gradient checkpointing -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["divprune", "fastv"])
@pytest.mark.parametrize("family", ["qwen2_5_vl", "llava_onevision", "qwen3_vl", "smolvlm", "internvl"])
def test_gradient_checkpointing_gives_the_same_loss_and_gradients_or_is_refused(family, name):
    inputs = prompt(family)
    labels = torch.full_like(inputs["input_ids"], -100)
    labels[:, -4:] = inputs["input_ids"][:, -4:]
    own = vidsieve.load(name, retention=0.8, **({"layer": 2} if name == "fastv" else {}))
    found = []
    for checkpointing in (False, True):
        model = FAMILIES[family]().train()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        with vidsieve.attach(model, own):
            try:
                loss = model(**inputs, labels=labels).loss
            except UnsupportedCallError as error:
                assert checkpointing and name == "fastv" and "5.23 or later" in str(error)
                return
            loss.backward()
        found.append((float(loss.detach()), model.get_input_embeddings().weight.grad.norm()))
    assert found[1][0] == pytest.approx(found[0][0], abs=1e-5)
    torch.testing.assert_close(found[1][1], found[0][1], rtol=1e-4, atol=1e-6)


def test_a_filled_cache_is_not_lost_to_checkpointing():
    model, inputs = FAMILIES["llava_onevision"](), prompt("llava_onevision")
    with vidsieve.attach(model, method()):
        out = model(**inputs, use_cache=True)
        model.train().gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        with pytest.raises(UnsupportedCallError, match=r"call model\.eval"):
            model(input_ids=torch.tensor([[40]]), **cache_kwargs(model, output_cache(out)))


# -- policies start from weights as the layer computes with them ------------------------------------------------------


def linears(model, make):
    for module in list(model.model.language_model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, torch.nn.Linear):
                setattr(module, name, make(child))
    return model


def start(model):
    state = adapter_for(model).layer_state(0)
    policy = CaCoVIDPolicy.of_shape(state.shape, "qwen2_5_vl", layers=[state.weights], variant="paper")
    return policy.layers[0].state_dict()


class Scaled(torch.nn.Module):
    """A linear layer that keeps whole numbers and their scale, as quantised ones do."""

    def __init__(self, old):
        super().__init__()
        self.in_features, self.out_features, self.bias = old.in_features, old.out_features, old.bias
        scale = old.weight.abs().amax(1, keepdim=True) / 127
        self.weight = torch.nn.Parameter((old.weight / scale).round().to(torch.int8), requires_grad=False)
        self.register_buffer("scale", scale)

    def forward(self, x):
        return torch.nn.functional.linear(x, self.weight * self.scale, self.bias)


def bitsandbytes_8(old):
    import bitsandbytes as bnb

    new = bnb.nn.Linear8bitLt(old.in_features, old.out_features, bias=old.bias is not None, has_fp16_weights=False)
    new.weight = bnb.nn.Int8Params(old.weight.data.clone(), requires_grad=False, has_fp16_weights=False)
    new.bias = old.bias
    return new.to("cpu")


def bitsandbytes_4(old):
    import bitsandbytes as bnb

    new = bnb.nn.Linear4bit(old.in_features, old.out_features, bias=old.bias is not None, quant_type="nf4")
    # Blocks of 32: on CPUs with bfloat16 bitsandbytes packs whole blocks a row, and the MLP is 96 wide.
    new.weight = bnb.nn.Params4bit(old.weight.data.clone(), requires_grad=False, quant_type="nf4", blocksize=32)
    new.bias = old.bias
    return new.to("cpu")


@pytest.mark.parametrize(("make", "most"), [(Scaled, 0.005), (bitsandbytes_8, 0.03), (bitsandbytes_4, 0.2)])
def test_quantised_layers_are_dequantised(make, most):
    plain, found = start(FAMILIES["qwen2_5_vl"]()), start(linears(FAMILIES["qwen2_5_vl"](), make))
    for name, weight in found.items():
        far = (weight - plain[name]).abs().max() / plain[name].abs().max().clamp(min=1e-9)
        assert float(far) <= most, name


def test_adapters_are_merged_and_offloaded_layers_brought(tmp_path):
    merged = start(lora(FAMILIES["qwen2_5_vl"]()).merge_and_unload())
    wrapped = start(lora(FAMILIES["qwen2_5_vl"]()))
    for name, weight in wrapped.items():
        torch.testing.assert_close(weight, merged[name], atol=1e-5, rtol=1e-4)
    plain = start(FAMILIES["qwen2_5_vl"]())
    away = start(disk_offload(FAMILIES["qwen2_5_vl"](), str(tmp_path), execution_device="cpu"))
    assert all(torch.equal(weight, away[name]) for name, weight in plain.items())


def test_what_is_no_linear_map_is_refused():
    class Broken(Scaled):
        def forward(self, x):
            raise RuntimeError("no kernel for this device")

    with pytest.raises(PolicyError, match=r"cannot start from self_attn\.q_proj, a Broken, .* without quantisation"):
        start(linears(FAMILIES["qwen2_5_vl"](), Broken))
