"""DyCoke: drop tokens that repeat between frames; while decoding, read those that the newest token attends to."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from vidsieve.compressors.base import within
from vidsieve.compressors.inside import DecodeCompressor, DecodeView
from vidsieve.errors import BudgetError
from vidsieve.selection import even_counts, top_indices, top_indices_per_frame
from vidsieve.types import Selection, Stage, TokenGrid, Tokens, VideoTokens

_LAYER = 3
_PART = 32
"""Tokens of each of four frames that are made float32 at once."""
_ROUNDING = 1e-6
"""By how much the cosine of two equal tokens may miss 1."""


@dataclass(frozen=True)
class DyCoke(DecodeCompressor):
    """Keep every fourth frame and the tokens of the others that differ most; decode from the most attended tokens.

    Before the LLM, a token of frames 4i + 1 and 4i + 3 is compared (cosine) with the same place one frame earlier, of
    frame 4i + 2 with frame 4i, and the least similar stay. At every step of decoding, layers from `layer` on read only
    the ``1 − dropped`` of the cached video tokens that the newest token attends to most in the layer before; while that
    attention stays alike, the choice stays.

    Parameters
    ----------
    layer : int or None
        The first layer that reads fewer tokens while decoding. None: the release's 3, or the next that an LLM
        with other layers than full attention lets it use; of the layers from there on, those with it read fewer.
    dropped : float
        Share of the cached video tokens that are not read (release's evaluation: 0.8; its README says 0.7).
    similarity : float
        Least cosine to the attention of the previous step for the choice to stay (0.9).
    inner : bool
        Run the part inside the LLM. Without it the method acts before the LLM only.

    Variants: ``"ours"`` keeps exactly ⌊R·N⌋ tokens, the same number of each compared frame to within one; R cannot go
    below the share of the whole frames. In ``"official"`` R is 1 − k of the release: ⌊R·H·W⌋ tokens of a compared frame
    stay, five frames or more are needed, and where attention stays alike all tokens are read; given a count, it selects
    as ``"ours"``. The cache itself is never shortened. ``docs/methods/dycoke.md`` lists the other differences from the
    release.

    References
    ----------
    DyCoke, CVPR 2025 (arXiv 2411.15024); KD-TAO/DyCoke @ dd74634.
    """

    name: ClassVar[str] = "dycoke"
    paper: ClassVar[str] = "DyCoke, CVPR 2025"
    variants: ClassVar[tuple[str, ...]] = ("ours", "official")
    retention: float | Tokens = 0.5
    layer: int | None = within(None, "[1, inf)")
    dropped: float = within(0.8, "[0, 1)")
    similarity: float = within(0.9, "[-1, 1]")
    inner: bool = True

    @property
    def acts(self) -> Stage:
        """While decoding; before the LLM where `inner` is off."""
        return Stage.DECODE if self.inner else Stage.PRE_LLM

    def budget(self, video: VideoTokens) -> int:
        """Return K.

        Raises
        ------
        BudgetError
            Below the share of the frames that stay whole, or under ``"official"`` for fewer than five frames.
        """
        frames, size = video.grid.frames, video.grid.per_frame
        if self._released and self.retention != 1.0:
            if frames < 5:
                raise BudgetError(f"the release of dycoke needs five frames or more, got {frames}: use variant 'ours'")
            return len(official_tokens(video.grid, None, self.budget_ratio(video.num_tokens)))
        return self.budget_above(video, -(-frames // 4) * size, "every fourth frame stays whole")

    @property
    def _released(self) -> bool:
        """True if tokens are counted as in the release."""
        return self.variant == "official" and not isinstance(self.retention, Tokens)

    def _select(self, video: VideoTokens, budget: int, generator: Generator) -> Selection:
        if self._released:
            chosen = official_tokens(video.grid, video.embeds, self.budget_ratio(video.num_tokens))
            return Selection(chosen.sort().values)
        grid, frames = video.grid, video.grid.frames
        compared = torch.arange(frames) % 4 != 0
        counts = torch.full((frames,), grid.per_frame)
        left = budget - int((~compared).sum()) * grid.per_frame
        counts[compared] = even_counts(left, int(compared.sum()))
        scores = -similarities(video.embeds.reshape(frames, grid.per_frame, -1))
        return Selection(top_indices_per_frame(scores.flatten(), grid, counts), scores=scores.flatten())

    def first_layer(self, num_layers: int) -> int:
        """Return the first layer that reads fewer tokens."""
        return self.placed(self.layer, _LAYER, num_layers)

    def read(self, view: DecodeView, before: DecodeView | None) -> Tensor | None:
        """Return the tokens of the highest mean attention, or those of the step before."""
        official = self.variant == "official"
        attention = view.attention.mean(0)
        last = len(attention) - 1
        if official:
            attention = attention[:last]
        if before is not None:
            earlier = before.attention.mean(0)[: len(attention)]
            if float(F.cosine_similarity(attention, earlier, dim=0)) >= self.similarity:
                return None if official else before.read
        if not official:
            count = math.floor(len(attention) * (1 - Fraction(repr(float(self.dropped)))))
            return top_indices(attention, max(1, count))
        chosen = top_indices(attention, int(len(attention) * (1 - self.dropped)))
        return torch.cat([chosen, torch.tensor([last], device=chosen.device)])


def similarities(frames: Tensor) -> Tensor:
    """Return the cosine (T, n) float32 of each token of frames (T, n, D) to the one it is compared with.

    Frames 4i are compared with nothing and get −1, so that they come first where the least similar stay. What is 1 up
    to rounding is 1, so that of equal tokens the first stay.
    """
    cosines = torch.full(frames.shape[:2], -1.0, device=frames.device)
    for first in range(0, len(frames), 4):
        reference = [0, 0, 2][: len(frames) - first - 1]
        for start in range(0, frames.shape[1], _PART):
            values = frames[first : first + 4, start : start + _PART].detach().float()
            lengths = torch.linalg.vector_norm(values, dim=-1).clamp(min=1e-8)
            for frame, of in enumerate(reference, start=1):
                cosine = (values[frame] * values[of]).sum(-1) / (lengths[frame] * lengths[of])
                cosines[first + frame, start : start + _PART] = cosine
    return cosines.masked_fill(cosines > 1 - _ROUNDING, 1.0)


def official_tokens(grid: TokenGrid, embeds: Tensor | None, ratio: float) -> Tensor:
    """Return the raster indices (K,) int64 that the release keeps of a video, in its own order.

    Parameters
    ----------
    grid : TokenGrid
        Of more than four frames.
    embeds : Tensor or None, (N, D)
        None gives K meaningless indices: their number depends on the grid alone.
    ratio : float
        1 − k.
    """
    size = grid.per_frame
    kept = int((1 - (1 - ratio)) * size)  # the release subtracts k from 1 in floating point
    frames = None if embeds is None else embeds.reshape(grid.frames, size, -1)

    def least(frame: int, reference: int) -> Tensor:
        if frames is None:
            return torch.arange(kept) + frame * size
        likeness = F.cosine_similarity(frames[frame], frames[reference], dim=-1)
        return likeness.sort(stable=True).indices[:kept] + frame * size

    device = None if embeds is None else embeds.device
    parts: list[Tensor] = []
    for frame in range(grid.frames // 2 * 2):
        if frame % 2:
            parts.append(least(frame, frame - 1))
        elif frame % 4 == 2 and frame - 2 < grid.frames - 4:
            parts.append(least(frame, frame - 2))
        else:
            parts.append(torch.arange(size, device=device) + frame * size)
    return torch.cat(parts)
