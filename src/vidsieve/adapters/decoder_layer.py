"""Decoder layers of an LLM: their shape and weights, and the attention that they would compute."""

from __future__ import annotations

from collections.abc import Sequence
from inspect import signature
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from vidsieve.adapters.transformers_api import FULL, attention_of, mlp_width, module_weights, norm_of
from vidsieve.compressors._decoder import BlockShape, LayerState, rotary, rotate
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
_EPSILONS = ("rms_norm_eps", "layer_norm_epsilon")
_INTERLEAVED = {"qwen3_vl": (24, 20, 20), "cosmos3_edge": (24, 20, 20), "qwen3_5": (11, 11, 10)}
"""By the first letters of a model type: rotary sections where a configuration has none."""


class Decoder(NamedTuple):
    """The parts of an LLM that a run works with: decoder layers, text configuration, rotary embedding or None."""

    layers: Sequence[Any]
    config: Any
    rotary: Any


@torch.no_grad()
def layer_state(text: Any, layer: Any) -> LayerState:
    """Return shape and weights (float32 copies on the CPU) of a decoder layer of an LLM with configuration `text`.

    Weights are those that the layer computes with: quantised ones are dequantised, adapters (LoRA) merged, offloaded
    ones loaded, sharded ones gathered (every process must call this).

    Raises
    ------
    NeedError
        As `block_shape`, and for a layer without a norm before its attention, or whose attention has a gate.
    PolicyError
        If a part of the layer is not a linear map.
    """
    weights: dict[str, Tensor] = {}
    modules = dict(layer.named_modules())
    if "input_layernorm" not in modules:
        raise NeedError(f"a policy cannot start from a {type(layer).__name__}: it has no norm before its attention")
    shape = block_shape(text, layer)
    if shape.query_gate:
        raise NeedError(f"a policy cannot start from a {type(layer).__name__}: its attention has a gate")
    for name in _NORMS:
        if name in modules:
            weights[f"{name}.weight"] = plain(module_weights(modules[name])["weight"], name)
    training = layer.training
    layer.eval()  # dropout of an adapter is not part of its weights
    try:
        for name in _LINEAR:
            if name in modules:
                weight, bias = linear_map(modules[name], name, weights["input_layernorm.weight"].dtype)
                weights[f"{name}.weight"] = weight
                if bias is not None:
                    weights[f"{name}.bias"] = bias
    finally:
        layer.train(training)
    return LayerState(shape, {k: v.float().clone().cpu() for k, v in weights.items()})


def linear_map(module: Any, name: str, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """Return weight (out, in) and bias (out,) or None of a linear module.

    Weights that are not plain are read from the module's outputs for unit vectors.

    Raises
    ------
    PolicyError
        If it does not map `in_features` numbers to `out_features`.
    """
    if type(module) is nn.Linear:
        weights = module_weights(module)
        if weights["weight"].dtype.is_floating_point and type(weights["weight"].data) is Tensor:
            return weights["weight"], weights.get("bias")
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
        If they are codes of a quantised layer, or not loaded.
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
        If its attention, rotary positions or norms are of a kind that our block does not know.
    """
    attention = attention_of(layer)
    if attention is None:
        raise NeedError(f"policies and methods inside the LLM need attention, which a {type(layer).__name__} has not")
    if not hasattr(attention, "k_proj"):
        raise NeedError(f"policies do not know {type(attention).__name__}, which has no projection to keys alone")
    eps = next((getattr(text, name) for name in _EPSILONS if hasattr(text, name)), None)
    if eps is None:
        raise NeedError(f"policies and methods inside the LLM do not know the norms of a {type(layer).__name__}")
    rope = getattr(text, "rope_parameters", None) or {}
    rope = rope.get(FULL, rope)  # in some LLMs each kind of layer has its own
    kind, share = rope.get("rope_type", "default"), rope.get("partial_rotary_factor", 1.0)
    if kind not in ("default", "proportional"):
        raise NeedError(f"policies do not know rotary positions of type {kind!r}")
    heads = int(text.num_attention_heads)
    size = int(getattr(text, "head_dim", None) or text.hidden_size // heads)
    width = int(size * share) if kind == "default" else size
    # Some LLMs interleave their sections whatever their configuration says.
    usual = next((usual for name, usual in _INTERLEAVED.items() if text.model_type.startswith(name)), ())
    return BlockShape(
        int(text.hidden_size),
        heads,
        int(text.num_key_value_heads),
        size,
        mlp_width(text),
        float(eps),
        float(rope.get("rope_theta", 10000.0)),
        tuple(rope.get("mrope_section") or usual),
        qkv_bias=attention.q_proj.bias is not None,
        qk_norm=hasattr(attention, "q_norm"),
        rope_interleaved=bool(usual),
        rope_width=(None if width == size else width) if hasattr(text, "rope_parameters") else 0,
        rope_still=0 if kind == "default" else size // 2 - int(size * share // 2),
        query_gate=text.model_type.startswith("qwen3_5"),
    )


def angles(embedding: Any, x: Tensor, positions: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """Return the cosines and sines that an LLM's rotary embedding makes for layers of a kind."""
    kinds = {"layer_type": kind} if "layer_type" in signature(type(embedding).forward).parameters else {}
    turns: tuple[Tensor, Tensor] = embedding(x, positions, **kinds)
    return turns


@torch.no_grad()
def check_rotary(embedding: Any, shape: BlockShape, kind: str | None = None) -> None:
    """Refuse an LLM whose rotary embedding turns queries and keys otherwise than our block does.

    Parameters
    ----------
    embedding : the LLM's module that makes cosines and sines from positions; None if it has none
    shape : BlockShape
        What its configuration says.
    kind : str, optional
        The kind of layer that is asked for, where each may have its own; None: an LLM must have one for all.

    Raises
    ------
    NeedError
    """
    if embedding is None and shape.turned == 0:
        return
    rows = max(1, len(shape.rope_sections))
    device = next((buffer.device for buffer in embedding.buffers()), torch.device("cpu"))
    if device.type == "meta":  # without values, or offloaded: the same one anew
        embedding, device = type(embedding)(embedding.config), torch.device("cpu")
    positions = torch.arange(4 * rows, device=device).view(rows, 4)  # other ones in each row
    parameters = [*signature(type(embedding).forward).parameters]
    plain_call = parameters == ["self", "x", "position_ids", *(["layer_type"] if kind and len(parameters) > 3 else [])]
    if plain_call:
        given = positions if rows == 1 else positions[:, None]
        theirs = angles(embedding, torch.zeros(1, 1, 1, device=device), given, kind or FULL)
        same = all(
            their[0].shape == our.shape and torch.allclose(their[0].float(), our, atol=1e-3)
            for their, our in zip(theirs, rotary(positions, shape), strict=True)
        )
    if not plain_call or not same:
        rounded = next((buffer.dtype for buffer in embedding.buffers() if buffer.dtype.itemsize < 4), None)
        advice = "choose a method that acts before the LLM, or a policy that starts from no layer"
        if rounded is not None:
            advice = f"its frequencies are in {rounded}, rounded by a cast of the model: pass dtype= when it is loaded"
        raise NeedError(
            f"the {type(embedding).__name__} of this model turns queries and keys by their positions in a way that "
            f"vidsieve cannot compute: {advice}"
        )


# -- attention ----------------------------------------------------------------------------------------------------


def at_home(hidden: Tensor, layer: Any) -> Tensor:
    """Return a layer's input on the layer's own device, where it is moved only after our hook has run."""
    weight = norm_of(layer).weight
    return hidden if weight.device.type == "meta" else hidden.to(weight.device)


def rotated(attend: Any, kind: Literal["q", "k"], shape: BlockShape, x: Tensor, positions: Tensor) -> Tensor:
    """Return queries or keys (H, n, d) float32 of an attention module, at positions (P, n), from its input x (n, D)."""
    count = shape.num_heads if kind == "q" else shape.num_kv_heads
    states = getattr(attend, f"{kind}_proj")(x).unflatten(-1, (count, -1))
    if kind == "q" and shape.query_gate:
        states = states[..., : shape.head_dim]
    if shape.qk_norm:
        states = getattr(attend, f"{kind}_norm")(states)
    cosine, sine = _turns(positions.to(x.device), shape)
    return rotate(states.transpose(0, 1), cosine, sine).float()


def _turns(positions: Tensor, shape: BlockShape) -> tuple[Tensor, Tensor]:
    """Return cosines and sines; an LLM that reads several rows of positions reads the one of a family in all."""
    return rotary(positions.expand(max(len(positions), len(shape.rope_sections)), -1), shape)


def attention_scores(query: Tensor, keys: Tensor, scaling: float) -> Tensor:
    """Return the scores (H, n) of one token's query (H, d) and keys (H_kv, n, d), before the softmax."""
    grouped = query.reshape(len(keys), -1, query.shape[-1])
    weights: Tensor = (grouped @ keys.transpose(1, 2) * scaling).flatten(0, 1)
    return weights


@torch.no_grad()
def attention_rows(
    layer: Any, text: Any, hidden: Tensor, positions: Tensor, rows: Tensor, window: int | None = None
) -> Tensor:
    """Return the attention (H, Q, n) float32 of some of n tokens (n, D), `rows` (Q,), in a layer of an LLM.

    Parameters
    ----------
    text : the LLM's configuration
    hidden : Tensor, (n, D)
        Hidden states that enter the layer.
    positions : Tensor, (P, n), int64
    window : int, optional
        Number of tokens that each sees back, itself included; None: all.
    """
    shape, attend = block_shape(text, layer), attention_of(layer)
    x = norm_of(layer)(at_home(hidden, layer))
    rows = rows.to(x.device)
    query = rotated(attend, "q", shape, x[rows], positions[:, rows.to(positions.device)])
    keys = rotated(attend, "k", shape, x, positions)
    back = rows[:, None] - torch.arange(len(x), device=x.device)  # (Q, n)
    later = (back < 0) if window is None else (back < 0) | (back >= window)
    logits = [attention_scores(query[:, i], keys, attend.scaling) for i in range(len(rows))]
    masked = [row.masked_fill(later[i], -torch.inf) for i, row in enumerate(logits)]
    return torch.stack(masked, 1).softmax(-1)


def rope_bias(text: Any, layer: Any, queries: Tensor, keys: Tensor) -> Tensor:
    """Return the scores (Q, n) float32 of a query and a key of ones, by their positions (P, Q) and (P, n) alone."""
    shape = block_shape(text, layer)
    cosine_q, sine_q = _turns(queries, shape)
    cosine_k, sine_k = _turns(keys, shape)
    unturned = shape.head_dim - shape.turned
    bias: Tensor = (cosine_q @ cosine_k.T + sine_q @ sine_k.T + unturned) / shape.head_dim**0.5
    return bias
