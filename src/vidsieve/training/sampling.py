"""Draw keep-masks from a policy's scores. Pure functions; every draw takes a generator.

G rollouts, N tokens on a grid of T frames with n = H·W tokens each.
"""

from __future__ import annotations

import math

import torch
from torch import Generator, Tensor

from vidsieve.errors import UnknownNameError
from vidsieve.selection import even_counts
from vidsieve.training.settings import Range, Sampler
from vidsieve.types import TokenGrid


def tokens_per_draw(ratio: float, tokens: int) -> int:
    """Return k, the tokens drawn out of `tokens` at a sampling ratio: r·n rounded, at least 1."""
    return min(tokens, max(1, round(ratio * tokens)))


def subspace_sizes(tokens: int, count: int, width: float) -> Tensor:
    """Return the sizes (l,) int64 of OCSS's sub-spaces: about λ·k tokens each, never fewer than k (Eq. 6).

    Parameters
    ----------
    tokens : int, n
    count : int, k
    width : float, λ
    """
    members = max(count, round(width * count))
    return even_counts(tokens, max(1, tokens // members))


def subspace_of_tokens(scores: Tensor, sizes: Tensor) -> Tensor:
    """Return the sub-space (R, n) int64 of each token: each row of scores (R, n) sorted and cut into `sizes` (l,)."""
    order = scores.sort(dim=1, descending=True, stable=True).indices
    space_of_rank = torch.repeat_interleave(torch.arange(len(sizes)), sizes)
    return torch.empty_like(order).scatter_(1, order, space_of_rank.expand_as(order))


def gumbel(shape: tuple[int, ...], generator: Generator) -> Tensor:
    """Return standard Gumbel noise; adding it to log-weights and taking the k largest draws without replacement."""
    uniform = torch.rand(shape, generator=generator, dtype=torch.float64).clamp_(1e-300, 1 - 1e-16)
    return -(-uniform.log()).log()


def ocss(scores: Tensor, count: int, groups: int, width: float, generator: Generator) -> Tensor:
    """Return keep-masks (G, R, n) bool drawn by online combinatorial space sampling, row by row (Eq. 5-11).

    Each row's tokens are sorted by score and cut into sub-spaces; one is drawn by its softmax mass, and `count`
    of its tokens are drawn without replacement in proportion to exp(score).

    Parameters
    ----------
    scores : Tensor, (R, n), floating
        Rows are frames, or one row for the whole video.
    count : int, k, tokens kept in each row
    groups : int, G, rollouts
    width : float, λ, width of a sub-space in multiples of k (the paper uses 2)
    """
    rows, tokens = scores.shape
    logits = scores.detach().double().cpu()
    sizes = subspace_sizes(tokens, count, width)
    space = subspace_of_tokens(logits, sizes)  # (R, n)
    log_mass = logits.log_softmax(1)
    mass = torch.zeros(rows, len(sizes), dtype=torch.float64).scatter_add_(1, space, log_mass.exp())
    drawn = (mass.log() + gumbel((groups, rows, len(sizes)), generator)).argmax(2)  # (G, R)
    inside = space[None] == drawn[..., None]  # (G, R, n)
    keys = (logits[None] + gumbel((groups, rows, tokens), generator)).masked_fill(~inside, -torch.inf)
    return mask_of_largest(keys, count)


def multinomial(scores: Tensor, count: int, groups: int, generator: Generator) -> Tensor:
    """Return keep-masks (G, R, n) bool: `count` tokens of each row without replacement, by exp(score)."""
    logits = scores.detach().double().cpu()
    return mask_of_largest(logits[None] + gumbel((groups, *logits.shape), generator), count)


def uniformly(rows: int, tokens: int, count: int, groups: int, generator: Generator) -> Tensor:
    """Return keep-masks (G, R, n) bool: `count` tokens of each row, all equally likely."""
    return mask_of_largest(torch.rand((groups, rows, tokens), generator=generator), count)


def mask_of_largest(keys: Tensor, count: int) -> Tensor:
    """Return the mask of the `count` largest keys along the last axis."""
    chosen = keys.topk(count, dim=-1).indices
    return torch.zeros(keys.shape, dtype=torch.bool).scatter_(-1, chosen, True)


def token_masks(
    scores: Tensor,
    grid: TokenGrid,
    ratio: float,
    groups: int,
    generator: Generator,
    *,
    sampler: Sampler = "ocss",
    over: Range = "frame",
    width: float = 2.0,
) -> Tensor:
    """Return G keep-masks (G, N) bool for the token policy (Table 3's samplers and ranges).

    Parameters
    ----------
    scores : Tensor, (N,), floating
        Ŝ_t, logit of keep minus logit of drop.
    ratio : float
        r, the fraction drawn of each frame (at least one token) or of the whole video.
    """
    rows = scores.reshape(grid.frames, grid.per_frame) if over == "frame" else scores[None]
    count = tokens_per_draw(ratio, rows.shape[1])
    if sampler == "ocss":
        masks = ocss(rows, count, groups, width, generator)
    elif sampler == "multinomial":
        masks = multinomial(rows, count, groups, generator)
    elif sampler == "random":
        masks = uniformly(rows.shape[0], rows.shape[1], count, groups, generator)
    else:
        raise UnknownNameError("sampler", sampler, ("ocss", "multinomial", "random"))
    return masks.flatten(1)


def frame_masks(
    token_scores: Tensor,
    frame_scores: Tensor,
    grid: TokenGrid,
    ratio: float,
    groups: int,
    generator: Generator,
    *,
    width: float = 2.0,
    share: float = 0.125,
) -> tuple[Tensor, Tensor]:
    """Return G frame masks (G, T) bool and the keep-masks (G, N) bool that they lead to.

    ⌈T·share⌉ frames are drawn by OCSS over frames; inside them, the highest token scores fill the same
    budget that a token rollout has (the release fills by density peaks instead).
    """
    frames = max(1, math.ceil(grid.frames * share))
    budget = grid.frames * tokens_per_draw(ratio, grid.per_frame)
    frames = min(grid.frames, max(frames, -(-budget // grid.per_frame)))
    drawn = ocss(frame_scores[None], frames, groups, width, generator)[:, 0]  # (G, T)
    allowed = drawn[..., None].expand(groups, grid.frames, grid.per_frame).flatten(1)
    keys = token_scores.detach().float().cpu().expand(groups, -1).masked_fill(~allowed, -torch.inf)
    return drawn, mask_of_largest(keys, budget)


def bernoulli_masks(probabilities: Tensor, groups: int, generator: Generator) -> Tensor:
    """Return K independent keep-masks (K, N) bool (SCORE §4.3); an empty draw keeps the likeliest token."""
    draws = torch.rand((groups, probabilities.shape[0]), generator=generator)
    masks = draws < probabilities.detach().float().cpu()
    empty = ~masks.any(1)
    masks[empty, int(probabilities.argmax())] = True
    return masks


def log_uniform(low: float, high: float, generator: Generator) -> float:
    """Return a number between `low` and `high` whose logarithm is uniform."""
    return low * math.exp(math.log(high / low) * float(torch.rand((), generator=generator)))
