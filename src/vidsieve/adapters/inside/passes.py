"""What hooks on decoder layers share: whose pass it is, its mask, a layer's home, its queries and keys."""

from __future__ import annotations

import threading
from typing import Any, Literal, NoReturn

import torch
from torch import Tensor

from vidsieve.adapters.inside.layers import block_shape
from vidsieve.compressors._decoder import BlockShape, rotary, rotate
from vidsieve.compressors.base import Compressor
from vidsieve.errors import UnsupportedCallError


class OwnPasses:
    """Whether a pass through a layer belongs to the call that begins now: its thread, its cache.

    Without a cache to begin with, the first one that passes is the call's own: nothing else runs in its thread before.
    """

    def __init__(self, cache: Any) -> None:
        self.cache, self._thread = cache, threading.get_ident()

    def __call__(self, given: Any) -> bool:
        """Return whether a pass with the cache `given` is ours."""
        if threading.get_ident() != self._thread:
            return False
        if self.cache is None:
            self.cache = given
        return given is self.cache


def refuse_filled(compressor: Compressor) -> NoReturn:
    """Refuse a prompt that goes into a cache which holds tokens already, put there from inside the call."""
    raise UnsupportedCallError(
        f"{compressor.name} acts inside the LLM, and the prompt goes into a cache that holds tokens already: prefix "
        "tuning (PEFT) is not supported under such a method; choose one that acts before the LLM"
    )


def flash_mask(real: Tensor) -> Tensor | None:
    """Return the mask (B, k) int64 of columns that are seen; None where all are."""
    return None if bool(real.all()) else real.long()


def additive(allowed: Tensor, hidden: Tensor) -> Tensor:
    """Return a mask (B, 1, q, k) bool as attention takes it: 0 where allowed, else the lowest number."""
    zeros = torch.zeros(allowed.shape, dtype=hidden.dtype, device=hidden.device)
    return zeros.masked_fill(~allowed, torch.finfo(hidden.dtype).min)


def at_home(hidden: Tensor, layer: Any) -> Tensor:
    """Return a layer's input on the layer's own device, where it is brought only after our hook has run."""
    weight = layer.input_layernorm.weight
    return hidden if weight.device.type == "meta" else hidden.to(weight.device)


def rotated(attend: Any, kind: Literal["q", "k"], shape: BlockShape, x: Tensor, positions: Tensor) -> Tensor:
    """Return queries or keys (H, n, d) float32 of an attention module, at positions (P, n), from its input x (n, D)."""
    count = shape.num_heads if kind == "q" else shape.num_kv_heads
    states = getattr(attend, f"{kind}_proj")(x).unflatten(-1, (count, -1))
    if shape.qk_norm:
        states = getattr(attend, f"{kind}_norm")(states)
    cosine, sine = rotary(positions.to(x.device), shape)
    return rotate(states.transpose(0, 1), cosine, sine).float()


def scores(query: Tensor, keys: Tensor, scaling: float) -> Tensor:
    """Return what one token's query (H, d) makes of keys (H_kv, n, d), before the softmax: (H, n)."""
    grouped = query.reshape(len(keys), -1, query.shape[-1])
    weights: Tensor = (grouped @ keys.transpose(1, 2) * scaling).flatten(0, 1)
    return weights


def attention_rows(
    layer: Any, text: Any, hidden: Tensor, positions: Tensor, rows: Tensor, window: int | None = None
) -> Tensor:
    """Return the attention (H, Q, n) float32 of some of n tokens (n, D), `rows` (Q,), in a layer of an LLM.

    Parameters
    ----------
    text : the LLM's configuration
    hidden : Tensor, (n, D)
        What enters the layer.
    positions : Tensor, (P, n), int64
    window : int, optional
        So many tokens, itself included, are seen back; None: all.
    """
    shape, attend = block_shape(text, layer), layer.self_attn
    x = layer.input_layernorm(at_home(hidden, layer))
    rows = rows.to(x.device)
    query = rotated(attend, "q", shape, x[rows], positions[:, rows.to(positions.device)])
    keys = rotated(attend, "k", shape, x, positions)
    back = rows[:, None] - torch.arange(len(x), device=x.device)  # (Q, n)
    later = (back < 0) if window is None else (back < 0) | (back >= window)
    found = [scores(query[:, i], keys, attend.scaling).masked_fill(later[i], -torch.inf) for i in range(len(rows))]
    return torch.stack(found, 1).softmax(-1)


def take(values: Tensor, table: Tensor, dim: int = 1) -> Tensor:
    """Return the entries of `values` (…, B, L, …) along `dim` that a table (B, L') names; −1 gives the first."""
    dim = dim % values.ndim
    index = table.clamp(min=0).to(values.device)
    shape = [1] * values.ndim
    shape[dim - 1], shape[dim] = index.shape
    target = list(values.shape)
    target[dim - 1], target[dim] = index.shape
    wide = values.expand(*[index.shape[0] if i == dim - 1 else s for i, s in enumerate(values.shape)])
    return wide.gather(dim, index.view(shape).expand(target))
