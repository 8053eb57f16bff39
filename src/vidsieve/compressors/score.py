"""SCORE: a question-free policy on each token and its surprise."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import msgspec
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vidsieve.compressors.base import ScoreCompressor, TrainedCompressor
from vidsieve.policies import Policy, PolicyConfig, Size, in_full, network_of
from vidsieve.types import TokenGrid, VideoTokens


class ScoreNetwork(msgspec.Struct, forbid_unknown_fields=True):
    """The arguments of a `ScorePolicy`."""

    hidden: Size = 512
    residual: bool = True
    normalise: bool = False
    target: Annotated[float, msgspec.Meta(gt=0, lt=1)] = 0.5


class ScorePolicy(Policy):
    """MLP on [X; ΔX] with one hidden layer of GELU units, one keep logit a token (Eq. 2-4).

    ΔX_t = X_t − X_{t−1} with a virtual zero frame before the first. The concatenation is never formed:
    W₁X + W₂ΔX = (W₁ + W₂)X_t − W₂X_{t−1}, two products on X and a shift, a few frames at a time.

    Network settings: ``hidden``, ``residual`` (False leaves ΔX out, Table 5), ``normalise`` (RMS of each token
    before the first layer; variant "ours"), ``target`` (the output bias starts at logit(target); "paper": 0.5).
    """

    method: ClassVar[str] = "score"
    starts: ClassVar[dict[str, dict[str, Any]]] = {"ours": {"normalise": True}}

    def __init__(self, config: PolicyConfig) -> None:
        super().__init__(config)
        network = network_of(config, ScoreNetwork)
        self.residual, self.normalise = network.residual, network.normalise
        width, hidden = config.hidden_size, network.hidden
        self.token, self.surprise = nn.Linear(width, hidden), nn.Linear(width, hidden, bias=False)
        self.out = nn.Linear(hidden, 1)
        for layer in (self.token, self.surprise):
            # As one layer on 2D inputs would start.
            nn.init.uniform_(layer.weight, -((2 * width) ** -0.5), (2 * width) ** -0.5)
        nn.init.zeros_(self.token.bias)
        nn.init.constant_(self.out.bias, torch.logit(torch.tensor(network.target, device="cpu")).item())

    def forward(self, video: VideoTokens) -> Tensor:
        """Return keep logits (N,) float32.

        Raises
        ------
        PolicyError
            If the video has another width.
        """
        self.check_width(video)
        return self.logits(video.embeds, video.grid)

    def logits(self, embeds: Tensor, grid: TokenGrid, chunk_tokens: int = 8192) -> Tensor:
        """Return keep logits (N,) of tokens (N, D), working through about `chunk_tokens` tokens at a time."""
        # Autocast brings products to one dtype by itself.
        dtype = embeds.dtype if torch.is_autocast_enabled(embeds.device.type) else self.out.weight.dtype
        now = self.token.weight + self.surprise.weight if self.residual else self.token.weight
        frames = embeds.reshape(grid.frames, grid.per_frame, -1)
        step = max(1, chunk_tokens // grid.per_frame)
        parts = []
        for start in range(0, grid.frames, step):
            x = self._scaled(frames[start : start + step].to(dtype))
            hidden = F.linear(x, now, self.token.bias)
            if self.residual:
                before = F.linear(x, self.surprise.weight)
                hidden[1:] -= before[:-1]
                if start:
                    hidden[0] -= F.linear(self._scaled(frames[start - 1].to(dtype)), self.surprise.weight)
            parts.append(in_full(self.out, F.gelu(hidden)).flatten())
        return torch.cat(parts).float()

    def _scaled(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) if self.normalise else x


@dataclass(frozen=True)
class Score(TrainedCompressor, ScoreCompressor):
    """Keep the tokens of the highest learned retention probability over the whole video (global top-K).

    Blind to the question: one selection serves every question about a video.

    Variants ``"ours"`` and ``"paper"`` differ in network settings and training, not in selection: both keep
    exactly ⌊R·T·N⌋ tokens at their original positions (SCORE §4.5).

    References
    ----------
    SCORE, Eq. 2-9, §4.5; no official code is public.
    """

    name: ClassVar[str] = "score"
    paper: ClassVar[str] = "SCORE (Wang et al.)"
    local: ClassVar[bool] = True
    variants: ClassVar[tuple[str, ...]] = ("ours", "paper")
    policy_class: ClassVar[type[Policy]] = ScorePolicy
    small: ClassVar[dict[str, Any]] = {"hidden": 32}

    def score(self, video: VideoTokens) -> Tensor:
        """Return keep logits (N,)."""
        policy = self.trained_policy()
        with policy.serving(video.embeds):
            logits: Tensor = policy(video)
        return logits
