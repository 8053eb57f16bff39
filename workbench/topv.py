"""TopV: keep the tokens that carry most in an optimal transport from what enters a layer to what leaves it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from vidsieve.compressors._budgets import left_for_later
from vidsieve.compressors.base import within
from vidsieve.compressors.inside import LayerChoice, LayerCompressor, LayerView, layer_of
from vidsieve.errors import BudgetError
from vidsieve.selection import even_counts, exact_ratio, other_indices, top_indices
from vidsieve.types import Need, TokenGrid


@dataclass(frozen=True)
class TopV(LayerCompressor):
    """After one layer, keep the tokens that contribute most to its outputs, and recover some of the others evenly.

    Sources are the video tokens that enter the layer, targets what leaves it, normalised. Moving one to the other costs
    their distance in features, their distance on the frame, and the source's distance to the frame's centre. Sinkhorn's
    iterations end with the targets' side, so that a source's total, its importance, follows from the costs. No
    attention is read, so that the question, which comes after the video, has no say.

    UNVERIFIED: there is no public code. This is built from the paper's abstract and figures; every constant is an
    argument, and its default a guess of the same kind.

    Parameters
    ----------
    layer : int
        The first layer that sees fewer tokens: transport is through the one before it (paper: layer 2).
    feature, place, centre : float
        Weights of the three costs, each scaled to [0, 1] in its frame.
    spread : float
        Tokens over which distance on the frame counts: 1 − exp(−d² / 2·spread²).
    entropy : float
        Weight of the entropy that Sinkhorn's plan is smoothed by.
    iterations : int
        Of Sinkhorn.
    recovered : float
        Share of what is kept that is taken evenly from the others.

    Variant ``"ours"`` alone. The budget is the mean over layers, as FastV's. The paper's method is for single images:
    here every frame is one, transported for itself, and importances compete over the whole video.

    References
    ----------
    TopV, CVPR 2025 (arXiv 2503.18278).
    """

    name: ClassVar[str] = "topv"
    paper: ClassVar[str] = "TopV, CVPR 2025 (unverified)"
    needs: ClassVar[frozenset[Need]] = frozenset()
    layer: int = within(3, "[1, inf)")
    feature: float = within(1.0, "[0, inf)")
    place: float = within(1.0, "[0, inf)")
    centre: float = within(0.01, "[0, inf)")
    spread: float = within(10.0, "(0, inf)")
    entropy: float = within(0.1, "(0, inf)")
    iterations: int = within(3, "[1, inf)")
    recovered: float = within(0.25, "[0, 1)")

    def __post_init__(self) -> None:
        super().__post_init__()
        if max(self.feature, self.place, self.centre) == 0:
            raise BudgetError("feature, place and centre must not all be 0")

    def stages(self, num_layers: int, num_tokens: int) -> tuple[tuple[int, int], ...]:
        """Return the one stage (layer, tokens kept from there on)."""
        layer, budget = layer_of(self.layer, num_layers), exact_ratio(self.retention, num_tokens) * num_layers
        left = left_for_later(budget, layer, num_layers, num_tokens, self.describe())
        return ((layer, math.floor(left / (num_layers - layer) * num_tokens)),)

    def step(self, view: LayerView, keep: int) -> LayerChoice:
        """Return the most important tokens, and some of the others, evenly spread."""
        importance = self.importance(view.before, view.hidden.detach(), view.indices, view.grid)
        even = min(math.floor(self.recovered * keep), len(importance) - keep)
        best = top_indices(importance, keep - even)
        rest = other_indices(best, len(importance))
        steps = even_counts(len(rest), even).cumsum(0) - 1 if even else torch.empty(0, dtype=torch.int64)
        return LayerChoice(torch.cat([best, rest[steps.to(rest.device)]]).sort().values)

    def importance(self, sources: Tensor, targets: Tensor, indices: Tensor, grid: TokenGrid) -> Tensor:
        """Return each token's share of its frame's transport, times the frame's tokens: 1 on average, (n,) float32.

        Parameters
        ----------
        sources, targets : Tensor, (n, D)
            Hidden states that enter and that leave the layer.
        indices : Tensor, (n,), int64
            Raster indices.
        """
        importance = torch.empty(len(indices), device=sources.device)
        indices = indices.to(sources.device)
        for frame in torch.unique_consecutive(indices // grid.per_frame).tolist():
            own = (indices // grid.per_frame == frame).nonzero().flatten()
            cost = self._cost(sources[own].float(), targets[own].float(), indices[own] % grid.per_frame, grid)
            mass = sources[own].float().norm(dim=-1).clamp(min=1e-9)
            wanted = targets[own].float().norm(dim=-1).clamp(min=1e-9)
            plan = sinkhorn(cost, mass / mass.sum(), wanted / wanted.sum(), self.entropy, self.iterations)
            importance[own] = plan.sum(1) * len(own)
        return importance

    def _cost(self, sources: Tensor, targets: Tensor, places: Tensor, grid: TokenGrid) -> Tensor:
        """Return the cost (n, n) of moving each source to each target of one frame."""
        unit = [F.normalize(some, dim=-1) * some.shape[-1] ** 0.5 for some in (sources, targets)]
        features = torch.cdist(*unit).square()
        spot = torch.stack([places // grid.width, places % grid.width], -1).float()
        apart = 1 - torch.exp(-torch.cdist(spot, spot).square() / (2 * self.spread**2))
        middle = torch.tensor([grid.height - 1, grid.width - 1], device=spot.device) / 2
        off_centre = (spot - middle).norm(dim=-1)[:, None].expand_as(apart)
        return self.feature * _scaled(features) + self.place * _scaled(apart) + self.centre * _scaled(off_centre)


def _scaled(values: Tensor) -> Tensor:
    """Return values moved and scaled to [0, 1]; zeros where all are equal."""
    low, high = values.min(), values.max()
    return (values - low) / (high - low).clamp(min=1e-12)


def sinkhorn(cost: Tensor, mass: Tensor, wanted: Tensor, entropy: float, iterations: int) -> Tensor:
    """Return the plan (n, m) after some iterations, the targets' side last: columns sum to `wanted`, rows near `mass`.

    In logarithms, so that a small `entropy` does not underflow.
    """
    kernel = -cost / entropy
    rows, columns = torch.zeros_like(mass), torch.zeros_like(wanted)
    for _ in range(iterations):
        rows = mass.log() - torch.logsumexp(kernel + columns, 1)
        columns = wanted.log() - torch.logsumexp(kernel + rows[:, None], 0)
    return (kernel + rows[:, None] + columns).exp()
