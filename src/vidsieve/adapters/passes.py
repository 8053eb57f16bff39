"""What hooks on decoder layers share: whose pass it is, which mask its attention takes, where a layer is at home."""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import Tensor


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


def is_flash(text: Any) -> bool:
    """Return whether an LLM runs flash attention, which takes masks (B, k) or none."""
    return "flash" in str(text._attn_implementation)


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
