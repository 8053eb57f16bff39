"""Sieve: one policy for any budget, with the question or without it. vidsieve's own, beyond both papers."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import msgspec
from torch import Tensor

from vidsieve.compressors._decoder import BlockShape
from vidsieve.compressors._question import QuestionScorer
from vidsieve.compressors.base import ScoreCompressor, TrainedCompressor
from vidsieve.errors import PolicyError
from vidsieve.policies import Policy, PolicyConfig, Size, network_of
from vidsieve.types import Need, VideoTokens


class SieveNetwork(msgspec.Struct, forbid_unknown_fields=True):
    """The arguments of a `SievePolicy`."""

    match_width: Size = 128
    width: Size = 64


class SievePolicy(Policy):
    """CaCoVID's question path, SCORE's surprise and the budget in one network (`QuestionScorer` with `budget`)."""

    method: ClassVar[str] = "sieve"
    serves_all: ClassVar[bool] = True

    def __init__(self, config: PolicyConfig) -> None:
        super().__init__(config)
        network = network_of(config, SieveNetwork)
        shape = BlockShape(config.hidden_size, 1, 1, config.hidden_size, config.hidden_size)
        self.scorer = QuestionScorer(shape, match_width=network.match_width, width=network.width, budget=True)

    def forward(self, video: VideoTokens, retention: float, question: bool = True) -> tuple[Tensor, Tensor]:
        """Return token logits (N, 2) and frame logits (T, 2) float32; column 0 = drop, 1 = keep.

        Parameters
        ----------
        retention : float
            Fraction of the tokens that will be kept.
        question : bool
            Read the question of `video`'s prompt.

        Raises
        ------
        PolicyError
            If the video comes without its prompt though `question` is True, or in another width.
        """
        if question and video.prompt is None:
            raise PolicyError(
                "this policy reads the question: hand over VideoTokens with a prompt, or choose variant 'blind'"
            )
        self.check_width(video)
        dtype = next(self.parameters()).dtype
        prompt = None
        if question and video.prompt is not None:
            prompt = replace(video.prompt, embeds=video.prompt.embeds.to(dtype))
        tokens, frames = self.scorer(replace(video, embeds=video.embeds.to(dtype)), prompt, retention)
        return tokens.float(), frames.float()


@dataclass(frozen=True)
class Sieve(TrainedCompressor, ScoreCompressor):
    """Keep the tokens that the policy scores highest at the given budget, over the whole video.

    Parameters
    ----------
    variant : str
        "ours" reads the question. "blind" does not: one selection serves every question about a video, and prompts
        without one. The policy is the same.
    """

    name: ClassVar[str] = "sieve"
    paper: ClassVar[str] = "vidsieve"
    needs: ClassVar[frozenset[Need]] = frozenset({Need.QUESTION})
    local: ClassVar[bool] = True
    variants: ClassVar[tuple[str, ...]] = ("ours", "blind")
    policy_class: ClassVar[type[Policy]] = SievePolicy
    small: ClassVar[dict[str, Any]] = {"width": 16}

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.variant == "blind":
            object.__setattr__(self, "needs", frozenset())

    def score(self, video: VideoTokens) -> Tensor:
        """Return keep logits (N,)."""
        policy = self.trained_policy()
        with policy.serving(video.embeds):
            logits: Tensor = policy(video, self.budget(video) / video.num_tokens, self.variant == "ours")[0]
        return logits[:, 1] - logits[:, 0]
