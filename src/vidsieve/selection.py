"""Pure functions from scores and budgets to indices. Ties always go to the lower index."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

import torch
from torch import Tensor

from vidsieve.errors import BudgetError
from vidsieve.retention import Tokens, check_retention
from vidsieve.types import TokenGrid


def kept_tokens(retention: float | Tokens, num_tokens: int) -> int:
    """Return the number of tokens that a budget keeps of `num_tokens`: exactly ⌊R·n⌋ of the decimal R, at least 1.

    The product is taken in exact arithmetic on the shortest decimal that names the float, so that 0.29 of
    100 is 29 (SCORE §4.5; floating point gives 28).

    Raises
    ------
    RetentionError
        If `retention` is not in (0, 1].
    BudgetError
        If `Tokens` asks for more than there are, and is not capped.
    """
    budget = check_retention(retention)
    if isinstance(budget, Tokens):
        if budget.count > num_tokens and not budget.capped:
            raise BudgetError(
                f"{budget.count} tokens are more than the video's {num_tokens}; ask for 1 to {num_tokens}"
            )
        return min(budget.count, num_tokens)
    return max(1, math.floor(Fraction(repr(budget)) * num_tokens))


def exact_ratio(retention: float | Tokens, num_tokens: int) -> Fraction:
    """Return a budget as an exact fraction of `num_tokens`, of the shortest decimal that names the float or a count."""
    return Fraction(retention.count, num_tokens) if isinstance(retention, Tokens) else Fraction(repr(retention))


def least_retention(count: int, num_tokens: int) -> float:
    """Return the least retention ratio of four decimals that keeps `count` of `num_tokens`, for messages."""
    return -(-10_000 * count // num_tokens) / 10_000


def top_indices(scores: Tensor, count: int) -> Tensor:
    """Return the sorted indices (count,) int64 of the largest of `scores` (N,); equal scores: lower index first."""
    order = torch.sort(scores, descending=True, stable=True).indices
    return order[:count].sort().values


def top_indices_per_frame(scores: Tensor, grid: TokenGrid, counts: Tensor) -> Tensor:
    """Return the sorted raster indices of the `counts[t]` largest scores of each frame.

    Parameters
    ----------
    scores : Tensor, (N,), floating
    counts : Tensor, (T,), int64, each between 0 and the tokens of a frame
    """
    rank = frame_ranks(scores, grid)
    return (rank < counts.to(rank.device)[:, None]).flatten().nonzero().flatten()


def frame_ranks(scores: Tensor, grid: TokenGrid) -> Tensor:
    """Return each token's rank (T, H·W) int64 inside its frame, 0 = highest score, ties to the lower index."""
    order = scores.reshape(grid.frames, grid.per_frame).sort(dim=1, descending=True, stable=True).indices
    rank = torch.empty_like(order)
    rank.scatter_(1, order, torch.arange(grid.per_frame, device=order.device).expand_as(order))
    return rank


def even_counts(total: int, parts: int) -> Tensor:
    """Return (parts,) int64 counts that add up to `total` and differ by at most one, the larger ones spread evenly."""
    edges = torch.arange(parts + 1, dtype=torch.int64) * total // parts
    return edges[1:] - edges[:-1]


def allocate_frames(weights: Tensor, total: int, cap: int, floor: int = 0) -> Tensor:
    """Return (T,) int64 counts in proportion to `weights` that add up to `total` exactly.

    Every frame gets `floor`; the rest is shared by largest remainder under `cap`; the excess of a full
    frame goes to the others in proportion to their weights (CaCoVID's n_j = softmax(Ŝ_f)[j]·r·n,
    made exact).

    Parameters
    ----------
    weights : Tensor, (T,), floating, not negative, not all zero
    total : int, the budget
    cap, floor : int, most and least tokens of one frame

    Raises
    ------
    BudgetError
        If no counts between floor and cap add up to `total`.
    """
    frames = weights.shape[0]
    if not frames * floor <= total <= frames * cap:
        raise BudgetError(f"{total} tokens cannot be spread over {frames} frames of {floor} to {cap} tokens")
    share = weights.detach().double().cpu()
    counts = torch.full((frames,), floor, dtype=torch.int64)
    rest, room = total - frames * floor, cap - floor
    unfilled = torch.full((frames,), room > 0)
    while rest > 0:
        live = share * unfilled
        quota = rest * (live / live.sum() if float(live.sum()) > 0 else unfilled / unfilled.sum())
        full = unfilled & (quota >= room)
        if bool(full.any()):
            counts[full] = cap
            rest -= room * int(full.sum())
            unfilled &= ~full
            continue
        whole = quota.floor().long()
        remainder = (quota - whole).masked_fill(~unfilled, -1.0)
        order = sorted(range(frames), key=lambda t: (-float(remainder[t]), -float(share[t]), t))
        whole[order[: rest - int(whole.sum())]] += 1
        return counts + whole
    return counts


def proportional_counts(sizes: Sequence[int], total: int) -> list[int]:
    """Return counts in proportion to `sizes` that add up to `total`, none above its size, by largest remainder.

    Raises
    ------
    BudgetError
        If `total` is more than there is.
    """
    whole = sum(sizes)
    if total > whole:
        raise BudgetError(f"{total} tokens cannot be taken from {whole}")
    counts = [total * size // whole for size in sizes]
    order = sorted(range(len(sizes)), key=lambda i: (-(total * sizes[i] % whole), i))
    for i in order[: total - sum(counts)]:
        counts[i] += 1
    return counts


def evenly_spaced(total: int, count: int) -> Tensor:
    """Return `count` of the positions 0 … total−1, spread evenly and rounded half to even, (count,) int64.

    The spatio-temporal fill of CaCoVID: positions of an evenly divided line from the first to the last.
    """
    return torch.linspace(0, total - 1, count, dtype=torch.float32).round().long()


def indices_to_mask(indices: Tensor, num_tokens: int) -> Tensor:
    """Return the keep mask (N,) bool of kept `indices`; True = kept."""
    mask = torch.zeros(num_tokens, dtype=torch.bool, device=indices.device)
    mask[indices] = True
    return mask


def other_indices(indices: Tensor, num_tokens: int) -> Tensor:
    """Return the sorted indices (N − K,) int64 of the tokens that are not among `indices` (K,)."""
    return mask_to_indices(~indices_to_mask(indices, num_tokens))


def mask_to_indices(keep_mask: Tensor) -> Tensor:
    """Return the sorted indices (K,) int64 of a keep mask (N,) bool."""
    return keep_mask.nonzero().flatten()
