"""Similarity of tokens: cosines, and density peaks (DPC-kNN), in memory linear in the number of tokens."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

_WHOLE, _BLOCK = 2**24, 2**22
"""Most distances that are kept at once, and the size of a block where they are not."""
_FEW = 25
"""Tokens that `torch.cdist` compares one by one, and not by a product of matrices."""
_ROWS = 512
"""Tokens that are made float32 at once."""


@dataclass(frozen=True)
class Group:
    """Tokens that share a part of the budget: the static ones of a window of frames, or the others of one frame.

    Parameters
    ----------
    places : Tensor, (n,), int64
        Raster indices; static tokens stand in the window's first frame.
    frames : Tensor, (w, size, D)
        The window's frames where the tokens are static, else their frame.
    length : int
        w where they are static, else 0.
    """

    places: Tensor
    frames: Tensor
    length: int

    @property
    def tokens(self) -> Tensor:
        """The tokens (n, D), gathered anew every time; static ones are means over the window."""
        own = self.places % self.frames.shape[1]
        if not self.length:
            return self.frames[0, own]
        total = sum((frame[own].float() for frame in self.frames[1:]), self.frames[0, own].float())
        return (total / self.length).to(self.frames.dtype)


@dataclass(frozen=True)
class Distances:
    """Euclidean distances of tokens over √D: kept where they are few, else computed again block by block.

    So memory grows with the number of tokens, not with its square.

    Parameters
    ----------
    tokens : Tensor, (n, D), float32
    whole : Tensor or None, (n, n), float32
    """

    tokens: Tensor
    whole: Tensor | None

    @classmethod
    def of(cls, tokens: Tensor) -> Distances:
        """Return the distances of tokens (n, D)."""
        tokens = tokens.detach().float()
        return cls(tokens, _all_apart(tokens) if len(tokens) ** 2 <= _WHOLE else None)

    def rows(self) -> Iterator[tuple[slice, Tensor]]:
        """Yield blocks of rows: their slice, and their distances (b, n) to all tokens."""
        if self.whole is not None:
            yield slice(0, len(self.tokens)), self.whole
            return
        for part in _parts(len(self.tokens), len(self.tokens)):
            yield part, _apart(self.tokens[part], self.tokens)

    def nearest(self, chosen: Tensor) -> Tensor:
        """Return the number (n,) int64 of each token's nearest centre, the first of equals; a centre has its own."""
        if self.whole is not None:
            owner = self.whole[:, chosen].argmin(1)
        else:
            centre, parts = self.tokens[chosen], _parts(len(self.tokens), len(chosen))
            owner = torch.cat([_apart(self.tokens[part], centre).argmin(1) for part in parts])
        owner[chosen] = torch.arange(len(chosen), device=owner.device)
        return owner


def _all_apart(tokens: Tensor) -> Tensor:
    """Return the distances of tokens (n, D) to each other: of more than a few by one product, and 0 to themselves."""
    if len(tokens) <= _FEW:
        return _apart(tokens, tokens)
    product = tokens @ tokens.T
    squares = product.diagonal().clone()
    apart: Tensor = product.mul_(-2).add_(squares).add_(squares[:, None]).clamp_(min=0.0)
    return apart.div_(tokens.shape[-1]).sqrt_()


def _apart(first: Tensor, second: Tensor) -> Tensor:
    distance: Tensor = torch.cdist(first, second) / first.shape[-1] ** 0.5
    return distance


def _parts(count: int, width: int) -> list[slice]:
    """Return slices of `count` rows of `width` numbers, each of about `_BLOCK` numbers."""
    rows = max(1, _BLOCK // max(1, width))
    return [slice(start, start + rows) for start in range(0, count, rows)]


def density(rows: Tensor, neighbours: int) -> Tensor:
    """Return exp of minus the mean squared distance to the `neighbours` nearest tokens, from distances (b, n): (b,)."""
    return (-rows.topk(neighbours, largest=False).values.square().mean(1)).exp()


def peak_scores(distance: Distances, neighbours: int, noise: Tensor | None = None) -> Tensor:
    """Return the density times the distance to the nearest denser token, (n,) float32; centres have the highest.

    A token counts among its own `neighbours`. The densest token gets the largest distance of all.

    Parameters
    ----------
    noise : Tensor, (n,), optional
        Uniform in [0, 1); releases add a millionth of it to break ties. Without it the lower index comes first.
    """
    neighbours = min(neighbours, len(distance.tokens))
    dense, most = [], []
    for _, rows in distance.rows():
        dense.append(density(rows, neighbours))
        most.append(rows.max())
    densities, largest = torch.cat(dense), torch.stack(most).max()
    if noise is not None:
        densities = densities + noise * 1e-6
    apart = [
        torch.where(densities[None, :] > densities[part, None], rows, largest).amin(1) for part, rows in distance.rows()
    ]
    return torch.cat(apart) * densities


def centres(scores: Tensor, count: int) -> Tensor:
    """Return the `count` tokens of the highest scores (n,), best first, int64; equal scores: lower index first."""
    return scores.sort(descending=True, stable=True).indices[:count]


def most_alike(sources: Tensor, targets: Tensor) -> Tensor:
    """Return the target (m,) int64, among (k, D), that each source (m, D) is most like by cosine, first of equals."""
    unit = F.normalize(targets.detach().float(), dim=-1).T  # a source's own length does not matter
    owner = torch.empty(len(sources), dtype=torch.int64, device=sources.device)
    for part in _parts(len(sources), max(unit.shape)):
        owner[part] = (sources[part].detach().float() @ unit).argmax(1)
    return owner


def cosines(first: Tensor, second: Tensor) -> Tensor:
    """Return the cosines (T, n) of tokens (T, n, D) to those of another such, frame by frame, in their dtype."""
    rows = [F.cosine_similarity(a, b, dim=-1) for a, b in zip(first, second, strict=True)]
    return torch.stack(rows) if rows else first[..., 0]


def frame_means(frames: Tensor) -> Tensor:
    """Return the mean token (T, D) float32 of each of frames (T, n, D), of which one at a time is made float32."""
    return torch.stack([frame.float().mean(0) for frame in frames])


def neighbours_alike(frames: Tensor) -> Tensor:
    """Return the cosine (T − 1,) of every frame vector of (T, D) to the next."""
    unit = F.normalize(frames, dim=-1)
    return (unit[1:] * unit[:-1]).sum(-1)


def along_time(frames: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Return the cosines (T − 1, n) of tokens (T, n, D) to the one a frame before at their place.

    Computed in `dtype`; default: that of the tokens. Bit-equal to `cosines`; no token is normalised twice, and two
    frames are all the memory that is needed.
    """
    frames, dtype = frames.detach(), dtype or frames.dtype
    alike = frames.new_empty(len(frames) - 1, frames.shape[1], dtype=dtype)
    now, prev = torch.empty_like(frames[0], dtype=dtype), torch.empty_like(frames[0], dtype=dtype)
    for t, frame in enumerate(frames):
        tokens = frame.to(dtype)
        # The least norm is cosine_similarity's.
        length = torch.linalg.vector_norm(tokens, dim=-1, keepdim=True).clamp(min=1e-8)
        torch.div(tokens, length, out=now)
        if t:
            torch.sum(prev.mul_(now), -1, out=alike[t - 1])
        now, prev = prev, now
    return alike


def totals(tokens: Tensor, owner: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the sum (c, D) float32 and number (c, 1) of the tokens (n, D) that each of `count` owners has."""
    total = torch.zeros(count, tokens.shape[1], device=tokens.device)
    for own, part in zip(torch.split(owner, _ROWS), torch.split(tokens, _ROWS), strict=True):
        total.index_add_(0, own, part.float())
    return total, torch.bincount(owner, minlength=count)[:, None]
