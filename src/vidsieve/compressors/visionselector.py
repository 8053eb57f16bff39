"""VisionSelector: two linear maps score every token against all, trained through a differentiable top-k."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import msgspec
import torch
from torch import Generator, Tensor, nn

from vidsieve.compressors.base import ScoreCompressor, TrainedCompressor
from vidsieve.errors import PolicyError
from vidsieve.policies import Policy, PolicyConfig, network_of
from vidsieve.selection import top_indices
from vidsieve.types import Selection, VideoTokens

OFFICIAL_START = 1e-4
"""Standard deviation of the release's first weights, under which its first scores are near 0."""
CHUNK_TOKENS = 8192


class SelectorNetwork(msgspec.Struct, forbid_unknown_fields=True):
    """The argument of a `VisionSelectorPolicy`: the standard deviation of its first weights."""

    spread: Annotated[float, msgspec.Meta(gt=0, le=1)] = 0.02


class VisionSelectorPolicy(Policy):
    """Scores of tokens: the mean of q·k / √h over the keys k of all tokens of the video, with h = ⌊D/2⌋.

    The mean of the products is the product with the mean key, which is the key of the mean token. So the scores are
    X @ (W_qᵀ k̄) + b_q·k̄, without an N × N matrix and without the queries. A few thousand tokens at a time are brought
    to the precision of the weights.
    """

    method: ClassVar[str] = "visionselector"
    starts: ClassVar[dict[str, dict[str, Any]]] = {"official": {"spread": OFFICIAL_START}}
    serves_all: ClassVar[bool] = True

    def __init__(self, config: PolicyConfig) -> None:
        super().__init__(config)
        network, width = network_of(config, SelectorNetwork), config.hidden_size
        if width < 2:
            raise PolicyError(f"a visionselector policy needs a width of at least 2, got {width}")
        self.query, self.key = nn.Linear(width, width // 2), nn.Linear(width, width // 2)
        for layer in (self.query, self.key):
            nn.init.normal_(layer.weight, std=network.spread)
            nn.init.zeros_(layer.bias)

    def forward(self, video: VideoTokens) -> Tensor:
        """Return scores (N,) float32.

        Raises
        ------
        PolicyError
            If the video has another width.
        """
        self.check_width(video)
        query, embeds = self.query, video.embeds
        dtype = query.weight.dtype
        with torch.autocast(embeds.device.type, enabled=False):  # a score in half precision would tie
            key = self.key(embeds.mean(0, dtype=dtype))
            direction, offset = key @ query.weight, key @ query.bias
            products = [part.to(dtype) @ direction for part in torch.split(embeds, CHUNK_TOKENS)]
        scores: Tensor = (torch.cat(products) + offset) * query.out_features**-0.5
        return scores.float()


@dataclass(frozen=True)
class VisionSelector(TrainedCompressor, ScoreCompressor):
    """Keep the tokens of the highest learned scores over the whole video.

    Blind to the question: one selection serves every question about a video.

    Variants: ``"ours"`` keeps exactly ⌊R·N⌋ tokens of the decimal R; ``"official"`` rounds R·N down in floating point,
    as the release does. A policy serves both: they train from other first weights.

    References
    ----------
    VisionSelector (arXiv 2510.16598); JulietChoo/VisionSelector @ 800a70f,
    qwen-evaluation/token_compression/selector_scorer.py, selector_model.py.
    """

    name: ClassVar[str] = "visionselector"
    paper: ClassVar[str] = "VisionSelector (arXiv 2510.16598)"
    variants: ClassVar[tuple[str, ...]] = ("ours", "official")
    adaptive_variants: ClassVar[tuple[str, ...]] = ("official",)
    policy_class: ClassVar[type[Policy]] = VisionSelectorPolicy

    def score(self, video: VideoTokens) -> Tensor:
        """Return scores (N,)."""
        policy = self.trained_policy()
        with policy.serving(video.embeds):
            scores: Tensor = policy(video)
        return scores

    def _select(self, video: VideoTokens, budget: int, generator: Generator) -> Selection:
        if not self.adaptive_budget:
            return super()._select(video, budget, generator)
        scores = self.score(video)
        count = max(1, math.floor(video.num_tokens * self.budget_ratio(video.num_tokens)))
        return Selection(top_indices(scores, count), scores=scores)
