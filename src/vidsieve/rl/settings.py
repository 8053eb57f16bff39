"""Settings of the trainers: plain dataclasses, each field with its text; the command line is made from them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Sampler = Literal["ocss", "multinomial", "random"]
Range = Literal["frame", "video"]
Reward = Literal["choice", "margin"]
Advantage = Literal["split", "group", "leave_one_out"]
Schedule = Literal["constant", "cosine"]


@dataclass(frozen=True)
class TrainConfig:
    """Settings of every training run."""

    steps: int = 1000
    """Optimiser steps."""
    prompts_per_step: int = 8
    """Prompts whose gradients are added up before a step."""
    seed: int = 42
    """Seed of the policy's start, the data order and every draw."""
    grad_clip: float = 5.0
    """Largest gradient norm."""
    weight_decay: float = 0.01
    """Weight decay of AdamW."""
    log_every: int = 20
    """Steps between two lines of metrics."""
    save_every: int = 200
    """Steps between two checkpoints."""
    max_minutes: float = 0.0
    """Stop after so many minutes; 0 = no limit."""


@dataclass(frozen=True)
class CaCoVIDConfig(TrainConfig):
    """Settings of CaCoVID's training; the defaults are the paper's, scaled to the testbed where said."""

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
    """"choice": 1 for a right answer; "margin": its log-probability over the best wrong option."""
    body_lr: float = 1e-4
    """Learning rate of the attention layer (paper: 1e-7 at 7B)."""
    head_lr: float = 1e-3
    """Learning rate of everything else (paper: 1e-6 at 7B)."""
    score_decay: float = 0.0
    """Weight of the pull towards a fair coin (k3 estimate of KL to ½)."""
    balanced: bool = False
    """Give kept and dropped tokens equal total weight, as the release does."""


@dataclass(frozen=True)
class ScoreConfig(TrainConfig):
    """Settings of SCORE's training; the defaults are the paper's."""

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
