"""How many rollouts go into one prefill: as a setting says, as memory allows, or half of what did not fit."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from vidsieve.adapters.transformers_api import is_eager
from vidsieve.errors import TrainingError

Item = TypeVar("Item")
Result = TypeVar("Result")

CPU_TOKENS = 2048
"""Beyond so many tokens a prefill on the CPU answers no more rollouts per second (benchmarks/rollouts.py)."""
GPU_TOKENS = 65536
"""Where a GPU begins; what does not fit is halved."""
CPU_SHARE = 4
"""A prefill on the CPU may take one part in so many of the machine's memory."""


@dataclass(frozen=True)
class Footprint:
    """Bytes that a prefill under `no_grad` holds at once, estimated from a model's configuration.

    Without gradients and without a cache one layer's activations replace those of the layer before.

    Parameters
    ----------
    token : int
        A token's hidden states and the widest activations of one layer.
    pair : int
        A query and a key: the mask, and under eager attention the scores of every head.
    logits : int
        A position's logits over the vocabulary, and two float32 copies for log-probabilities.
    cached : int
        A token's keys and values in all layers, where a cache is kept.
    """

    token: int
    pair: int
    logits: int
    cached: int

    @classmethod
    def of(cls, model: Any) -> Footprint:
        """Return the footprint of a transformers model."""
        text, size = model.config.get_text_config(), torch.finfo(model.dtype).bits // 8
        heads = text.num_attention_heads
        head = getattr(text, "head_dim", None) or text.hidden_size // heads
        scores = 2 * heads if is_eager(text) else 0
        return cls(
            token=size * (8 * text.hidden_size + 3 * text.intermediate_size),
            pair=size * (1 + scores),
            logits=text.vocab_size * (size + 8),
            cached=2 * size * text.num_hidden_layers * text.num_key_value_heads * head,
        )

    def rollout(self, length: int, positions: int = 1, cache: bool = False) -> int:
        """Return the bytes of one rollout of `length` tokens with logits at so many positions."""
        per_token = self.token + (self.cached if cache else 0)
        return length * per_token + length * length * self.pair + positions * self.logits


class Packing:
    """Most rollouts in one prefill; one object serves all prompts of a run and remembers what did not fit.

    On the CPU its size depends on the model and on the machine's total memory alone, never on what is free at the
    moment: float results differ in their last bits between shapes of a batch, and a run shall repeat. On a GPU it
    begins large and halves when memory runs out.

    Parameters
    ----------
    model : the transformers model
    tokens : int
        Most tokens, padding included, in one prefill; 0 = found.
    """

    def __init__(self, model: Any, tokens: int = 0) -> None:
        self.device, self.footprint = model.device, Footprint.of(model)
        self.bytes = math.inf
        gpu = self.device.type == "cuda"
        self.tokens = tokens or (GPU_TOKENS if gpu else CPU_TOKENS)
        if not tokens:
            self.bytes = (
                torch.cuda.get_device_properties(self.device).total_memory if gpu else total_memory() // CPU_SHARE
            )

    def rows(self, length: int, positions: int = 1, cache: bool = False) -> int:
        """Return how many rollouts go into one prefill, at least 1; arguments as `Footprint.rollout`."""
        fitting = min(self.tokens // length, self.bytes / self.footprint.rollout(length, positions, cache))
        return max(1, math.floor(fitting))

    def run(
        self,
        items: Sequence[Item],
        work: Callable[[Sequence[Item]], Result],
        length: int,
        positions: int = 1,
        cache: bool = False,
    ) -> list[Result]:
        """Return what `work` makes of the items, packing after packing; each halved until it fits.

        Raises
        ------
        TrainingError
            If a single rollout does not fit.
        """
        results: list[Result] = []
        start = 0
        while start < len(items):
            some = items[start : start + self.rows(length, positions, cache)]
            try:
                results.append(work(some))
            except torch.cuda.OutOfMemoryError:
                fits = False
            else:
                fits = True
            if fits:
                start += len(some)
                continue
            # Outside the handler: the error holds the frames, and with them the tensors that filled the memory.
            if len(some) == 1:
                raise TrainingError(
                    f"a single rollout of {length} tokens with {positions} positions of logits does not fit into the "
                    f"memory of {self.device}: take fewer frames a video, keep fewer tokens (ratio, rate_high), or "
                    "shorten the caption; rollout_tokens cannot help"
                )
            self.bytes = len(some) * self.footprint.rollout(length, positions, cache) / 2
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
        return results

    def record(self) -> dict[str, int | None]:
        """Return the bounds on a prefill as they are now: tokens, and bytes by the estimate (None: no bound)."""
        return {"tokens": self.tokens, "bytes": None if self.bytes == math.inf else int(self.bytes)}


def total_memory() -> int:
    """Return the bytes of memory that this machine, or the container around us, has; 8 GiB where nothing says."""
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # not on Windows
        total = 8 * 2**30
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text().strip() if os.path.isfile(limit) else ""
    return min(total, int(text)) if text.isdigit() else total
