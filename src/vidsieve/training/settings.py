"""Settings of the trainers: plain dataclasses, each field with its text; the command line is made from them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

from vidsieve.errors import TrainingError, UnknownNameError

Objective = Literal["policy_gradient", "distil", "straight_through"]
Teacher = Literal["first_look", "attention"]
Sampler = Literal["ocss", "multinomial", "random", "official"]
Range = Literal["frame", "video"]
Reward = Literal["choice", "margin", "generate"]
GroupAdvantage = Literal["group", "leave_one_out", "no_std", "official"]
Advantage = Literal["split", "group", "leave_one_out", "no_std"]
Schedule = Literal["constant", "cosine"]
Precision = Literal["fp32", "bf16"]
Looks = Literal["all", "mean", "none"]
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
        "steps": (1, math.inf),
        "prompts_per_step": (1, math.inf),
        "grad_clip": (1e-12, math.inf),
        "log_every": (1, math.inf),
        "save_every": (1, math.inf),
        "max_minutes": (0, math.inf),
        "seed": (0, 2**63 - 1),
        "workers": (0, 64),
        "rollout_tokens": (0, math.inf),
        "frames": (1, math.inf),
        "eval_every": (0, math.inf),
        "eval_prompts": (0, math.inf),
        "eval_retention": (1e-6, 0.99),
        "hold_out": (0, 0.5),
    }
    choices: ClassVar[dict[str, Any]] = {"precision": Precision}

    steps: int = 1000
    """Optimiser steps."""
    prompts_per_step: int = 8
    """Prompts whose gradients are added up, one after another, before a step; several processes share them."""
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
    workers: int = 2
    """Threads that read the next videos of a file while the model works; 0 = read each when it is needed."""
    frames: int = 16
    """Frames taken evenly from each video of a file, at most; a pseudo-video has its own."""
    rollout_tokens: int = 0
    """Most tokens, padding included, in one prefill of rollouts; 0 = found from the memory at hand."""
    precision: Precision = "fp32"
    """"bf16": the policy computes in bfloat16, and the frozen model is loaded in it; the policy's weights, their
    gradients and the optimiser stay float32. "fp32": the policy in float32, the model as its files have it."""
    eval_every: int = 0
    """Steps between two evaluations on held-out prompts; 0 = at the end only."""
    eval_prompts: int = 64
    """Held-out prompts of an evaluation, at most; 0 = none is made."""
    eval_retention: float = 0.1
    """Share of the tokens that is kept in an evaluation."""
    hold_out: float = 0.0
    """Share of the videos of --data that is kept from training for the evaluation."""

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
class PolicyTrainConfig(TrainConfig):
    """Settings of both trainers: what is learned from, and remedies against what goes wrong."""

    ranges: ClassVar[dict[str, tuple[float, float]]] = {
        "warmup_steps": (0, math.inf),
        "entropy_floor": (0, math.log(2)),
        "entropy_weight": (0, math.inf),
        "rate_low": (0, 0.99),
        "rate_high": (0, 0.99),
    }
    choices: ClassVar[dict[str, Any]] = {"objective": Objective, "teacher": Teacher}

    objective: Objective = "policy_gradient"
    """"policy_gradient" (both papers), or a control without it: "distil" a teacher's scores, or "straight_through"
    gradients of the answer's loss with respect to what was kept."""
    teacher: Teacher = "first_look"
    """Whose scores are distilled: "first_look", the strongest attention of layer 0 from words asked or captioned, or
    "attention", the mean attention of all layers from where the answer begins, or from the caption."""
    warmup_steps: int = 0
    """First steps that distil the teacher before the objective takes over (supervised warm-up, as in GRIP-VLM)."""
    entropy_floor: float = 0.0
    """Mean entropy of a keep probability, in nats (at most 0.693), below which the loss pulls back; 0 = none."""
    entropy_weight: float = 1.0
    """How strongly entropy is pulled back to its floor."""
    rate_low: float = 0.0
    """Lowest fraction kept by a prompt's rollouts, drawn log-uniformly for each prompt; 0 = the paper's own rate."""
    rate_high: float = 0.0
    """Highest fraction kept by a prompt's rollouts."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if bool(self.rate_high) != bool(self.rate_low) or self.rate_low > self.rate_high:
            raise TrainingError(
                f"rate_low and rate_high are both 0, or 0 < rate_low ≤ rate_high; got {self.rate_low}, {self.rate_high}"
            )
        if self.warmup_steps and self.objective == "distil":
            raise TrainingError("warmup_steps distils before another objective: leave it out under objective distil")


@dataclass(frozen=True)
class CaCoVIDConfig(PolicyTrainConfig):
    """Settings of CaCoVID's training; the defaults are the paper's, scaled to the testbed where said."""

    ranges: ClassVar[dict[str, tuple[float, float]]] = {
        "ratio": (1e-6, 1),
        "token_rollouts": (2, math.inf),
        "frame_rollouts": (0, math.inf),
        "width": (1, math.inf),
        "body_lr": (0, math.inf),
        "head_lr": (0, math.inf),
        "score_decay": (0, math.inf),
        "weight_decay": (0, math.inf),
        "answer_tokens": (1, math.inf),
        "trust": (0, math.inf),
        "depth": (1, math.inf),
        "iterations": (1, math.inf),
        "ratio_low": (0, 1),
        "ratio_high": (0, 1),
        "ratio_most": (0, 1),
        "ratio_least": (0, 1),
    }
    choices: ClassVar[dict[str, Any]] = {
        "sampler": Sampler,
        "over": Range,
        "reward": Reward,
        "body": Body,
        "advantage": GroupAdvantage,
        "looks": Looks,
    }

    ratio: float = 0.02
    """r, the fraction of each frame's tokens that a rollout keeps, at least one token a frame."""
    token_rollouts: int = 24
    """g_t, rollouts drawn from token scores."""
    frame_rollouts: int = 8
    """g_f, rollouts drawn from frame scores."""
    width: float = 2.0
    """λ, width of a sub-space in multiples of the tokens drawn."""
    sampler: Sampler = "ocss"
    """"ocss", "multinomial", "random", or "official": the release's capped sub-spaces, its first rollouts greedy."""
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
    advantage: GroupAdvantage = "group"
    """"group": (R − mean) / std (Eq. 15); "official": std + 1e-4, unbiased; "no_std": R − mean (Dr. GRPO, 2503.20783);
    "leave_one_out": R − mean of the others (RLOO, 2402.14740)."""
    iterations: int = 1
    """Updates on the same prompts within a step, each with fresh rollouts beside those before (paper: 5)."""
    replay: bool = True
    """Keep the rollouts of a prompt's earlier iterations in its group."""
    dynamic_ratio: bool = False
    """Halve a prompt's ratio where it is answered too well, double it where too badly, from iteration to iteration."""
    ratio_high: float = 0.875
    """Share of right rollouts above which the ratio is halved."""
    ratio_low: float = 0.125
    """Share of right rollouts below which the ratio is doubled."""
    ratio_least: float = 0.0
    """Smallest ratio that halving leads to; 0 = one token a frame (release: 0.01)."""
    ratio_most: float = 0.12
    """Largest ratio that doubling leads to."""
    body: Body = "variant"
    """"layer", "attention" (without SwiGLU), "local" (within frames and to the text), "question" (each token against
    the question's words); "variant": "question" for ours, "layer" for paper."""
    causal: bool = False
    """Attend as the release does in effect, earlier columns only: blind to a question after the video."""
    blind_filter: bool = False
    """Leave out the testbed's questions that are answered without the video; for files: `vidsieve data filter`."""
    looks: Looks = "all"
    """What body "question" sees of the LLM's own first look, layer 0's attention from the words asked: "all", the
    "mean" over words alone (which of them count is then learned), or "none"."""
    trust: float = 0.25
    """How strongly body "question" starts in the order of that attention's strongest, with looks "all"; 0 = not."""
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
        if self.rate_high and self.dynamic_ratio:
            raise TrainingError("rate_low and rate_high draw each prompt's ratio: leave dynamic_ratio out")
        if self.objective != "policy_gradient":
            for name, given in (("blind_margin", self.blind_margin), ("dynamic_ratio", self.dynamic_ratio)):
                if given:
                    raise TrainingError(
                        f"{name} is about rewards, and objective {self.objective!r} has none: leave it out"
                    )
        if self.objective == "straight_through" and self.reward == "generate":
            raise TrainingError(
                "objective 'straight_through' needs options to differentiate: leave reward generate out"
            )
        if self.objective == "distil" and self.iterations > 1:
            raise TrainingError("objective 'distil' draws nothing that further iterations would add to: set them to 1")
        if self.sampler == "official" and self.over != "frame":
            raise TrainingError("sampler official draws from every frame: leave over at 'frame'")


@dataclass(frozen=True)
class ScoreConfig(PolicyTrainConfig):
    """Settings of SCORE's training; the defaults are the paper's."""

    ranges: ClassVar[dict[str, tuple[float, float]]] = {
        "rollouts": (2, math.inf),
        "hidden": (1, math.inf),
        "tolerance": (1, math.inf),
        "slack": (0, math.inf),
        "lr": (0, math.inf),
        "score_decay": (0, math.inf),
        "least_safe": (1, math.inf),
        "kept_low": (0, 1),
        "kept_high": (0, 1),
        "band_weight": (0, math.inf),
        "pseudo_steps": (0, math.inf),
        "pseudo_tolerance": (1, math.inf),
    }
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
    """"split": Eq. 7; "group", "leave_one_out" and "no_std": −CE against the group's, no sparsity reward."""
    score_decay: float = 0.0
    """Weight of the logits' variance in the loss; without it they grow until nothing is explored any more."""
    least_safe: int = 1
    """Fewest safe rollouts of a group whose sparsity is normalised; with fewer, each has advantage ΔCE·S. Eq. 7 as it
    stands gives a single safe one 0."""
    kept_low: float = 0.0
    """Lower edge of the band in which the policy's mean keep probability is left alone."""
    kept_high: float = 1.0
    """Upper edge of that band."""
    band_weight: float = 1.0
    """How strongly the mean keep probability is pulled back into its band."""
    pseudo_steps: int = 0
    """First steps on pseudo-videos: captioned still images, each held for a few frames (§4.4)."""
    pseudo_tolerance: float = 1.01
    """τ during those steps."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.advantage != "split" and (self.least_safe > 1 or self.slack):
            raise TrainingError(f"least_safe and slack belong to advantage 'split', got advantage {self.advantage!r}")
        if self.rate_high and (self.kept_low > 0 or self.kept_high < 1):
            raise TrainingError(
                "kept_low and kept_high bound the policy's own rate: leave them out, or rate_low and _high"
            )
        if self.least_safe > self.rollouts:
            raise TrainingError(f"least_safe is {self.least_safe}, more than the {self.rollouts} rollouts of a group")
        if self.kept_low >= self.kept_high:
            raise TrainingError(f"kept_low {self.kept_low} is not below kept_high {self.kept_high}")


SETTINGS: dict[tuple[str, str], dict[str, Any]] = {
    ("cacovid", "paper"): {"steps": 400, "frames": 32},
    ("cacovid", "ours"): {"reward": "margin", "score_decay": 0.002, "head_lr": 0.002, "steps": 700},
    ("cacovid", "official"): {
        "sampler": "official",
        "token_rollouts": 23,
        "advantage": "official",
        "balanced": True,
        "causal": True,
        "iterations": 5,
        "dynamic_ratio": True,
        "ratio_least": 0.01,
        "steps": 100,
        "frames": 32,
    },
    ("score", "paper"): {"prompts_per_step": 2, "steps": 150, "frames": 128},
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
