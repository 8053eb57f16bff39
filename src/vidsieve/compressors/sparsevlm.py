"""SparseVLM: in several steps, keep the tokens that relevant words attend to, and recycle some of the others."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar

import torch
from torch import Tensor

from vidsieve.compressors._budgets import check_layers, scaled_counts, scaled_layers
from vidsieve.compressors._clustering import Distances, centres, peak_scores, totals
from vidsieve.compressors.inside import LayerChoice, LayerCompressor, LayerView
from vidsieve.errors import BudgetError
from vidsieve.selection import exact_ratio, other_indices, top_indices
from vidsieve.types import Tokens

_LAYERS, _DEPTH = (3, 7, 16), 32
_TOKENS = 576
_TABLES = {
    1: {192: (300, 200, 110), 128: (303, 110, 36), 96: (238, 48, 26), 64: (66, 30, 17)},
    2: {192: (300, 200, 118), 128: (238, 108, 60), 96: (246, 54, 28), 64: (66, 34, 20)},
}
"""By version and mean over 32 layers: tokens of 576 that the release keeps at each step."""
_HEADS = 14
_PART = 1024
"""Tokens that are compared to the words at once."""


@dataclass(frozen=True)
class SparseVLM(LayerCompressor):
    """After some layers, keep the tokens that the relevant words of the prompt attend to most in that layer.

    Words are relevant if they are more similar to the video than the average word behind it, by dot products of input
    embeddings. A token's score is the mean attention of these words, over all heads. Version 1 merges the better part
    of the dropped tokens into a few clusters of similar hidden states, which go on.

    Parameters
    ----------
    version : {1, 2}
        1, the paper's; 2 (SparseVLM+), which merges nothing, reads the 14 heads that attend to the video most, and
        divides attention by the scores of rotary positions alone.
    layers : tuple of int or None
        The first layers that see fewer tokens; None: the release's 3, 7 and 16 of 32, scaled to the model's depth,
        each or the next that an LLM with other layers than full attention lets it use.
    kept : tuple of int or None
        Tokens kept at each step, clusters not counted, in ``"official"``; None: the release's table for R.
    earliest : bool
        Where R is less than the first layers alone see, drop at earlier layers instead of raising an error; the trace
        names them.

    Variants: in ``"ours"`` R is the mean over all layers, clusters counted: the steps keep the proportions of the
    release's largest table, scaled by one factor. ``"official"`` has the release's tables, for R = 1/3, 2/9, 1/6 and
    1/9, scaled from 576 tokens to the video's; clusters come on top and go behind the kept tokens, densest first, and
    version 1 counts positions anew. ``docs/methods/sparsevlm.md`` lists the other differences from the release.

    References
    ----------
    SparseVLM, ICML 2025 (arXiv 2410.04417); Gumpest/SparseVLMs @ 26a5f488.
    """

    name: ClassVar[str] = "sparsevlm"
    paper: ClassVar[str] = "SparseVLM, ICML 2025"
    variants: ClassVar[tuple[str, ...]] = ("ours", "official")
    version: int = 1
    layers: tuple[int, ...] | None = None
    kept: tuple[int, ...] | None = None
    earliest: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.version not in (1, 2):
            raise BudgetError(f"sparsevlm has versions 1 and 2, got {self.version!r}")
        check_layers(self.layers, _LAYERS)
        for counts in (self.layers, self.kept):
            if counts is not None and len(counts) != len(_LAYERS):
                raise BudgetError(f"sparsevlm has {len(_LAYERS)} steps, got {counts}")

    def stages(self, num_layers: int, num_tokens: int) -> tuple[tuple[int, int], ...]:
        """Return (layer, tokens from there on) of every step; in the release's, clusters come on top."""
        ratio, wanted = exact_ratio(self.retention, num_tokens), self.layers or _LAYERS
        scale = Fraction(1) if self.layers is not None else Fraction(num_layers, _DEPTH)
        if self.earliest and ratio * num_layers < 2 * wanted[0] * scale:
            scale *= ratio * num_layers / (2 * wanted[0] * scale)
        layers = scaled_layers(wanted, scale, num_layers, None if self.layers and scale == 1 else self)
        if self.variant == "official":
            return tuple(zip(layers, self._table(num_tokens), strict=True))
        shares = [Fraction(count, _TOKENS) for count in _TABLES[self.version][192]]
        counts = scaled_counts(shares, layers, num_layers, num_tokens, ratio, self)
        return tuple(zip(layers, counts, strict=True))

    def _table(self, num_tokens: int) -> tuple[int, ...]:
        if self.kept is not None:
            return self.kept
        share = self.budget_ratio(num_tokens)
        nearest = min(_TABLES[self.version], key=lambda mean: abs(mean / _TOKENS - share))
        if isinstance(self.retention, Tokens) or abs(nearest / _TOKENS - share) > 0.005:
            raise BudgetError(
                f"the release of sparsevlm has tables for retentions of 0.333, 0.222, 0.167 and 0.111, got "
                f"{self.retention}: give `kept`, or use variant 'ours'"
            )
        return tuple(max(1, count * num_tokens // _TOKENS) for count in _TABLES[self.version][nearest])

    def step(self, view: LayerView, keep: int) -> LayerChoice:
        """Return the tokens with the best scores, and those at which clusters of the recycled rest stand."""
        scores = self.scores(view)
        count, ours = len(scores), self.variant == "ours"
        if ours and keep >= count:
            return LayerChoice(torch.arange(count, device=scores.device))
        best = top_indices(scores, self._best(count, keep) if ours else min(keep, count - 1))
        if self.version == 2:
            return LayerChoice(best)
        rest = other_indices(best, count)
        recycled = rest[top_indices(scores[rest], recycled_count(len(rest)))]
        states = view.hidden[recycled.to(view.hidden.device)]
        distance = Distances.of(states)
        number = keep - len(best) if ours else cluster_count(len(rest))
        peaks = centres(peak_scores(distance, number), number)
        chosen = torch.cat([best, recycled[peaks.to(recycled.device)]])
        means = cluster_means(states, distance.nearest(peaks), number).to(states.dtype)
        hidden = torch.cat([view.hidden[best.to(states.device)], means])
        kept, order = chosen.sort()
        return LayerChoice(kept, hidden[order.to(hidden.device)], None if ours else chosen)

    def scores(self, view: LayerView) -> Tensor:
        """Return the mean attention (n,) from the relevant words to each token."""
        attention = view.attention("text", view.layer - 1)
        words = relevant_words(view.video, view.text).to(attention.device)
        if not bool(words.any()):  # all words are alike: none stands out
            words = torch.ones_like(words)
        attention = attention[:, words]
        if self.version == 2:
            attention = attention / view.rope_bias[words].to(attention)
            heads = top_indices(attention.sum((1, 2)), min(_HEADS, len(attention)))
            attention = attention[heads]
        return attention.mean(0).mean(0)

    def _best(self, count: int, keep: int) -> int:
        """Return the number of tokens, among `count`, that stay unchanged, so that with clusters there are `keep`."""
        best = keep
        while self.version == 1 and best and best + cluster_count(count - best) > keep:
            best -= 1
        return best


def cluster_means(tokens: Tensor, owner: Tensor, count: int) -> Tensor:
    """Return the sum (c, D) float32 of each cluster's tokens (n, D), by owner (n,), over their number + a millionth."""
    total, members = totals(tokens, owner, count)
    return total / (members + 1e-6)


def relevant_words(video: Tensor, text: Tensor) -> Tensor:
    """Return the mask (Q,) bool of words with more than the average share of video tokens' similarity.

    Shares are a softmax over words of dot products between `video` (n, D) and `text` (Q, D), averaged over tokens.
    """
    words = text.float().T
    shares = torch.cat([(part.float() @ words).softmax(1) for part in torch.split(video, _PART)]).mean(0)
    return shares > shares.mean()


def recycled_count(dropped: int) -> int:
    """Return the number of tokens, among `dropped`, that are merged instead."""
    return min(int(dropped * 0.3) + 1, dropped)


def cluster_count(dropped: int) -> int:
    """Return the number of clusters that tokens recycled from `dropped` are merged into."""
    return int((int(dropped * 0.3) + 1) / 10) + 1
