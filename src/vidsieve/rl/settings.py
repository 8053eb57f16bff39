"""Settings of the trainers: plain dataclasses, each field with its text; the command line is made from them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

from vidsieve.errors import TrainingError, UnknownNameError

Sampler = Literal["ocss", "multinomial", "random"]
Range = Literal["frame", "video"]
Reward = Literal["choice", "margin", "generate"]
Advantage = Literal["split", "group", "leave_one_out"]
Schedule = Literal["constant", "cosine"]
Body = Literal["variant", "layer", "attention", "local", "question"]


@dataclass(frozen=True)
class TrainConfig:
    """Settings of every training run.

    Raises
    ------
    TrainingError
        If a number is out of its range (`ranges`: lowest and highest value).
    UnknownNameError
        If a choice is none of its `Literal`.
    """

    ranges: ClassVar[dict[str, tuple[float, float]]] = {
        "steps": (1, math.inf), "prompts_per_step": (1, math.inf), "grad_clip": (1e-12, math.inf),
        "log_every": (1, math.inf), "save_every": (1, math.inf), "max_minutes": (0, math.inf), "seed": (0, 2**63 - 1),
        "rollout_tokens": (0, math.inf),
    }  # fmt: skip
    choices: ClassVar[dict[str, Any]] = {}

    steps: int = 1000
    """Optimiser steps."""
    prompts_per_step: int = 8
    """Prompts whose gradients are added up before a step."""
    seed: int = 42
    """Seed of the policy's start, the data order and every draw."""
    grad_clip: float = 5.0
    """Largest gradient norm."""
    log_every: int = 20
    """Steps between two lines of metrics."""
    save_every: int = 25
    """Steps between two checkpoints."""
    max_minutes: float = 0.0
    """Stop after so many minutes; 0 = no limit."""
    rollout_tokens: int = 0
    """Most tokens, padding included, in one prefill of rollouts; 0 = found from the memory at hand."""

    def __post_init__(self) -> None:
        for kind in reversed(type(self).__mro__):
            for name, (low, high) in vars(kind).get("ranges", {}).items():
                value = getattr(self, name)
                if not low <= value <= high:
                    bound = f"from {low:g} to {high:g}" if high < math.inf else f"at least {low:g}"
                    raise TrainingError(f"{name} must be {bound}, got {value}")
            for name, known in vars(kind).get("choices", {}).items():
                if getattr(self, name) not in get_args(known):
                    raise UnknownNameError(name, getattr(self, name), get_args(known))


@dataclass(frozen=True)
class CaCoVIDConfig(TrainConfig):
    """Settings of CaCoVID's training; the defaults are the paper's, scaled to the testbed where said."""

    ranges: ClassVar[dict[str, tuple[float, float]]] = {
        "ratio": (1e-6, 1), "token_rollouts": (2, math.inf), "frame_rollouts": (0, math.inf), "width": (1, math.inf),
        "body_lr": (0, math.inf), "head_lr": (0, math.inf), "score_decay": (0, math.inf), "weight_decay": (0, math.inf),
        "answer_tokens": (1, math.inf), "depth": (1, math.inf), "iterations": (1, math.inf), "ratio_low": (0, 1),
        "ratio_high": (0, 1), "ratio_most": (0, 1),
    }  # fmt: skip
    choices: ClassVar[dict[str, Any]] = {"sampler": Sampler, "over": Range, "reward": Reward, "body": Body}

    ratio: float = 0.02
    """r, the fraction of each frame's tokens that a rollout keeps, at least one token a frame."""
    token_rollouts: int = 24
    """g_t, rollouts drawn from token scores."""
    frame_rollouts: int = 8
    """g_f, rollouts drawn from frame scores."""
    width: float = 2.0
    """λ, width of a sub-space in multiples of the tokens drawn."""
    sampler: Sampler = "ocss"
    """"ocss", "multinomial" or "random"."""
    over: Range = "frame"
    """Draw r of every "frame", or r of the whole "video"."""
    reward: Reward = "choice"
    """"choice": 1 for a right answer; "margin": its log-probability over the best wrong option; "generate": the score
    of a generated answer by Video-R1's rules, for questions of every kind."""
    blind_margin: bool = False
    """Under "margin", take off each option the log-probability that the model gives it without the video; the share of
    prompts answered so is logged as `blind`."""
    answer_tokens: int = 16
    """Longest answer under "generate", in tokens."""
    iterations: int = 1
    """Steps in a row on the same prompts, each with fresh rollouts beside those of the steps before (paper: 5)."""
    dynamic_ratio: bool = False
    """Halve a prompt's ratio where it is answered too well, double it where too badly, from iteration to iteration."""
    ratio_high: float = 0.875
    """Share of right rollouts above which the ratio is halved."""
    ratio_low: float = 0.125
    """Share of right rollouts below which the ratio is doubled."""
    ratio_most: float = 0.12
    """Largest ratio that doubling leads to."""
    body: Body = "variant"
    """"layer", "attention" (without SwiGLU), "local" (within frames and to the text), "question" (each token against
    the question's words); "variant": "question" for ours, "layer" for paper."""
    depth: int = 1
    """Decoder layers in the policy, started as the LLM's first."""
    body_lr: float = 1e-4
    """Learning rate of the attention layer (paper: 1e-7 at 7B)."""
    head_lr: float = 1e-3
    """Learning rate of everything else (paper: 1e-6 at 7B)."""
    weight_decay: float = 0.01
    """Weight decay of AdamW."""
    score_decay: float = 0.0
    """Weight of the pull towards a fair coin (k3 estimate of KL to ½)."""
    balanced: bool = False
    """Give kept and dropped tokens equal total weight, as the release does."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.frame_rollouts == 1:
            raise TrainingError("frame_rollouts is 0 or at least 2: a group of one has no advantage")
        if self.dynamic_ratio and self.iterations == 1:
            raise TrainingError("dynamic_ratio acts between the iterations of a prompt: set iterations to 2 or more")
        if self.blind_margin and self.reward != "margin":
            raise TrainingError(f"blind_margin changes the reward 'margin', got reward {self.reward!r}")
        if self.ratio_low > self.ratio_high:
            raise TrainingError(f"ratio_low {self.ratio_low} is above ratio_high {self.ratio_high}")


@dataclass(frozen=True)
class ScoreConfig(TrainConfig):
    """Settings of SCORE's training; the defaults are the paper's."""

    ranges: ClassVar[dict[str, tuple[float, float]]] = {
        "rollouts": (2, math.inf), "hidden": (1, math.inf), "tolerance": (1, math.inf), "slack": (0, math.inf),
        "lr": (0, math.inf), "score_decay": (0, math.inf), "rate_low": (0, 0.99), "rate_high": (0, 0.99),
    }  # fmt: skip
    choices: ClassVar[dict[str, Any]] = {"advantage": Advantage, "schedule": Schedule}

    rollouts: int = 16
    """K, masks per video."""
    hidden: int = 512
    """Hidden units of the policy."""
    residual: bool = True
    """Read the change since the last frame beside each token, [X; ΔX]; without it X alone (Table 5)."""
    tolerance: float = 1.02
    """τ, the factor on the cross-entropy under all tokens that a safe rollout may reach."""
    slack: float = 0.0
    """Added to τ·CE_base, where that is too near 0 for a factor to leave room."""
    lr: float = 0.02
    """Learning rate of Adam at the start."""
    schedule: Schedule = "constant"
    """"constant", or "cosine" to 0."""
    advantage: Advantage = "split"
    """"split": Eq. 7; "group" and "leave_one_out": −CE against the group's mean, no sparsity reward."""
    score_decay: float = 0.0
    """Weight of the logits' variance in the loss; without it they grow until nothing is explored any more."""
    rate_low: float = 0.0
    """Lowest mean keep rate of a group, drawn log-uniformly; 0 = the policy's own rate (paper)."""
    rate_high: float = 0.0
    """Highest mean keep rate of a group."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if bool(self.rate_high) != bool(self.rate_low) or self.rate_low > self.rate_high:
            raise TrainingError(
                f"rate_low and rate_high are both 0, or 0 < rate_low ≤ rate_high; got {self.rate_low}, {self.rate_high}"
            )


SETTINGS: dict[tuple[str, str], dict[str, Any]] = {
    ("cacovid", "paper"): {"steps": 400},
    ("cacovid", "ours"): {"reward": "margin", "score_decay": 0.002, "head_lr": 0.002, "steps": 700},
    ("score", "paper"): {"prompts_per_step": 2, "steps": 150},
    ("score", "ours"): {
        "hidden": 256,
        "advantage": "group",
        "rate_low": 0.05,
        "rate_high": 0.25,
        "lr": 0.001,
        "schedule": "cosine",
        "score_decay": 0.003,
        "steps": 150,
    },
}
"""What a variant changes of the defaults; a command's own options come on top."""
