"""SparseVLM: in several steps through the LLM, keep what the relevant words attend to, and recycle some of the rest."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar

import torch
from torch import Tensor

from vidsieve.compressors._clustering import Distances, centres, peak_scores, totals
from vidsieve.compressors._stages import scaled_counts, scaled_layers
from vidsieve.compressors.base import LayerCompressor, check_layer
from vidsieve.errors import BudgetError, NeedError
from vidsieve.selection import exact_ratio, top_indices
from vidsieve.types import LayerView, Tokens

_LAYERS, _DEPTH = (3, 7, 16), 32
_TOKENS = 576
_TABLES = {
    1: {192: (300, 200, 110), 128: (303, 110, 36), 96: (238, 48, 26), 64: (66, 30, 17)},
    2: {192: (300, 200, 118), 128: (238, 108, 60), 96: (246, 54, 28), 64: (66, 34, 20)},
}
"""By version and mean over 32 layers: how many of 576 tokens the release keeps at each step."""
_HEADS = 14


@dataclass(frozen=True)
class SparseVLM(LayerCompressor):
    """After some layers, keep the tokens that the relevant words of the prompt attend to most in that layer.

    Words are relevant if they are more like the video than the average word behind it, by dot products of input
    embeddings. A token's score is the mean attention of these words, over all heads. Of what is dropped, the first
    version merges the better part into a few clusters of like hidden states, which go on.

    Parameters
    ----------
    version : {1, 2}
        1, the paper's; 2 (SparseVLM+), which merges nothing, reads the 14 heads that attend to the video most, and
        divides attention by what rotary positions alone would give it.
    layers : tuple of int or None
        The first layers that see fewer tokens; None: the release's 3, 7 and 16 of 32, scaled to the model's depth.
    kept : tuple of int or None
        Tokens kept at each step, clusters not counted, in ``"official"``; None: the release's table for R.
    earliest : bool
        Where R is less than the first layers alone see, drop at earlier layers instead of refusing; the trace says
        which.

    Variants: in ``"ours"`` R is the mean over all layers, clusters counted: the steps keep the proportions of the
    release's largest table and are scaled by one factor; a cluster stands at its densest token, and all tokens keep
    their positions. ``"official"`` has the release's tables, for R = 1/3, 2/9, 1/6 and 1/9, scaled from 576 tokens to
    the video's; clusters go behind the kept tokens, densest first, and version 1 numbers positions anew after every
    step, on models with one row of them. The noise of a millionth is left out. Version 2's division can blow up or turn
    negative over long distances, as in videos. The paper's adaptive ratio is in no release. There is no official port
    to video: here N is every token of a video, newlines excluded.

    References
    ----------
    SparseVLM, ICML 2025 (arXiv 2410.04417); Gumpest/SparseVLMs @ 26a5f488.
    """

    name: ClassVar[str] = "sparsevlm"
    paper: ClassVar[str] = "SparseVLM, ICML 2025"
    variants: ClassVar[tuple[str, ...]] = ("ours", "official")
    merges: ClassVar[bool] = True
    reads_text: ClassVar[bool] = True
    prepares: ClassVar[bool] = True
    version: int = 1
    layers: tuple[int, ...] | None = None
    kept: tuple[int, ...] | None = None
    earliest: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.version not in (1, 2):
            raise BudgetError(f"sparsevlm has versions 1 and 2, got {self.version!r}")
        for layer in self.layers or ():
            check_layer(layer)
        for counts in (self.layers, self.kept):
            if counts is not None and len(counts) != len(_LAYERS):
                raise BudgetError(f"sparsevlm has {len(_LAYERS)} steps, got {counts}")
        if self.layers is not None and list(self.layers) != sorted(set(self.layers)):
            raise BudgetError(f"layers are rising numbers, as {_LAYERS}, got {self.layers}")

    @property
    def renumbers(self) -> bool:
        """In the release's version 1."""
        return self.variant == "official" and self.version == 1

    @property
    def reorders(self) -> bool:
        """In the release's version 1: clusters go behind."""
        return self.renumbers

    @property
    def reads_bias(self) -> bool:
        """In version 2."""
        return self.version == 2

    def stages(self, num_layers: int, num_tokens: int) -> tuple[tuple[int, int], ...]:
        """Return (layer, tokens from there on) of every step; in the release's, clusters come on top."""
        ratio, wanted = exact_ratio(self.retention, num_tokens), self.layers or _LAYERS
        scale = Fraction(1) if self.layers is not None else Fraction(num_layers, _DEPTH)
        if self.earliest and ratio * num_layers < 2 * wanted[0] * scale:
            scale *= ratio * num_layers / (2 * wanted[0] * scale)
        layers = scaled_layers(wanted, scale, num_layers)
        if self.variant == "official":
            return tuple(zip(layers, self._table(num_tokens), strict=True))
        shares = [Fraction(count, _TOKENS) for count in _TABLES[self.version][192]]
        found = scaled_counts(shares, layers, num_layers, num_tokens, ratio, self.describe(), self.earliest)
        return tuple(zip(layers, found, strict=True))

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

    def prepare(self, video: Tensor, text: Tensor) -> Tensor:
        """Return which words (Q,) bool are relevant, from input embeddings (n, D) and (Q, D)."""
        return relevant_words(video, text)

    def choose(self, view: LayerView, keep: int) -> Tensor:
        """Return the tokens that stay, and those at which clusters stand."""
        best, clusters, _ = view.notes["parts"] = self._parts(view, self.scores(view), keep)
        chosen = torch.cat([best, clusters])
        return chosen if self.reorders else chosen.sort().values

    def merge(self, view: LayerView, chosen: Tensor) -> Tensor:
        """Return the hidden states of the tokens that stay, clusters as their means."""
        if view.hidden is None:
            raise NeedError("sparsevlm reads hidden states: hand over a view that has them")
        keep = len(chosen) if self.variant == "ours" else dict(self.stages(view.depth, view.history[0]))[view.layer]
        _, clusters, owner = view.notes.get("parts") or self._parts(view, self.scores(view), keep)
        made = view.hidden.clone()
        if len(clusters):
            members = (owner >= 0).nonzero().flatten()
            made[clusters] = cluster_means(view.hidden[members], owner[members], len(clusters)).to(made.dtype)
        return made[chosen.to(made.device)]

    def scores(self, view: LayerView) -> Tensor:
        """Return the mean attention of the relevant words to each token, (n,)."""
        attention, words = view.text_attention, view.told
        if attention is None or words is None:
            raise NeedError("sparsevlm reads the attention of the text behind the video")
        words = words.to(attention.device)
        if not bool(words.any()):  # all words alike: none stands out
            words = torch.ones_like(words)
        attention = attention[:, words]
        if self.version == 2:
            if view.rope_bias is None:
                raise NeedError("version 2 of sparsevlm divides attention by what rotary positions give: it is missing")
            attention = attention / view.rope_bias[words].to(attention)
            heads = top_indices(attention.sum((1, 2)), min(_HEADS, len(attention)))
            attention = attention[heads]
        return attention.mean(0).mean(0)

    def _best(self, count: int, keep: int) -> int:
        """Return how many of `count` tokens stay as they are, so that with clusters there are `keep`."""
        best = keep
        while self.version == 1 and best and best + cluster_count(count - best) > keep:
            best -= 1
        return best

    def _parts(self, view: LayerView, scores: Tensor, keep: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return the best tokens (k,) sorted, where clusters stand (c,) densest first, and owners (n,), −1 without."""
        count = len(scores)
        owner = torch.full((count,), -1, dtype=torch.int64, device=scores.device)
        if self.variant == "official":
            best = top_indices(scores, min(keep, count - 1))
        elif keep >= count:
            return torch.arange(count, device=scores.device), owner[:0], owner
        else:
            best = top_indices(scores, self._best(count, keep))
        if self.version == 2:
            return best, owner[:0], owner
        rest = torch.ones_like(owner, dtype=torch.bool).index_fill(0, best, False).nonzero().flatten()
        number = cluster_count(len(rest))
        if self.variant == "ours":
            number = keep - len(best)
        if view.hidden is None:
            raise NeedError("sparsevlm reads hidden states: hand over a view that has them")
        recycled = rest[top_indices(scores[rest], recycled_count(len(rest)))]
        distance = Distances.of(view.hidden[recycled.to(view.hidden.device)])
        chosen = centres(peak_scores(distance, number), number)
        owner[recycled] = distance.nearest(chosen).to(owner.device)
        chosen = chosen.to(recycled.device)
        return best, recycled[chosen], owner


def cluster_means(tokens: Tensor, owner: Tensor, count: int) -> Tensor:
    """Return (c, D) float32: the sum of each cluster's tokens (n, D), owners (n,), over their number + a millionth."""
    total, members = totals(tokens, owner, count)
    return total / (members + 1e-6)


def relevant_words(video: Tensor, text: Tensor) -> Tensor:
    """Return which words (Q,) bool get more than the mean of softmax over words of video · text, meant over tokens."""
    shares = (video.float() @ text.float().T).softmax(1).mean(0)
    return shares > shares.mean()


def recycled_count(dropped: int) -> int:
    """Return how many of `dropped` tokens are merged instead."""
    return min(int(dropped * 0.3) + 1, dropped)


def cluster_count(dropped: int) -> int:
    """Return into how many clusters."""
    return int((int(dropped * 0.3) + 1) / 10) + 1
