"""Settings of the trainers, each with its default, bounds and help text; the command line is made from them."""

# ruff: noqa: RUF009 (`setting` and `option` make dataclass fields)

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Literal, get_args, get_type_hints

from vidsieve.errors import TrainingError, UnknownNameError

IdleRule = tuple[bool, str, tuple[str, ...]]
Objective = Literal["policy_gradient", "distil", "straight_through", "soft_topk"]
WITHOUT_DRAWS: dict[str, int] = {"distil": 0, "soft_topk": 1}
"""Objectives that draw no masks, and the masks under which the frozen model answers a prompt."""
Teacher = Literal["first_look", "attention", "oracle"]
Sampler = Literal["ocss", "multinomial", "random", "official"]
Range = Literal["frame", "video"]
Reward = Literal["choice", "agreement", "margin", "generate"]
GroupAdvantage = Literal["group", "leave_one_out", "no_std", "official"]
Advantage = Literal["split", "group", "leave_one_out", "no_std"]
Schedule = Literal["constant", "cosine"]
Precision = Literal["fp32", "bf16"]
Match = Literal["sum", "softmax", "cross_attention", "mean"]
Start = Literal["nothing", "first_look"]
BlindReward = Literal["answer", "caption"]
Body = Literal["variant", "layer", "attention", "local", "question"]


def setting(default: Any, help: str, low: float = -math.inf, high: float = math.inf, option: bool = False) -> Any:
    """Return a dataclass field with its help text, the bounds of a number, and whether it has a command-line option."""
    return field(default=default, metadata={"help": help, "low": low, "high": high, "option": option})


def option(default: Any, help: str, low: float = -math.inf, high: float = math.inf) -> Any:
    """Return a `setting` with a command-line option of its own; the others are given as ``--set name=value``."""
    return setting(default, help, low, high, option=True)


def check(*faults: tuple[object, str]) -> None:
    """Raise TrainingError with the text of the first fault whose condition is true."""
    for wrong, text in faults:
        if wrong:
            raise TrainingError(text)


def unknown_setting(config: type[TrainConfig], name: str) -> UnknownNameError:
    """Return the error for a setting that is not there; it offers those whose help speaks of it."""
    said = name.replace("_", " ").lower()
    sense = [item.name for item in fields(config) if said and said in item.metadata["help"].lower()]
    return UnknownNameError("setting", name, [item.name for item in fields(config)], sense=sense)


@dataclass(frozen=True)
class TrainConfig:
    """Settings of all trainers; those of `fixed` have no option, and may not change.

    Raises
    ------
    TrainingError
        If a value is of another type, a number out of its bounds, or two settings contradict each other.
    UnknownNameError
        If a value is not one of its `Literal`.
    """

    fixed: ClassVar[tuple[str, ...]] = ()
    rates: ClassVar[tuple[str, ...]] = ()
    """Learning rates whose defaults are for an LLM as wide as the testbed's; SCORE's is right for others too."""

    steps: int = option(1000, "Optimiser steps.", 1)
    prompts_per_step: int = option(8, "Prompts whose gradients are averaged in a step, over all processes.", 1)
    seed: int = option(42, "Seed of the policy's initial weights, the data order and every draw.", 0, 2**63 - 1)
    world: str = option("dense", "World of the testbed's scenes, where there is no --data: 'dense' or 'sparse'.")
    grad_clip: float = setting(5.0, "Largest gradient norm.", 1e-12)
    log_every: int = option(20, "Steps between two lines of metrics.", 1)
    save_every: int = option(25, "Steps between two checkpoints.", 1)
    max_minutes: float = option(0.0, "Stop after so many minutes; 0: no limit.", 0)
    workers: int = setting(
        2, "Threads that read videos ahead, or one that renders scenes if a core is idle; 0: none.", 0, 64
    )
    frames: int = option(16, "Most frames taken evenly from each video of a file, pseudo-videos excepted.", 1)
    rollout_tokens: int = setting(0, "Most tokens, padding included, in one prefill; 0: what memory allows.", 0)
    precision: Precision = option(
        "fp32",
        "'bf16': load the model in bfloat16, run the policy under autocast; weights and optimiser stay float32.",
    )
    eval_every: int = option(0, "Steps between two evaluations on held-out prompts; 0: only at the end.", 0)
    eval_prompts: int = setting(64, "Most held-out prompts in an evaluation; 0: no evaluation.", 0)
    eval_retention: float = setting(0.1, "Fraction of the tokens kept in an evaluation.", 1e-6, 0.99)
    hold_out: float = option(0.0, "Fraction of the videos of --data that is kept for the evaluation.", 0, 0.5)
    objective: Objective = setting(
        "policy_gradient",
        "'policy_gradient', or a control: 'distil' the teacher, 'straight_through' gradients, or 'soft_topk', "
        "VisionSelector's differentiable top-k.",
    )
    teacher: Teacher = setting(
        "first_look",
        "Scores to distil: 'first_look', the strongest attention of the first layer that sees the video; 'attention', "
        "the mean of all layers; 'oracle', equal ones for the tokens that a testbed's question is about.",
    )
    warmup_steps: int = setting(0, "First steps, which distil the teacher (supervised warm-up, GRIP-VLM).", 0)
    entropy_floor: float = setting(
        0.0, "Mean entropy, in nats, below which the loss pulls keep probabilities back; 0: none.", 0, math.log(2)
    )
    rate_low: float = setting(0.0, "Lowest fraction kept by rollouts, log-uniform per prompt; 0: none.", 0, 0.99)
    rate_high: float = setting(0.0, "Highest fraction kept by rollouts.", 0, 0.99)

    @property
    def own_rate(self) -> bool:
        """True if the policy chooses how many tokens it keeps in training."""
        return False

    def check_fixed(self, reason: str) -> None:
        """Raise TrainingError for a setting of `fixed` that is not at its default; `reason` goes on from its name."""
        for item in fields(self):
            if item.name in self.fixed and getattr(self, item.name) != item.default:
                raise TrainingError(f"{item.name} {reason}")

    @property
    def has_teacher(self) -> bool:
        """True if some step learns from `teacher`."""
        return self.objective == "distil" or self.warmup_steps > 0

    def rules(self, variant: str) -> tuple[IdleRule, ...]:
        """Return when settings change nothing beside the others, why (the text goes on from a name), and which."""
        return ((not self.has_teacher, "is for objective 'distil' and for warmup_steps", ("teacher",)),)

    def idle(self, variant: str) -> dict[str, str]:
        """Return why each setting that changes nothing beside the others does not."""
        return {name: reason for holds, reason, names in self.rules(variant) if holds for name in names}

    def removed(self) -> dict[str, Any]:
        """Return the constant that has replaced each former setting; a run with another value cannot be resumed."""
        return {"entropy_weight": 1.0}

    def __post_init__(self) -> None:
        types = get_type_hints(type(self))
        for item in fields(self):
            value, kind = getattr(self, item.name), types[item.name]
            low, high = item.metadata["low"], item.metadata["high"]
            wanted = type(item.default)
            if type(value) is not wanted and not (wanted is float and type(value) is int):
                raise TrainingError(f"{item.name} must be of type {wanted.__name__}, got {value!r:.100}")
            if get_args(kind) and value not in get_args(kind):
                raise UnknownNameError(item.name, value, get_args(kind))
            if kind in (int, float) and not low <= value <= high:
                bound = f"from {low:g} to {high:g}" if high < math.inf else f"at least {low:g}"
                raise TrainingError(f"{item.name} must be {bound}, got {value}")
        rates = f"0 < rate_low ≤ rate_high, or both 0; got {self.rate_low} and {self.rate_high}"
        check(
            (bool(self.rate_high) != bool(self.rate_low), f"rate_low and rate_high must be {rates}"),
            (self.rate_low > self.rate_high, f"rate_low and rate_high must be {rates}"),
            (
                self.warmup_steps and self.objective == "distil",
                "warmup_steps has no effect with objective 'distil': set it to 0",
            ),
        )


_DRAWING = ("token_rollouts", "sampler", "over", "width")
_REWARDED = ("advantage", "balanced", "score_decay", "frame_rollouts")


@dataclass(frozen=True)
class CaCoVIDConfig(TrainConfig):
    """Settings of CaCoVID's training; the defaults are the paper's, or scaled to the testbed where the help says so."""

    rates: ClassVar[tuple[str, ...]] = ("body_lr", "head_lr")

    ratio: float = option(0.02, "r, the fraction of each frame's tokens in a rollout, at least one a frame.", 1e-6, 1)
    token_rollouts: int = option(24, "g_t, rollouts drawn from token scores.", 2)
    frame_rollouts: int = option(8, "g_f, rollouts drawn from frame scores.", 0)
    width: float = setting(2.0, "λ, width of an OCSS sub-space in multiples of the tokens drawn.", 1)
    sampler: Sampler = setting("ocss", "'ocss', 'multinomial', 'random', or 'official': that of the release.")
    over: Range = setting("frame", "Draw r of every 'frame', or of the whole 'video'.")
    reward: Reward = option(
        "choice",
        "'choice': 1 for a right answer; 'agreement': 1 for the model's own answer under all tokens, no label read; "
        "'margin': the right answer's log-probability above the best wrong option's; 'generate': the score of a "
        "generated answer by Video-R1's rules, for questions of every kind.",
    )
    blind_margin: bool = setting(False, "In 'margin', subtract each option's log-probability without the video.")
    answer_tokens: int = setting(16, "Longest answer under 'generate', in tokens.", 1)
    advantage: GroupAdvantage = setting(
        "group",
        "'group': (R − mean) / std (Eq. 15); 'official': std + 1e-4, unbiased; 'no_std': R − mean (Dr. GRPO); "
        "'leave_one_out': R − mean of the others (RLOO).",
    )
    iterations: int = option(1, "Updates on the same prompts within a step, each with fresh rollouts (paper: 5).", 1)
    replay: bool = setting(True, "Keep the rollouts of a prompt's earlier iterations in its group.")
    dynamic_ratio: bool = option(
        False, "Halve the ratio of prompts answered too well, double it where too badly (DSR)."
    )
    ratio_high: float = setting(0.875, "Fraction of right rollouts above which the ratio is halved.", 0, 1)
    ratio_low: float = setting(0.125, "Fraction of right rollouts below which the ratio is doubled.", 0, 1)
    body: Body = setting(
        "variant",
        "'layer'; 'attention': without SwiGLU; 'local': within frames and to the text; 'question': each token against "
        "the question's words; 'variant': 'question' for ours, else 'layer'.",
    )
    causal: bool = setting(False, "Causal attention, as in the release: blind to a question after the video.")
    blind_filter: bool = setting(False, "Leave out the testbed's questions that are answered without the video.")
    start: Start = option(
        "nothing", "'first_look': body 'question' starts from the LLM's own first attention to the question's words."
    )
    match: Match = setting(
        "sum",
        "How body 'question' matches words with tokens: 'sum' over words, 'softmax' over words, 'cross_attention' into "
        "the network, or with the 'mean' of the words.",
    )
    match_width: int = setting(128, "Dimensions in which body 'question' matches words with tokens.", 1)
    depth: int = setting(1, "Decoder layers in the policy, initialised from the LLM's first.", 1)
    body_lr: float = option(1e-4, "Learning rate of the decoder layers (paper: 1e-7 at 7B).", 0)
    head_lr: float = option(1e-3, "Learning rate of everything else (paper: 1e-6 at 7B).", 0)
    weight_decay: float = setting(0.01, "Weight decay of AdamW.", 0)
    score_decay: float = setting(0.0, "Weight of the pull towards a fair coin (k3 estimate of KL to ½).", 0)
    balanced: bool = setting(False, "Give kept and dropped tokens equal total weight, as the release does.")

    def removed(self) -> dict[str, Any]:
        """Return the constant that has replaced each former setting."""
        least = 0.01 if self.sampler == "official" else 0.0
        return super().removed() | {"ratio_least": least, "ratio_most": 0.12, "looks": "all", "trust": 0.25}

    @property
    def answered(self) -> bool:
        """True if some reward is of an answer."""
        return True

    def reads_words(self, variant: str) -> bool:
        """Return True if the policy is the question path, which has no decoder layer."""
        return self.body == "question" or (self.body == "variant" and variant == "ours")

    def rules(self, variant: str) -> tuple[IdleRule, ...]:
        """Return when settings change nothing beside the others, why, and which."""
        drawn, rewarded = self.objective not in WITHOUT_DRAWS, self.objective == "policy_gradient"
        widths = self.sampler == "ocss" or (self.sampler != "official" and self.frame_rollouts > 0)
        return (
            *super().rules(variant),
            (not drawn, f"draws masks, and objective {self.objective!r} has none", _DRAWING),
            (not rewarded, f"is about rewards, and objective {self.objective!r} has none", _REWARDED),
            (drawn and not widths, f"is the width of OCSS, not of sampler {self.sampler!r}", ("width",)),
            (self.iterations == 1, "acts between iterations: set 2 or more", ("replay",)),
            (not self.dynamic_ratio, "is a threshold of dynamic_ratio", ("ratio_low", "ratio_high")),
            (bool(self.rate_high), "is what rate_low and rate_high draw", ("ratio",)),
            (self.reward != "generate", "is for reward 'generate'", ("answer_tokens",)),
            (self.reads_words(variant), "is for decoder layers, and body 'question' has none", ("body_lr", "depth")),
            (not self.reads_words(variant), "is for body 'question'", ("match", "match_width")),
        )

    @property
    def masks(self) -> int:
        """Masks under which the frozen model answers a prompt; over frames where rewards are compared."""
        if self.objective in WITHOUT_DRAWS:
            return WITHOUT_DRAWS[self.objective]
        return self.token_rollouts + (self.frame_rollouts if self.objective == "policy_gradient" else 0)

    def __post_init__(self) -> None:
        super().__post_init__()
        pairs = (("blind_margin", self.blind_margin), ("dynamic_ratio", self.dynamic_ratio))
        for name in (name for name, given in pairs if given and self.objective != "policy_gradient"):
            raise TrainingError(f"{name} is about rewards, and objective {self.objective!r} has none: leave it out")
        control, reward = self.objective, self.reward
        check(
            (self.frame_rollouts == 1, "frame_rollouts must be 0 or at least 2: a group of one has no advantage"),
            (self.dynamic_ratio and self.iterations == 1, "dynamic_ratio acts between iterations: set 2 or more"),
            (self.blind_margin and reward != "margin", f"blind_margin changes reward 'margin', got {reward!r}"),
            (self.ratio_low > self.ratio_high, f"ratio_low {self.ratio_low} is above ratio_high {self.ratio_high}"),
            (self.rate_high and self.dynamic_ratio, "rate_low and rate_high draw the ratio: leave dynamic_ratio out"),
            (
                control in ("straight_through", "soft_topk") and reward == "generate",
                f"{control} needs options: change reward",
            ),
            (
                control in WITHOUT_DRAWS and self.iterations > 1,
                f"objective {control!r} has no use for iterations: set them to 1",
            ),
            (
                self.sampler == "official" and self.over != "frame",
                "sampler 'official' draws from every frame: set over=frame",
            ),
        )


@dataclass(frozen=True)
class SieveConfig(CaCoVIDConfig):
    """Settings of the training of `sieve`: CaCoVID's but for those of its network and its rate, which are `fixed`."""

    fixed: ClassVar[tuple[str, ...]] = (
        *("body", "causal", "depth", "body_lr", "start", "match"),
        *("ratio", "dynamic_ratio", "ratio_high", "ratio_low"),
    )

    question_dropped: float = setting(
        0.5, "Fraction of the prompts whose rollouts are drawn without their question.", 0, 1
    )
    taught: bool = setting(
        False, "Teach the reading with the question by `teacher`; all rollouts are drawn without the question."
    )
    blind_reward: BlindReward = setting(
        "answer",
        "Reward of rollouts drawn without the question: 'answer', that of `reward`; or 'caption', minus the "
        "cross-entropy of the video's caption, as in SCORE, which teaches the reading without the question alone.",
    )

    @property
    def asking(self) -> float:
        """Fraction of the prompts whose rollouts are drawn with their question."""
        return 0.0 if self.teaches else 1 - self.question_dropped

    @property
    def teaches(self) -> bool:
        """True if `teacher` and not rewards teach the reading with the question."""
        return self.taught and self.objective == "policy_gradient"

    @property
    def captioned(self) -> bool:
        """True if captions and not answers reward the reading without the question."""
        return self.blind_reward == "caption" and self.objective == "policy_gradient" and self.asking < 1

    @property
    def has_teacher(self) -> bool:
        """True if some step learns from `teacher`."""
        return self.teaches or super().has_teacher

    @property
    def answered(self) -> bool:
        """True if some reward is of an answer."""
        return self.asking > 0 or not self.captioned

    def rules(self, variant: str) -> tuple[IdleRule, ...]:
        """Return when settings change nothing beside the others, why, and which."""
        return (
            *super().rules(variant),
            (self.objective != "policy_gradient", "is for objective 'policy_gradient'", ("taught", "blind_reward")),
            (self.teaches, "is 1 where the question's part is taught", ("question_dropped",)),
            (self.asking == 1, "is for rollouts without the question, and there are none", ("blind_reward",)),
            (not self.answered, "is about answers, and captions alone are rewarded", ("reward",)),
        )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_fixed("is CaCoVID's; sieve has its own network and draws its rates: leave it out")
        if not self.rate_high:
            raise TrainingError("sieve is trained at a range of rates: set rate_low and rate_high")
        if self.captioned and not self.teaches and self.question_dropped == 1:
            raise TrainingError(
                "nothing teaches the reading with the question: set taught=true, or question_dropped below 1"
            )


@dataclass(frozen=True)
class ScoreConfig(TrainConfig):
    """Settings of SCORE's training; the defaults are the paper's."""

    rollouts: int = option(16, "K, masks per video.", 2)
    hidden: int = setting(512, "Hidden units of the policy.", 1)
    residual: bool = setting(True, "Read each token with its change since the last frame, [X; ΔX]; else X alone.")
    tolerance: float = setting(1.02, "τ, the factor on the cross-entropy under all tokens that is still safe.", 1)
    lr: float = option(0.02, "Learning rate of Adam at the start.", 0)
    schedule: Schedule = setting("constant", "Learning rate: 'constant', or 'cosine' to 0.")
    advantage: Advantage = setting(
        "split", "'split': Eq. 7; 'group', 'leave_one_out', 'no_std': −CE within the group, no sparsity reward."
    )
    score_decay: float = setting(0.0, "Weight of the logits' variance in the loss; it keeps the policy exploring.", 0)
    least_safe: int = setting(1, "With fewer safe rollouts in a group, each has advantage ΔCE·S; Eq. 7 has 1.", 1)
    kept_low: float = setting(0.0, "Lower edge of the band in which the mean keep probability is free.", 0, 1)
    kept_high: float = setting(1.0, "Upper edge of that band.", 0, 1)
    pseudo_steps: int = option(0, "First steps, on pseudo-videos: captioned still images, each held a while (§4.4).", 0)
    pseudo_tolerance: float = setting(1.01, "τ during those steps.", 1)

    @property
    def own_rate(self) -> bool:
        """True if the rate is not drawn from a given range."""
        return not self.rate_high

    def removed(self) -> dict[str, Any]:
        """Return the constant that has replaced each former setting."""
        return super().removed() | {"slack": 0.0, "band_weight": 1.0}

    def rules(self, variant: str) -> tuple[IdleRule, ...]:
        """Return when settings change nothing beside the others, why, and which."""
        rewarded, control = self.objective == "policy_gradient", self.objective
        return (
            *super().rules(variant),
            (control in WITHOUT_DRAWS, f"draws masks, and objective {control!r} has none", ("rollouts",)),
            (not rewarded, f"is about rewards, and objective {control!r} has none", ("advantage", "tolerance")),
            (self.advantage != "split", "belongs to advantage 'split'", ("tolerance", "pseudo_tolerance")),
            (not self.pseudo_steps, "is for pseudo_steps", ("pseudo_tolerance",)),
        )

    @property
    def masks(self) -> int:
        """Masks under which the frozen model predicts a caption."""
        return WITHOUT_DRAWS.get(self.objective, self.rollouts)

    def __post_init__(self) -> None:
        super().__post_init__()
        least, low, high = self.least_safe, self.kept_low, self.kept_high
        check(
            (
                self.objective == "soft_topk" and not self.rate_high,
                "objective 'soft_topk' needs a number of tokens: set rate_low and rate_high",
            ),
            (
                self.advantage != "split" and least > 1,
                f"least_safe belongs to 'split', got advantage {self.advantage!r}",
            ),
            (
                self.rate_high and (low > 0 or high < 1),
                "with rate_low the policy's own rate is unused: leave kept_low out",
            ),
            (least > self.rollouts, f"least_safe is {least}, more than the {self.rollouts} rollouts of a group"),
            (low >= high, f"kept_low {low} is not below kept_high {high}"),
        )


@dataclass(frozen=True)
class VisionSelectorConfig(ScoreConfig):
    """Settings of the training of `visionselector`: SCORE's but for those of its network, which are `fixed`."""

    fixed: ClassVar[tuple[str, ...]] = ("hidden", "residual")
    rates: ClassVar[tuple[str, ...]] = ("lr",)

    objective: Objective = setting(
        "soft_topk", "'soft_topk', its own; 'policy_gradient', as SCORE is trained; or a control, as for all trainers."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_fixed("is SCORE's; visionselector has its own network: leave it out")


CONFIGS: dict[str, type[CaCoVIDConfig] | type[ScoreConfig]] = {
    "cacovid": CaCoVIDConfig,
    "score": ScoreConfig,
    "sieve": SieveConfig,
    "visionselector": VisionSelectorConfig,
}

SETTINGS: dict[tuple[str, str], dict[str, Any]] = {
    ("cacovid", "paper"): {"world": "sparse", "ratio": 0.083, "frame_rollouts": 0, "steps": 1200, "frames": 32},
    ("cacovid", "ours"): {
        "ratio": 0.083,
        "frame_rollouts": 0,
        "prompts_per_step": 16,
        "score_decay": 0.002,
        "head_lr": 0.004,
        "steps": 450,
    },
    ("cacovid", "official"): {
        "world": "sparse",
        "sampler": "official",
        "token_rollouts": 23,
        "advantage": "official",
        "balanced": True,
        "causal": True,
        "iterations": 5,
        "dynamic_ratio": True,
        "steps": 100,
        "frames": 32,
    },
    ("sieve", "ours"): {
        "reward": "agreement",
        "taught": True,
        "blind_reward": "caption",
        "rate_low": 0.06,
        "rate_high": 0.15,
        "frame_rollouts": 0,
        "score_decay": 0.002,
        "head_lr": 0.004,
        "steps": 300,
    },
    ("score", "paper"): {"world": "sparse", "lr": 0.002, "steps": 100, "frames": 128},
    ("score", "ours"): {
        "world": "sparse",
        "hidden": 256,
        "advantage": "group",
        "rate_low": 0.05,
        "rate_high": 0.25,
        "lr": 0.001,
        "schedule": "cosine",
        "score_decay": 0.003,
        "steps": 150,
    },
    ("visionselector", "ours"): {
        "world": "sparse",
        "rate_low": 0.05,
        "rate_high": 0.25,
        "lr": 0.01,
        "schedule": "cosine",
        "steps": 300,
    },
    ("visionselector", "official"): {
        "world": "sparse",
        "rate_low": 0.2,
        "rate_high": 0.2,
        "lr": 0.01,
        "schedule": "cosine",
        "steps": 300,
    },
}
"""Defaults that a variant changes; the settings of a run override them."""


def config_of(method: str, variant: str, settings: dict[str, Any]) -> CaCoVIDConfig | ScoreConfig:
    """Return the configuration of a training: a variant's defaults, and the settings that differ from them.

    Raises
    ------
    UnknownNameError, TrainingError
        If there is no such method, variant or setting, or a value cannot be used.
    """
    if method not in CONFIGS:
        raise UnknownNameError("trainer", method, CONFIGS)
    if (method, variant) not in SETTINGS:
        raise UnknownNameError(f"variant of {method}", variant, [v for m, v in SETTINGS if m == method])
    config = CONFIGS[method]
    if unknown := settings.keys() - {item.name for item in fields(config)}:
        raise unknown_setting(config, min(unknown))
    usual = SETTINGS[method, variant]
    made = config(**usual | settings)
    for name, reason in made.idle(variant).items():
        if settings.get(name, default := usual.get(name, getattr(config, name))) != default:
            raise TrainingError(f"{name} {reason}: leave it out")
    return made
