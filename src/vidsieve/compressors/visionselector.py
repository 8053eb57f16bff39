"""VisionSelector: two linear maps score every token against all, trained through a differentiable top-k."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Self

import msgspec
import torch
from torch import Generator, Tensor, nn

from vidsieve.compressors.base import ScoreCompressor
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

    @classmethod
    def start(
        cls,
        hidden_size: int,
        family: str,
        *,
        variant: str = "ours",
        seed: int = 0,
        base_model: str = "",
        **network: Any,
    ) -> VisionSelectorPolicy:
        """Return an untrained policy."""
        defaults = {"spread": OFFICIAL_START} if variant == "official" else {}
        config = PolicyConfig(cls.method, variant, hidden_size, family, defaults | network, base_model)
        return cls.drawn(config, seed)


@dataclass(frozen=True)
class VisionSelector(ScoreCompressor):
    """Keep the tokens of the highest learned scores over the whole video.

    Blind to the question: one selection serves every question about a video.

    Parameters
    ----------
    policy : VisionSelectorPolicy
        From `from_pretrained`; there is no sensible policy without training.

    Variants: ``"ours"`` keeps exactly ⌊R·N⌋ tokens of the decimal R; ``"official"`` rounds R·N down in floating point,
    as the release does. A policy serves both: they train from other first weights.

    References
    ----------
    VisionSelector (arXiv 2510.16598); JulietChoo/VisionSelector @ 800a70f,
    qwen-evaluation/token_compression/selector_scorer.py, selector_model.py.
    """

    name: ClassVar[str] = "visionselector"
    paper: ClassVar[str] = "VisionSelector (arXiv 2510.16598)"
    trained: ClassVar[bool] = True
    variants: ClassVar[tuple[str, ...]] = ("ours", "official")
    adaptive_variants: ClassVar[tuple[str, ...]] = ("official",)
    policy: VisionSelectorPolicy | None = None

    @classmethod
    def from_pretrained(cls, folder: str | Path, **fields: Any) -> Self:
        """Return the compressor with the policy in `folder`; its network serves both variants."""
        policy = VisionSelectorPolicy.from_pretrained(folder)
        return cls(policy=policy, **({"variant": policy.config.variant} | fields))

    @classmethod
    def untrained(cls, hidden_size: int, **fields: Any) -> Self:
        """Return the compressor with random weights, for contract checks and timing."""
        return cls(policy=VisionSelectorPolicy.start(hidden_size, "none").eval(), **fields)

    def score(self, video: VideoTokens) -> Tensor:
        """Return scores (N,)."""
        if self.policy is None:
            raise PolicyError(
                "visionselector needs a trained policy: vidsieve.load('visionselector', FOLDER), or `vidsieve train "
                "visionselector`"
            )
        with self.policy.serving(video.embeds):
            scores: Tensor = self.policy(video)
        return scores

    def _select(self, video: VideoTokens, budget: int, generator: Generator) -> Selection:
        if not self.adaptive_budget:
            return super()._select(video, budget, generator)
        scores = self.score(video)
        count = max(1, math.floor(video.num_tokens * self.budget_ratio(video.num_tokens)))
        return Selection(top_indices(scores, count), scores=scores)
