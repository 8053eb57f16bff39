"""GleanVID: more tokens for frames that bring something new, and tokens that what was kept before does not span."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from vidsieve.compressors.base import Compressor, within
from vidsieve.selection import allocate_frames, top_indices
from vidsieve.types import Selection, TokenGrid, VideoTokens

_LANCZOS_STEPS = 64
_ROUNDING = 1e-5  # relative; float32 leaves about 1e-6 of a token that a span contains


@dataclass(frozen=True)
class GleanVID(Compressor):
    """Share the budget by each frame's novelty in time; keep tokens that their cell repeats and earlier ones do not.

    A frame's novelty is what earlier frames at the same place cannot explain linearly, summed over places. A token's
    score is how much more it is like its cell than like its frame, plus its distance from the span of all tokens kept
    in earlier frames. Blind to the question.

    Parameters
    ----------
    debiased : bool
        Take the strongest common direction of all tokens out before novelty and spans are computed.
    recentred : bool
        Add the mean back after that.
    sliding : bool
        Cells of 2 × 2 tokens that begin at each token, in place of cells that tile the frame.
    sharpness : float
        τ of the softplus over the difference of likenesses.
    epsilon : float
        Ridge of the novelty, relative to the mean of the history's squared norms, and the share of the largest new
        direction below which another one is not added to the span.
    even_least, even_most : float
        Bounds of the part of the budget that is shared evenly; the more unequal the novelties, the smaller it is.

    The only variant, ``"paper"``, is written from the paper alone: no code is public, so nothing confirms it. The
    paper leaves the first three arguments open, and they decide about half of the tokens that are kept
    (``docs/methods/gleanvid.md``).

    References
    ----------
    GleanVID (arXiv 2609.37042), Eq. 3-13, Algorithms 1 and 2, App. B.3.
    """

    name: ClassVar[str] = "gleanvid"
    paper: ClassVar[str] = "GleanVID (arXiv 2609.37042), unverified"
    variants: ClassVar[tuple[str, ...]] = ("paper",)
    variant: str = "paper"
    debiased: bool = True
    recentred: bool = True
    sliding: bool = False
    sharpness: float = within(4.0, "(0, inf)")
    epsilon: float = within(1e-4, "(0, 1)")
    even_least: float = within(0.2, "[0, 1]")
    even_most: float = within(0.6, "[0, 1]")

    def _select(self, video: VideoTokens, budget: int, generator: Generator) -> Selection:
        grid = video.grid
        with torch.no_grad():
            raw = video.embeds.float().reshape(grid.frames, grid.per_frame, -1)
            clean = without_bias(raw, self.recentred) if self.debiased else raw
            news = novelty(cell_means(clean, grid, self.sliding), self.epsilon)
            counts = allocate_frames(self._shares(news.sum(1)), budget, grid.per_frame)
            unlike = local_scores(raw, cell_means(raw, grid, self.sliding), self.sharpness)
            chosen, scores = complementary(unlike, clean, counts.tolist(), self.epsilon)
        kept = torch.cat([places + t * grid.per_frame for t, places in enumerate(chosen)])
        return Selection(kept, scores=scores.flatten(), frame_scores=news.sum(1))

    def _shares(self, news: Tensor) -> Tensor:
        """Return the frames' parts (T,) of the budget from their novelties (T,)."""
        total, frames = news.sum(), len(news)
        if float(total) <= 0:
            return torch.ones_like(news)
        rank = torch.arange(1, frames + 1, device=news.device, dtype=news.dtype)
        gini = float(2 * (rank * news.sort().values).sum() / (frames * total)) - (frames + 1) / frames
        even = self.even_most - (self.even_most - self.even_least) * gini
        return even / frames + (1 - even) * news / total


def without_bias(tokens: Tensor, recentred: bool) -> Tensor:
    """Return tokens (T, n, D) without their mean and their strongest direction; with `recentred` plus the mean again.

    The direction is the first right singular vector of the centred tokens, by Lanczos steps from a fixed start.
    """
    flat = tokens.flatten(0, 1)
    mean = flat.mean(0)
    centred = flat - mean
    start = torch.randn(centred.shape[1], generator=torch.Generator().manual_seed(0)).to(centred)
    basis = F.normalize(start, dim=0)[None]
    while len(basis) < min(_LANCZOS_STEPS, *centred.shape):
        new = (centred @ basis[-1]) @ centred
        for _ in range(2):  # once leaves a part along the basis that grows from step to step
            new = new - (basis @ new) @ basis
        basis = torch.cat([basis, F.normalize(new, dim=0)[None]])
    basis = torch.linalg.qr(basis.T).Q  # of few different tokens the last steps are rounding
    inner = centred @ basis
    first = basis @ torch.linalg.eigh(inner.T @ inner).eigenvectors[:, -1]
    centred -= (centred @ first)[:, None] * first
    return (centred + mean if recentred else centred).reshape(tokens.shape)


def cell_means(tokens: Tensor, grid: TokenGrid, sliding: bool) -> Tensor:
    """Return for each of tokens (T, n, D) the mean of its cell of 2 × 2 tokens; cells are cut at the frame's edge."""
    planes = tokens.reshape(grid.frames, grid.height, grid.width, -1).permute(0, 3, 1, 2)
    if sliding:
        lower = F.pad(planes, (0, 1, 0, 1))
        there = F.pad(torch.ones_like(planes[:1, :1]), (0, 1, 0, 1))
        size = F.avg_pool2d(there, 2, 1, divisor_override=1)
        means = F.avg_pool2d(lower, 2, 1, divisor_override=1) / size
    else:
        cells = F.avg_pool2d(planes, 2, ceil_mode=True, count_include_pad=False)
        means = cells.repeat_interleave(2, 2).repeat_interleave(2, 3)[..., : grid.height, : grid.width]
    return means.permute(0, 2, 3, 1).flatten(1, 2)


def novelty(places: Tensor, epsilon: float) -> Tensor:
    """Return the norm (T, n) of what earlier frames leave unexplained of each place of (T, n, D).

    A place's residual after its projection on the same place in all earlier frames, by a ridge system of relative
    strength `epsilon`; the first frame's is its norm.
    """
    gram = torch.einsum("tnd,snd->nts", places, places).double()
    own = gram.diagonal(dim1=1, dim2=2)  # (n, T)
    left = [own[:, 0]]
    for t in range(1, len(places)):
        ridge = (epsilon * own[:, :t].mean(1)).clamp(min=1e-30)
        history = gram[:, :t, :t] + ridge[:, None, None] * torch.eye(t, dtype=gram.dtype, device=gram.device)
        known = gram[:, :t, t, None]
        left.append(own[:, t] - (known * torch.linalg.solve(history, known)).sum((1, 2)))
    return torch.stack(left).clamp(min=0).sqrt().to(places.dtype)


def local_scores(tokens: Tensor, cells: Tensor, sharpness: float) -> Tensor:
    """Return (T, n): how much more each token (T, n, D) is like its cell's mean than like its frame's."""
    to_cell = F.cosine_similarity(tokens, cells, dim=-1)
    to_frame = F.cosine_similarity(tokens, tokens.mean(1, keepdim=True), dim=-1)
    return F.softplus(to_cell - to_frame, beta=sharpness)


def complementary(local: Tensor, tokens: Tensor, counts: list[int], epsilon: float) -> tuple[list[Tensor], Tensor]:
    """Return the places kept in each frame, sorted, and the scores (T, n) that they were kept by.

    Parameters
    ----------
    local : Tensor, (T, n)
    tokens : Tensor, (T, n, D)
    counts : list of int, (T,)
    """
    span = tokens.new_zeros(tokens.shape[2], 0)
    chosen, scores = [], []
    for frame, near, count in zip(tokens, local, counts, strict=True):
        size, rest = frame.norm(dim=1), frame - (frame @ span) @ span.T
        apart = rest.norm(dim=1)
        scores.append(scaled(near) + scaled(apart.masked_fill(apart <= _ROUNDING * size, 0)))
        chosen.append(top_indices(scores[-1], count))
        if count and span.shape[1] < len(span):
            kept = rest[chosen[-1]]
            directions, strengths = torch.linalg.qr((kept - (kept @ span) @ span.T).T)
            strength = strengths.diagonal().abs()
            least = torch.maximum(epsilon * strength.max(), _ROUNDING * size[chosen[-1]].max())
            span = torch.cat([span, directions[:, strength > least]], 1)
    return chosen, torch.stack(scores)


def scaled(values: Tensor) -> Tensor:
    """Return values (n,), not negative, scaled to 0 … 1; zeros where they differ by no more than rounding."""
    low, high = values.min(), values.max()
    return (values - low) / (high - low) if bool(high - low > _ROUNDING * high) else torch.zeros_like(values)
