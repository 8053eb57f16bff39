"""VisionZip: keep the tokens of a frame that the encoder attends to most, merge the rest into a few context tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Generator, Tensor

from vidsieve.compressors._clustering import totals
from vidsieve.compressors.base import Compressor, encoder_attention, within
from vidsieve.selection import even_counts, other_indices, top_indices
from vidsieve.types import ENCODER_NEEDS, Need, Selection, VideoTokens


@dataclass(frozen=True)
class VisionZip(Compressor):
    """Per frame, keep the tokens with the most attention in the encoder, and merge the others by their keys.

    The kept ones are dominant tokens. Evenly spaced ones of the others are contextual tokens, into which those of
    nearest keys (cosine) are merged. Blind to the question.

    Parameters
    ----------
    contextual : float
        Share of a frame's budget that goes to contextual tokens (paper: 10 of 64).

    Variants: ``"ours"`` merges to the mean of a contextual token and its members; ``"official"`` to the token plus the
    mean of its members, as the release does. The release is for single images; here each frame is one, with an even
    share of the budget. ``docs/methods/visionzip.md`` lists the other differences.

    References
    ----------
    VisionZip, CVPR 2025 (arXiv 2412.04467); dvlab-research/VisionZip @ 3151f6df.
    """

    name: ClassVar[str] = "visionzip"
    paper: ClassVar[str] = "VisionZip, CVPR 2025"
    needs: ClassVar[frozenset[Need]] = ENCODER_NEEDS
    variants: ClassVar[tuple[str, ...]] = ("ours", "official")
    contextual: float = within(10 / 64, "[0, 1)")

    def _select(self, video: VideoTokens, budget: int, generator: Generator) -> Selection:
        attention, size = encoder_attention(video), video.grid.per_frame
        assert video.encoder is not None and video.encoder.keys is not None  # by `needs`
        keys = video.encoder.keys.to(attention.device)
        counts = even_counts(budget, video.grid.frames).tolist()
        embeds, indices, rows = video.embeds, [], []
        for frame, count in enumerate(counts):
            if not count:
                continue
            part = slice(frame * size, (frame + 1) * size)
            contextual = min(count - 1, round(self.contextual * count))
            kept, targets, owner = zipped(attention[part], keys[part], count - contextual, contextual)
            merged = merge(embeds[part], targets, owner, doubled=self.variant == "official")
            own = torch.cat([kept, targets])
            order = own.argsort()
            indices.append(own[order] + frame * size)
            rows.append(torch.cat([embeds[part][kept], merged])[order])
        return Selection(torch.cat(indices), torch.cat(rows), scores=attention)


def zipped(attention: Tensor, keys: Tensor, dominant: int, contextual: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return one frame's dominant tokens, its contextual tokens, and the owner of each of the others.

    Parameters
    ----------
    attention : Tensor, (n,), and keys : Tensor, (n, d)

    Returns
    -------
    dominant : Tensor, (dominant,), int64, sorted
    targets : Tensor, (contextual,), int64, sorted
    owner : Tensor, (n,), int64
        Number of the contextual token that each other token joins; −1 for dominant and contextual ones.
    """
    chosen = top_indices(attention, dominant)
    owner = torch.full_like(attention, -1, dtype=torch.int64)
    rest = other_indices(chosen, len(attention))
    if not contextual:
        return chosen, rest[:0], owner
    step = max(1, len(rest) // contextual)
    targets = rest[: step * contextual : step]
    others = rest[~torch.isin(rest, targets)]
    # The release divides by the norm as it is; a key of zeros has no direction and joins the first.
    keys = keys.float()
    unit = keys / keys.norm(dim=-1, keepdim=True).clamp(min=1e-30)
    owner[others] = (unit[others] @ unit[targets].T).argmax(1)
    return chosen, targets, owner


def merge(embeds: Tensor, targets: Tensor, owner: Tensor, doubled: bool) -> Tensor:
    """Return the contextual tokens (b, D) of one frame's embeds (n, D).

    The mean of a token and its members; or, `doubled`, the token plus the mean of its members.
    """
    members = owner >= 0
    total, count = totals(embeds[members], owner[members], len(targets))
    own = embeds[targets].float()
    merged = own + total / count.clamp(min=1) if doubled else (own + total) / (count + 1)
    return merged.to(embeds.dtype)
