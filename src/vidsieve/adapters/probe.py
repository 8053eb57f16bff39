"""Signals of the vision encoder: attention and keys of one block, recorded while it encodes, nothing else kept.

For the length of a call the tower's attention runs through a function that calls torch's fused attention, whichever the
tower used, and notes queries and keys of one module; the tower's output is the same but for rounding. Attention is then
computed frame by frame.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vidsieve.adapters.transformers_api import attention_through, fused_attention
from vidsieve.errors import NeedError
from vidsieve.types import EncoderOutputs

_NAME = "vidsieve_probe"
_QUERIES = 512
"""Queries whose attention is computed at a time."""
Note = tuple[Tensor, Tensor, float, Tensor | None]
"""Queries and keys (F, H, n, d) of a call, the scale, and which patches (F, n) bool are no padding; None: all."""
_listening: dict[int, list[Note]] = {}
"""By id of an attention module: the arguments of its calls, while it is listened to."""


def _probe(module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any = None, **kwargs: Any) -> Any:
    notes = _listening.get(id(module))
    if notes is not None:
        scaling = kwargs.get("scaling")
        scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
        real = None if attention_mask is None else attention_mask[:, 0].any(1)  # a tower's mask hides padding alone
        notes.append((query.detach(), key.detach(), scale, real))
    return fused_attention(module, query, key, value, attention_mask, **kwargs)


def attention_modules(tower: Any) -> list[Any]:
    """Return the attention modules of a vision tower, in the order of its blocks."""
    named = [module for module in tower.modules() if type(module).__name__.endswith("Attention")]
    return [module for module in named if any(hasattr(module, name) for name in ("q_proj", "qkv", "q"))]


@contextmanager
def listening(config: Any, module: Any) -> Iterator[list[Note]]:
    """Note every call of one attention module of a tower.

    Parameters
    ----------
    config : the tower's configuration, whose attention implementation is swapped until the block ends
    module : the attention module
    """
    notes: list[Note] = []
    _listening[id(module)] = notes
    try:
        with attention_through(config, _NAME, _probe):
            yield notes
    finally:
        del _listening[id(module)]


def received(
    query: Tensor, key: Tensor, scale: float, real: Tensor | None = None, *, cls_token: bool
) -> tuple[Tensor, Tensor]:
    """Return the attention each key gets (F, n) float32 and the keys averaged over heads (F, n, d).

    With a class token (the first), its row, averaged over heads, without itself; otherwise the mean over queries and
    heads. A frame and some of its queries at a time: a whole matrix of a large frame has gigabytes.

    Parameters
    ----------
    query, key : Tensor, (F, H, n, d)
        Several heads of queries may share one of keys.
    real : Tensor, (F, n), bool, optional
        False on padding, which neither gives attention nor gets any; default: there is none.
    """
    first = int(cls_token)
    rows = []
    for frame, (q, k) in enumerate(zip(query.float(), key.float(), strict=True)):
        there = slice(None) if real is None else real[frame]
        q, k = q[:, there], k.repeat_interleave(len(q) // len(k), 0)[:, there]
        asking = q[:, :1] if cls_token else q
        total = q.new_zeros(q.shape[1])
        for some in asking.split(_QUERIES, 1):
            total += (some @ k.transpose(1, 2) * scale).softmax(-1).sum((0, 1))
        row = total.new_zeros(key.shape[2])
        row[there] = total / (asking.shape[0] * asking.shape[1])
        rows.append(row[first:])
    return torch.stack(rows), key.mean(1)[:, first:]


def block_mean(values: Tensor, side: int, size: int) -> Tensor:
    """Return (F, (side/size)², C): the mean of each size×size block of patches (F, side², C), raster order."""
    frames, _, channels = values.shape
    small = side // size
    return values.reshape(frames, small, size, small, size, channels).mean((2, 4)).reshape(frames, -1, channels)


@dataclass(frozen=True)
class Signals:
    """Signals of every token that was encoded, in order: attention (M,) float32 and keys (M, d)."""

    attention: Tensor
    keys: Tensor

    def at(self, frames: Tensor, size: int) -> Signals:
        """Return the signals of `frames` (F,) int64, numbers among those that were encoded, of `size` tokens each."""
        rows = (frames[:, None] * size + torch.arange(size)).flatten().to(self.keys.device)
        return Signals(self.attention[rows], self.keys[rows])

    def part(self, start: int, count: int) -> EncoderOutputs:
        """Return the signals of `count` tokens from `start` on."""
        return EncoderOutputs(self.attention[start : start + count], self.keys[start : start + count])


def signals(notes: list[Note], cls_token: bool, pool: Callable[[list[Tensor]], Tensor]) -> Signals:
    """Return the signals of one encoding from its notes; `pool` maps (F, n, C) a call to (M, C) LLM tokens.

    Raises
    ------
    NeedError
        If nothing was noted, because ready features were handed over.
    """
    if not notes:
        raise NeedError("signals of the vision encoder need the video's pixels; ready features do not carry them")
    parts = [received(*note, cls_token=cls_token) for note in notes]
    attention = pool([weights[..., None] for weights, _ in parts])[:, 0]
    return Signals(attention.float(), pool([keys for _, keys in parts]))
