"""Handing a decoder layer of the LLM to a policy."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vidsieve.adapters.transformers_api import module_weights
from vidsieve.compressors._decoder import BlockShape, LayerState
from vidsieve.errors import NeedError, PolicyError

_LINEAR = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)
_NORMS = ("input_layernorm", "post_attention_layernorm", "self_attn.q_norm", "self_attn.k_norm")


@torch.no_grad()
def layer_state(text: Any, layer: Any) -> LayerState:
    """Return shape and weights (float32 copies on the CPU) of a decoder layer of an LLM with configuration `text`.

    Weights are those that the layer computes with: quantised ones are dequantised, adapters (LoRA) merged, offloaded
    ones brought, sharded ones gathered (every process has to ask).

    Raises
    ------
    NeedError
        As `block_shape`.
    PolicyError
        If a part of the layer is no linear map.
    """
    weights: dict[str, Tensor] = {}
    modules = dict(layer.named_modules())
    for name in _NORMS:
        if name in modules:
            weights[f"{name}.weight"] = plain(module_weights(modules[name])["weight"], name)
    training = layer.training
    layer.eval()  # dropout of an adapter is no part of its weights
    try:
        for name in _LINEAR:
            if name in modules:
                weight, bias = linear_map(modules[name], name, weights["input_layernorm.weight"].dtype)
                weights[f"{name}.weight"] = weight
                if bias is not None:
                    weights[f"{name}.bias"] = bias
    finally:
        layer.train(training)
    return LayerState(block_shape(text, layer), {k: v.float().clone().cpu() for k, v in weights.items()})


def linear_map(module: Any, name: str, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """Return weight (out, in) and bias (out,) or None of a linear module.

    Where they are not plain they are read off what the module makes of unit vectors.

    Raises
    ------
    PolicyError
        If it does not map `in_features` numbers to `out_features`.
    """
    if type(module) is nn.Linear:
        own = module_weights(module)
        if own["weight"].dtype.is_floating_point and type(own["weight"].data) is Tensor:
            return own["weight"], own.get("bias")
    width = int(module.in_features)
    device = next((p.device for p in module.parameters() if p.device.type != "meta"), torch.device("cpu"))
    try:
        bias = module(torch.zeros(1, width, dtype=dtype, device=device))[0].float()
        units = torch.eye(width, dtype=dtype, device=device)
        columns = [module(some).float() - bias for some in torch.split(units, 1024)]
    except (RuntimeError, NotImplementedError, ValueError, TypeError) as error:
        kind, first = type(module).__name__, str(error).strip().splitlines()[0]
        raise PolicyError(
            f"a policy cannot start from {name}, a {kind}, whose weights are not plain ({first}): load the model "
            "without quantisation, or merge its adapters"
        ) from error
    weight = torch.cat(columns).T
    if weight.shape != (int(module.out_features), width):
        raise PolicyError(f"a policy cannot start from {name}: a {type(module).__name__} gives {tuple(weight.shape)}")
    return weight, bias if getattr(module, "bias", None) is not None else None


def plain(value: Tensor, name: str) -> Tensor:
    """Return weights that are ordinary numbers.

    Raises
    ------
    PolicyError
        If they are codes of a quantised layer, or not there.
    """
    if not value.dtype.is_floating_point or value.is_meta:
        what = "not loaded" if value.is_meta else f"{value.dtype} codes"
        raise PolicyError(f"a policy cannot start from {name}, whose weights are {what}: load the model unquantised")
    return value


def block_shape(text: Any, layer: Any) -> BlockShape:
    """Return the shape of a decoder layer of an LLM with configuration `text`.

    Raises
    ------
    NeedError
        If its rotary positions are of a kind that our block does not know.
    """
    attention = layer.self_attn
    rope = getattr(text, "rope_parameters", None) or {}
    if rope.get("rope_type", "default") != "default":
        raise NeedError(f"policies do not know rotary positions of type {rope['rope_type']!r}")
    heads = int(text.num_attention_heads)
    # Qwen3-VL interleaves its sections whatever its configuration says.
    interleaved = text.model_type.startswith("qwen3_vl")
    sections = rope.get("mrope_section") or ((24, 20, 20) if interleaved else ())
    return BlockShape(
        int(text.hidden_size),
        heads,
        int(text.num_key_value_heads),
        int(getattr(text, "head_dim", None) or text.hidden_size // heads),
        int(text.intermediate_size),
        float(text.rms_norm_eps),
        float(rope.get("rope_theta", 10000.0)),
        tuple(sections),
        qkv_bias=attention.q_proj.bias is not None,
        qk_norm=hasattr(attention, "q_norm"),
        rope_interleaved=interleaved,
    )
