"""CaCoVID's released sampling, step by step (LivingFutureLab/CaCoVID @ 384752da), for variant "official".

The release draws masks in three modes: "token" (its OCSS), "frame", and "content" (a reference by density
peaks whose reward trains nothing). Probabilities and draws are separate functions, so that the probabilities
can be checked against the release and the draws against the probabilities.
"""

from __future__ import annotations

import math

import torch
from torch import Generator, Tensor

from vidsieve.compressors._clustering import Distances, peak_scores
from vidsieve.training.sampling import mask_of_largest, subspace_of_tokens
from vidsieve.types import TokenGrid


def clip_max_probability(probability: Tensor, cap: float) -> Tensor:
    """Return probabilities whose largest entries are cut to `cap`, the rest rescaled (water-filling).

    Entries are first raised to at least 1/len². The release passes one row (n,), or by mistake a matrix (G, T),
    which it then normalises as a whole with len = G, so that the cap hardly ever binds.

    Parameters
    ----------
    probability : Tensor, (n,) or (G, T), floating, not negative
    cap : float
    """
    floor = 1 / probability.shape[0] ** 2
    free = torch.ones_like(probability)
    result = torch.zeros_like(probability)
    p, scale, limit = probability, 1.0, cap
    while True:
        p = p.clamp(min=floor) * free
        p = p / p.sum()
        limit = min(limit, 0.999)
        if float(p.max()) <= limit or int(free.sum()) == 1:
            return result + scale * p
        largest = int(p.argmax())
        result.view(-1)[largest] = scale * limit
        free.view(-1)[largest] = 0
        p = p * free
        scale, limit = scale * (1 - limit), limit / (1 - limit)


def group_count(ratio: float, group_size: float = 2.0) -> int:
    """Return g, the number of sub-spaces of a frame: ⌊1/ratio/group_size⌋, at least 1."""
    return max(int(1 / ratio / group_size), 1)


def group_of_tokens(probability: Tensor, groups: int) -> Tensor:
    """Return the sub-space (T, n) int64 of each token; the first n mod g sub-spaces have one token more."""
    tokens = probability.shape[1]
    sizes = torch.full((groups,), tokens // groups)
    sizes[: tokens % groups] += 1
    return subspace_of_tokens(probability, sizes)


def group_probability(probability: Tensor, members: Tensor, groups: int, max_group_prob: float = 2.0) -> Tensor:
    """Return the capped probability (T, g) of each sub-space of each frame."""
    mass = torch.zeros(probability.shape[0], groups).scatter_add_(1, members, probability.float())
    cap = min(max(max_group_prob / groups, 0.1), 0.9) if groups > 1 else 1.0
    return torch.stack([clip_max_probability(row, cap) for row in mass])


def member_probability(probability: Tensor, members: Tensor, drawn: Tensor, groups: int) -> Tensor:
    """Return within-group probabilities (G, n) of one frame, given the sub-space drawn by each rollout.

    Probabilities inside the group are clamped to half and twice 1/⌊n/g⌋ and renormalised.

    Parameters
    ----------
    probability, members : Tensor, (n,)
    drawn : Tensor, (G,), int64
    """
    inside = (members[None] == drawn[:, None]).float()
    part = probability[None].float() * inside
    part = part / (part.sum(1, keepdim=True) + 1e-8)
    size = probability.shape[0] // groups
    part = part.clamp(0.5 / size, 2.0 / size) * inside
    return part / part.sum(1, keepdim=True)


def token_masks(scores: Tensor, grid: TokenGrid, ratio: float, groups: int, generator: Generator) -> Tensor:
    """Return the masks (G, N) bool of the release's "token" mode; the first one is greedy.

    Parameters
    ----------
    scores : Tensor, (N,), logit of keep minus logit of drop
    groups : int, G
    """
    probability = scores.detach().float().reshape(grid.frames, grid.per_frame).softmax(1)
    count = drawn_tokens(grid, ratio)
    # The release has frames of 196 tokens; in smaller ones a sub-space must still hold what is drawn from it.
    parts = min(group_count(ratio), grid.per_frame // count)
    members = group_of_tokens(probability, parts)
    mass = group_probability(probability, members, parts)
    masks = torch.zeros(groups, grid.frames, grid.per_frame, dtype=torch.bool)
    for frame in range(grid.frames):
        drawn = torch.multinomial(mass[frame], groups, replacement=True, generator=generator)
        inside = member_probability(probability[frame], members[frame], drawn, parts)
        chosen = torch.multinomial(inside, count, generator=generator)
        chosen[0] = probability[frame].sort(descending=True, stable=True).indices[:count]
        masks[:, frame].scatter_(1, chosen, True)
    return masks.flatten(1)


def frame_probability(frame_scores: Tensor, groups: int) -> Tensor:
    """Return the matrix (G, T) from which the release draws frames: softmax repeated, then clipped as a whole."""
    row = frame_scores.detach().float().softmax(0)
    return clip_max_probability(row.repeat(groups, 1), 3 / row.shape[0])


def drawn_tokens(grid: TokenGrid, ratio: float) -> int:
    """Return the tokens of each frame that a rollout keeps, r·H·W rounded half to even; at least 1, unlike there."""
    return max(round(ratio * grid.per_frame), 1)


def density_peaks(embeds: Tensor, noise: Tensor) -> Tensor:
    """Return the density-peak score (n,) of tokens (n, D); a millionth of the noise (n,) in [0, 1) breaks ties."""
    return peak_scores(Distances.of(embeds), neighbours=4, noise=noise)


def content_mask(embeds: Tensor, grid: TokenGrid, ratio: float, noise: Tensor) -> Tensor:
    """Return the mask (N,) bool of the release's "content" mode: density peaks inside every frame."""
    frames = zip(embeds.reshape(grid.frames, grid.per_frame, -1), noise.reshape(grid.frames, -1), strict=True)
    peaks = torch.stack([density_peaks(*frame) for frame in frames])
    return mask_of_largest(peaks, drawn_tokens(grid, ratio)).flatten()


def frame_rollout_mask(embeds: Tensor, grid: TokenGrid, ratio: float, drawn: Tensor, noise: Tensor) -> Tensor:
    """Return the mask (N,) bool of one "frame" rollout: density peaks over all tokens of the drawn frames.

    `drawn` (T,) bool are the frames, `noise` (drawn tokens,) is in [0, 1).
    """
    tokens = drawn.repeat_interleave(grid.per_frame)
    mask = torch.zeros(grid.num_tokens, dtype=torch.bool)
    mask[tokens] = mask_of_largest(density_peaks(embeds[tokens], noise), grid.frames * drawn_tokens(grid, ratio))
    return mask


def frame_masks(
    embeds: Tensor,
    frame_scores: Tensor,
    grid: TokenGrid,
    ratio: float,
    groups: int,
    generator: Generator,
    share: float = 0.125,
) -> tuple[Tensor, Tensor]:
    """Return masks of ⌈T·share⌉ frames (G, T) bool and keep-masks (G, N) bool of the "frame" mode, the first greedy."""
    # As many frames as hold the budget: the release's 32 frames at a ratio of at most 0.12 always do.
    count = max(math.ceil(grid.frames * share), -(-grid.frames * drawn_tokens(grid, ratio) // grid.per_frame))
    chosen = torch.multinomial(frame_probability(frame_scores, groups), count, generator=generator)
    chosen[0] = frame_scores.sort(descending=True, stable=True).indices[:count]
    frames = torch.zeros(groups, grid.frames, dtype=torch.bool).scatter_(1, chosen, True)
    noise = torch.rand(groups, count * grid.per_frame, generator=generator)
    masks = [frame_rollout_mask(embeds, grid, ratio, frames[i], noise[i]) for i in range(groups)]
    return frames, torch.stack(masks)
