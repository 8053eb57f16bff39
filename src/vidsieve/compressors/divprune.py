"""DivPrune: keep the most diverse tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Generator, Tensor

from vidsieve.compressors.base import Compressor
from vidsieve.errors import BudgetError
from vidsieve.types import Selection, Tokens, VideoTokens

_POOL, _BLOCK = 512, 256
_SHORTEST = 1e-12
"""Shorter tokens are not lengthened to one, as in `torch.nn.functional.normalize`."""
_RESOLUTION = 1e-6
"""Distances closer than this are decided in double precision; below it a token counts as a duplicate."""


@dataclass(frozen=True)
class DivPrune(Compressor):
    """Keep the tokens that are farthest from each other in cosine distance (max-min diversity).

    The first pick is the token whose nearest neighbour is farthest; then, again and again, the token whose
    nearest pick is farthest. Blind to the question and to time.

    Variants: ``"ours"`` keeps exactly ⌊R·N⌋ different tokens, ties to the lower index. ``"official"`` rounds R·N half
    to even and, where only duplicates of the picks are left, may pick one index twice and so keep fewer.

    Scores are distances: of a kept token to the nearest one kept before it, of another to the nearest one kept. So the
    lowest score among the kept is the radius within which every token of the video has a kept one (the rest of it is
    what a calibrated retention reads); they depend on the retention.
    ``docs/methods/divprune.md`` lists the other differences from the release, which is for still images.

    References
    ----------
    DivPrune, CVPR 2025; vbdi/divprune @ 799e2d95, llava_arch.py:147-171.
    """

    name: ClassVar[str] = "divprune"
    paper: ClassVar[str] = "DivPrune, CVPR 2025"
    variants: ClassVar[tuple[str, ...]] = ("ours", "official")

    def budget(self, video: VideoTokens) -> int:
        """Return K: ⌊R·N⌋, or R·N rounded half to even under ``"official"``."""
        if self.variant == "official" and not isinstance(self.retention, Tokens):
            count = round(self.retention * video.num_tokens)
            if count < 1:
                raise BudgetError(
                    f"the release rounds {self.retention:g} of {video.num_tokens} tokens to none; "
                    f"use variant 'ours' or a retention above {0.5 / video.num_tokens:.2g}"
                )
            return count
        return super().budget(video)

    def _select(self, video: VideoTokens, budget: int, generator: Generator) -> Selection:
        with torch.no_grad():
            picks, distances = diverse_picks(video.embeds, budget, repeat=self.variant == "official")
        return Selection(torch.unique(picks), scores=distances)


def diverse_picks(features: Tensor, count: int, *, repeat: bool = False) -> tuple[Tensor, Tensor]:
    """Return the picks of the greedy max-min diversity problem in order, and the distance of every token.

    Exact, in memory linear in N. Candidates are the `_POOL` tokens farthest from the picks so far: as
    distances to the picks only shrink, the best of them is the best of all until it falls below the tokens
    outside. Only then are all tokens brought up to date, by one matrix product for all picks made meanwhile.

    Parameters
    ----------
    features : Tensor, (N, D), floating
    count : int, 1 ≤ count ≤ N
    repeat : bool
        As the release: a pick stays a candidate at distance 0, so that duplicates of picks can make the
        same index come back.

    Returns
    -------
    picks : Tensor, (count,), int64
    distances : Tensor, (N,), float32
        Cosine distance, 0 to 2: of a pick to the nearest pick before it (of the first to its farthest token, which a
        second pick is), of another token to the nearest pick.
    """
    unit = _UnitVectors.of(features)
    total = len(features)
    picks = [_loneliest(unit)]
    nearest = 1 - unit.closest(unit.rows(picks))
    radii = {picks[0]: float(nearest.max())}
    taken = 0.0 if repeat else -1.0
    nearest[picks[0]] = taken
    while len(picks) < count:
        pool = nearest.topk(min(_POOL, total)).indices.sort().values
        outside = nearest.clone()
        outside[pool] = -2.0
        ceiling = float(outside.max())
        near = unit.rows(pool)
        pairwise = 1 - near @ near.T
        distance = nearest[pool]
        fresh: list[int] = []
        while len(picks) + len(fresh) < count:
            best = float(distance.max())
            if fresh and best <= ceiling + _RESOLUTION:
                break
            if best <= _RESOLUTION:
                # Only duplicates are left anywhere: every one of them is equally far, take the lowest.
                rest = nearest.clone()
                rest[fresh] = taken
                left = (rest >= 0).nonzero().flatten()
                missing = count - len(picks) - len(fresh)
                fill = left[:1].repeat(missing) if repeat else left[:missing]
                chosen = torch.tensor(picks + fresh + fill.tolist(), device=features.device)
                return chosen, _distances(torch.zeros_like(nearest), radii)
            if best <= ceiling + _RESOLUTION:
                choice = _farthest(unit, (nearest >= best - _RESOLUTION).nonzero().flatten(), picks)
            else:
                choice = _farthest(unit, pool[distance >= best - _RESOLUTION], picks + fresh)
            fresh.append(choice)
            radii.setdefault(choice, best)
            place = int(torch.searchsorted(pool, choice))
            if place == len(pool) or int(pool[place]) != choice:
                break
            distance = torch.minimum(distance, pairwise[place])
            distance[place] = taken
        nearest = torch.minimum(nearest, 1 - unit.closest(unit.rows(fresh)))
        picks += fresh
        nearest[picks] = taken
    return torch.tensor(picks, device=features.device), _distances(nearest, radii)


def _distances(nearest: Tensor, radii: dict[int, float]) -> Tensor:
    """Return the distances (N,) float32 to the nearest pick; of the picks themselves those in `radii`."""
    distances = nearest.clamp(min=0)
    distances[list(radii)] = torch.tensor(list(radii.values()), device=nearest.device)
    return distances


@dataclass(frozen=True)
class _UnitVectors:
    """Unit vectors of tokens (N, D), made of the rows that are asked for: no second copy of a video."""

    tokens: Tensor
    inverse: Tensor
    """One over each token's length, (N,) float32."""

    @classmethod
    def of(cls, tokens: Tensor) -> _UnitVectors:
        lengths = [torch.linalg.vector_norm(block.float(), dim=1) for block in torch.split(tokens, _POOL)]
        return cls(tokens, 1 / torch.cat(lengths).clamp(min=_SHORTEST))

    def rows(self, index: Tensor | list[int]) -> Tensor:
        """Return the unit vectors (n, D) float32 of some tokens."""
        return torch.nn.functional.normalize(self.tokens[index].float(), dim=1, eps=_SHORTEST)

    def cosines(self, to: Tensor, index: Tensor | None = None) -> Tensor:
        """Return the cosines (n, k) float32 of some tokens, or of all, to unit vectors (k, D)."""
        if index is None:
            return torch.cat([part.float() @ to.T for part in torch.split(self.tokens, _POOL)]).mul_(
                self.inverse[:, None]
            )
        return torch.cat([self.rows(part) @ to.T for part in torch.split(index, _POOL)])

    def closest(self, to: Tensor) -> Tensor:
        """Return the largest cosine (N,) float32 of each token to unit vectors (k, D)."""
        return torch.cat([(part.float() @ to.T).amax(1) for part in torch.split(self.tokens, _POOL)]).mul_(self.inverse)


def _farthest(unit: _UnitVectors, candidates: Tensor, picks: list[int]) -> int:
    """Return the candidate farthest from all picks; near-equal ones are compared in double precision."""
    if candidates.shape[0] == 1:
        return int(candidates[0])
    nearest = 1 - (unit.rows(candidates).double() @ unit.rows(picks).double().T).amax(1)
    return int(candidates[int(nearest.argmax())])


def _loneliest(unit: _UnitVectors) -> int:
    """Return the token whose nearest neighbour is farthest, without forming all N² distances.

    Tokens meet the others block by block, in an order that has nothing to do with time or place; the exact
    distance of a few leaders rules out every token that has met a closer neighbour already, so that few
    tokens meet all blocks.
    """
    total, device = len(unit.tokens), unit.tokens.device
    if total == 1:
        return 0
    order = torch.randperm(total, generator=torch.Generator().manual_seed(0)).to(device)
    bound = torch.full((total,), torch.inf, device=device)
    alive = torch.arange(total, device=device)
    sure = -torch.inf
    for start in range(0, total, _BLOCK):
        stop = min(start + _BLOCK, total)
        distance = 1 - unit.cosines(unit.rows(order[start:stop]), order[alive])
        own = ((alive >= start) & (alive < stop)).nonzero().flatten()
        distance[own, alive[own] - start] = torch.inf
        bound[alive] = torch.minimum(bound[alive], distance.amin(1))
        leaders = alive[bound[alive].topk(min(4, len(alive))).indices]
        exact = 1 - unit.cosines(unit.rows(order[leaders]))
        exact[order[leaders], torch.arange(len(leaders), device=device)] = torch.inf
        sure = max(sure, float(exact.amin(0).max()))
        alive = alive[bound[alive] >= sure - _RESOLUTION]
    candidates = order[alive].sort().values
    if len(candidates) == 1 or len(candidates) > _POOL:
        return int(candidates[0])  # more than a pool of equals: every token has a duplicate
    rows, closest = unit.rows(candidates).double(), bound.new_full((len(candidates),), -torch.inf).double()
    for start in range(0, total, _BLOCK):
        places = torch.arange(start, min(start + _BLOCK, total), device=device)
        cosine = rows @ unit.rows(places).double().T
        closest = torch.maximum(closest, cosine.masked_fill(candidates[:, None] == places, -torch.inf).amax(1))
    return int(candidates[int((1 - closest).argmax())])
