"""Density peaks (DPC-kNN), which FastVID, HoliTom and PruneVID share: which tokens are centres, and of what."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Group:
    """Tokens that share a part of the budget: the static ones of a window of frames, or the others of one frame.

    Parameters
    ----------
    places : Tensor, (n,), int64
        Raster indices; of static ones in the window's first frame.
    tokens : Tensor, (n, D)
        Static ones are means over the window.
    length : int
        Frames of the window where they are static, else 0.
    """

    places: Tensor
    tokens: Tensor
    length: int


def distances(tokens: Tensor) -> Tensor:
    """Return (n, n) float32: Euclidean distances of tokens (n, D) over √D."""
    found: Tensor = torch.cdist(tokens.float(), tokens.float()) / tokens.shape[-1] ** 0.5
    return found


def peak_scores(distance: Tensor, neighbours: int, noise: Tensor | None = None) -> Tensor:
    """Return (n,) float32: density times the distance to the nearest denser token; centres have the highest.

    Density is exp of minus the mean squared distance to the `neighbours` nearest tokens, itself among them; the densest
    token gets the largest distance of all.

    Parameters
    ----------
    distance : Tensor, (n, n)
    noise : Tensor or None, (n,)
        Uniform noise of [0, 1), of which releases add a millionth to break ties; None adds nothing.
    """
    nearest = distance.topk(min(neighbours, len(distance)), largest=False).values
    density = (-nearest.square().mean(1)).exp()
    if noise is not None:
        density = density + noise * 1e-6
    denser = density[None, :] > density[:, None]
    apart = torch.where(denser, distance, distance.max()).amin(1)
    return apart * density


def centres(scores: Tensor, count: int) -> Tensor:
    """Return the `count` tokens of the highest scores (n,), best first, int64; equal scores: lower index first."""
    return scores.sort(descending=True, stable=True).indices[:count]


def nearest_centre(distance: Tensor, chosen: Tensor) -> Tensor:
    """Return (n,) int64: the number of each token's nearest centre, the first of equals; a centre has its own."""
    owner = distance[:, chosen].argmin(1)
    owner[chosen] = torch.arange(len(chosen), device=owner.device)
    return owner


def totals(tokens: Tensor, owner: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the sum (c, D) float32 of the tokens (n, D) that each of `count` owners has, and their number (c, 1)."""
    total = torch.zeros(count, tokens.shape[1], device=tokens.device).index_add(0, owner, tokens.float())
    return total, torch.bincount(owner, minlength=count)[:, None]
