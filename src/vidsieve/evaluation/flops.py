"""Floating-point operations of an LLM's prefill: the papers' formula, and a count of what its layers do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vidsieve.adapters.transformers_api import head_sizes, mlp_width


def paper_flops(text: Any, tokens: int) -> float:
    """Return T·(4nd² + 2n²d + 2ndm), as CaCoVID and others count (its section on complexity).

    Every multiplication with its addition counts once, keys and values are as wide as queries, the MLP has two
    matrices, and the head is left out.

    Parameters
    ----------
    text : the LLM's configuration
    tokens : n, of the whole prompt
    """
    d, m, n = text.hidden_size, mlp_width(text), tokens
    return float(text.num_hidden_layers * (4 * n * d**2 + 2 * n**2 * d + 2 * n * d * m))


def prefill_flops(text: Any, tokens: int | Sequence[int]) -> float:
    """Return the operations of all matrix products in a prefill, a multiplication and an addition counted as two.

    Grouped keys and values, three matrices in the MLP (SwiGLU), the causal half of attention, and the head for the
    last token alone.

    Parameters
    ----------
    text : the LLM's configuration
    tokens : of the whole prompt; or one number a layer, where methods drop tokens inside the LLM
    """
    d, m, heads = text.hidden_size, mlp_width(text), text.num_attention_heads
    counts = [tokens] * text.num_hidden_layers if isinstance(tokens, int) else list(tokens)
    total = 2.0 * d * text.vocab_size
    for n, (size, shared) in zip(counts, head_sizes(text), strict=True):
        query, value = heads * size, shared * size
        total += 2 * n * (d * (query + 2 * value) + query * d + 3 * d * m)
        total += 2 * n * (n + 1) * query  # scores and their sums: 2 products of n·(n + 1)/2 pairs
    return float(total)
