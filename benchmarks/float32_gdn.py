"""A vLLM plug-in for comparisons in float32: its kernel of Gated DeltaNet for CPUs takes bfloat16 alone.

The kernel is replaced by transformers' own recurrence; caches, chunks and batches stay vLLM's.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import conv1d, silu, softplus
from transformers.models.qwen3_5.modeling_qwen3_5 import torch_recurrent_gated_delta_rule as recurrence
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.mamba.mamba_utils import is_conv_state_dim_first
from vllm.model_executor.layers.mamba.ops.cpu import gdn_attention
from vllm.utils.torch_utils import LayerNameType, _resolve_layer_name


def register() -> None:
    """Replace the kernel before vLLM registers it; vLLM calls this in each of its processes."""
    gdn_attention.cpu_gdn_attention_core = core


def core(mixed_qkv: Tensor, b: Tensor, a: Tensor, core_attn_out: Tensor, layer_name: LayerNameType) -> None:
    """Write the heads' outputs (L, heads, D) of a batch of sequences, and update their states, as vLLM's kernel does.

    Parameters
    ----------
    mixed_qkv : Tensor, (L, C)
        Queries, keys and values of all sequences before the convolution.
    b, a : Tensor, (L, heads)
        Gates before the sigmoid and the softplus.
    """
    context = get_forward_context()
    if context.attn_metadata is None:
        return
    layer = context.no_compile_layers[_resolve_layer_name(layer_name)]
    batch, (tails, states) = context.attn_metadata[layer.prefix], layer.kv_cache
    tails = tails.transpose(1, 2) if is_conv_state_dim_first() else tails
    taps = layer.conv1d.weight
    decays = -layer.A_log.exp() * softplus(a + layer.dt_bias)
    starts = batch.non_spec_query_start_loc.tolist()
    for number in range(batch.num_decodes + batch.num_prefills):
        slot = int(batch.non_spec_state_indices_tensor[number])
        part = slice(starts[number], starts[number + 1])
        if number >= batch.num_decodes and not batch.has_initial_state[number]:
            tails[slot], states[slot] = 0, 0
        window = torch.cat([tails[slot], mixed_qkv[part]])
        tails[slot] = window[len(window) - (taps.shape[-1] - 1) :]
        query, key, value = layer.rearrange_mixed_qkv(silu(conv1d(window.T[None], taps, groups=len(taps))[0].T))
        times = value.shape[2] // key.shape[2]
        out, states[slot : slot + 1] = recurrence(
            query.repeat_interleave(times, 2),
            key.repeat_interleave(times, 2),
            value,
            g=decays[None, part],
            beta=b[None, part].sigmoid(),
            initial_state=states[slot : slot + 1],
            output_final_state=True,
            use_qk_l2norm_in_kernel=True,
        )
        core_attn_out[part] = out[0]
