"""AOT: anchors by window and frame, and transport plans between all the others and them (TyroneLi/AOT)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

ROUNDS, STEP, SOFTNESS = 100, 0.01, 0.1


def anchors(shallow: Tensor, deep: Tensor, side: int, count: int, share: float = 0.5) -> tuple[Tensor, Tensor]:
    """Return the anchors of windows and those of the whole frame, (T, a) and (T, b), of attention (T, side²)."""
    local = int(count * (1 - share))
    third = torch.arange(side) * 3 // side
    window = (third[:, None] * 3 + third).flatten()
    parts = []
    for number in range(9):
        places = (window == number).nonzero().flatten()
        parts.append(places[shallow[:, places].topk(local // 9).indices])
    chosen = torch.cat(parts, 1)
    return chosen, deep.scatter(1, chosen, 0.0).topk(count - local).indices


def transport(cost: Tensor) -> Tensor:
    """Return plans (B, m, a) of costs between uniform masses, whose rounds end for all of them together."""
    kernel = torch.exp(-cost / SOFTNESS)
    _, m, a = cost.shape
    rows, columns = torch.ones_like(cost[:, :, 0]), torch.ones_like(cost[:, 0])
    for _ in range(ROUNDS):
        before = rows
        rows = (1 / m) / torch.einsum("bma,ba->bm", kernel, columns)
        columns = (1 / a) / torch.einsum("bma,bm->ba", kernel, rows)
        if float((rows - before).abs().mean()) < STEP:
            break
    return torch.einsum("bm,ba,bma->bma", rows, columns, kernel)


def within(frames: Tensor, mask: Tensor, side: int) -> Tensor:
    """Return the anchors (T, A, D), those of `mask` (T, n), of frames (T, n, D), with all others merged in."""
    width, steps = frames.shape[-1], torch.linspace(0, 1, side)
    spots = torch.stack(torch.meshgrid(steps, steps, indexing="ij"), -1).flatten(0, 1).expand(len(frames), -1, -1)
    own, others = frames[mask].reshape(len(frames), -1, width), frames[~mask].reshape(len(frames), -1, width)
    near, far = spots[mask].reshape(len(frames), -1, 2), spots[~mask].reshape(len(frames), -1, 2)
    cosine = F.normalize(others, dim=-1) @ F.normalize(own, dim=-1).mT
    plan = transport(1 - cosine + 0.5 * torch.cdist(far, near)).to(others)
    moved = (own + plan.mT @ others) / (1 + plan.sum(1)[..., None])
    joins = F.one_hot(cosine.argmax(-1), own.shape[1]).to(own)
    mean = (own + joins.mT @ others) / (1 + joins.sum(1)[..., None])
    return 0.9 * moved + 0.1 * mean


def along(clip: list[Tensor], keep: float, scaling: float = 1.0) -> tuple[list[Tensor], list[Tensor]]:
    """Return the tokens that a clip of frames (m, D) becomes, in order, and which of each later frame's stay."""
    anchor, rows, masks = clip[0], [clip[0]], []
    for apart, tokens in enumerate(clip[1:], 1):
        cost = 1 - F.normalize(tokens, dim=-1) @ F.normalize(anchor, dim=-1).T
        plan = transport(((cost - cost.min()) * (1 - math.exp(-(apart**2) / 4.5)))[None])[0]
        share = plan / plan.sum(1, keepdim=True)
        top = share.amax(1)
        stays = top < torch.quantile(top.double(), keep)
        share = share[~stays]
        anchor = (anchor + scaling * share.T @ tokens[~stays]) / (1 + scaling * share.sum(0)[:, None])
        rows.append(tokens[stays])
        masks.append(stays)
    return [*rows, *([anchor] if masks else [])], masks


def select(frames: Tensor, attention: Tensor, ratio: float, clip: int = 4, keep: float = 0.3) -> Tensor:
    """Return the tokens (K, D) of square frames (T, n, D), about `ratio` of them; anchors on the LLM's grid."""
    count, size, _ = frames.shape
    side = math.isqrt(size)
    each = int(ratio * size * clip / (2 + (clip - 1) * keep))
    chosen = torch.cat(anchors(attention, attention, side, each), 1)
    mask = torch.zeros(count, size, dtype=torch.bool).scatter(1, chosen, True)
    merged = within(frames, mask, side)
    return torch.cat([row for part in torch.split(merged, clip) for row in along(list(part), keep)[0]])
