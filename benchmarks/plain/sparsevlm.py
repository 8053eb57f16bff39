"""SparseVLM: rows of text raters of a layer's whole attention, clusters of what goes (Gumpest/SparseVLMs)."""

from __future__ import annotations

from torch import Tensor

from plain._shared import density_peaks


def raters(video: Tensor, text: Tensor) -> Tensor:
    """Return which words (Q,) are relevant, from embeddings (n, D) and (Q, D)."""
    weights = (video @ text.T).softmax(1).mean(0)
    return (weights > weights.mean()).nonzero().flatten()


def select(attention: Tensor, start: int, length: int, words: Tensor, keep: int) -> tuple[Tensor, Tensor]:
    """Return the scores (n,) and the kept places, sorted, from whole attention (H, L, L) and the raters' columns."""
    scores = attention.mean(0)[words, start : start + length].mean(0)
    return scores, scores.topk(keep).indices.sort().values


def clusters(tokens: Tensor, count: int) -> Tensor:
    """Return the sums of every cluster of tokens (n, D) over their number + 1e-6, (count, D)."""
    _, cluster = density_peaks(tokens, count, count)
    weights = tokens.new_zeros(count, 1).index_add_(0, cluster, tokens.new_ones(len(tokens), 1)) + 1e-6
    shares = 1 / weights[cluster]
    return tokens.new_zeros(count, tokens.shape[1]).index_add_(0, cluster, tokens * shares)
