"""Handing a decoder layer of the LLM to a policy."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from vidsieve.compressors._decoder import BlockShape, LayerState
from vidsieve.errors import NeedError


def layer_state(text: Any, layer: Any) -> LayerState:
    """Return shape and weights (float32 copies on the CPU) of a decoder layer of an LLM with configuration `text`."""
    weights = {k: whole(v.detach()).float().clone().cpu() for k, v in layer.state_dict().items()}
    return LayerState(block_shape(text, layer), weights)


def whole(value: Tensor) -> Tensor:
    """Return a tensor that FSDP has shared out over processes in one piece, and any other as it is.

    Every process has to ask for it.
    """
    gather = getattr(value, "full_tensor", None)
    gathered: Tensor = value if gather is None else gather()
    return gathered


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
        int(text.hidden_size), heads, int(text.num_key_value_heads),
        int(getattr(text, "head_dim", None) or text.hidden_size // heads), int(text.intermediate_size),
        float(text.rms_norm_eps), float(rope.get("rope_theta", 10000.0)),
        tuple(sections), qkv_bias=attention.q_proj.bias is not None,
        qk_norm=hasattr(attention, "q_norm"), rope_interleaved=interleaved,
    )  # fmt: skip
