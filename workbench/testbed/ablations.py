"""Ablations of both papers' training on the testbed: conditions and tables.

CaCoVID's tables are of variant "ours" from nothing, in the dense world under the deep model, long enough to have
learned; those of literal variants, and SCORE's, are of the sparse world under the shallow model. Rollouts, not prompts,
are what training costs, so conditions have equal rollouts unless their label or the table's text says otherwise.
`BASE` draws three tokens of every frame by OCSS with λ = 2, and has a pull to ½ of .002.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

STEPS = 270
"""CaCoVID's base: 4,320 prompts of 24 rollouts."""
SHALLOW = "testbed:shallow"


@dataclass(frozen=True)
class AblationCondition:
    """One line of a table: its label, and a trainer's settings on top of the variant's.

    Parameters
    ----------
    probes : bool
        Also give the policy another question, and spend the budget in the other ways it knows.
    model : str
        The testbed's model that answers.
    """

    label: str
    settings: dict[str, Any]
    variant: str = "ours"
    probes: bool = False
    model: str = "testbed"


@dataclass(frozen=True)
class AblationTable:
    """Conditions against the first of them.

    Parameters
    ----------
    paper : str
        Where the papers have it and what they find, or why it is here.
    seeds : int
        Training seeds, 0 = as many as the command is told: one where no claim rests on the table.
    probes : bool
        Show what conditions with probes do when given another question, and with other ways of spending the budget.
    transfer : bool
        Show every condition in the twin world, and with the second answerer where the command has one.
    """

    name: str
    method: str
    paper: str
    conditions: tuple[AblationCondition, ...]
    seeds: int = 0
    probes: bool = False
    transfer: bool = False

    def count(self, seeds: int) -> int:
        """Return how many seeds are trained where the command is told `seeds`."""
        return min(self.seeds or seeds, seeds)


def _ours(label: str, probes: bool = False, **changed: Any) -> AblationCondition:
    return AblationCondition(label, {"steps": STEPS, "log_every": 30} | changed, probes=probes)


def _replayed(label: str, **changed: Any) -> AblationCondition:
    """Return a condition of five iterations, so on a fifth of the prompts."""
    return _ours(label, steps=STEPS // 5, iterations=5, log_every=6, **changed)


def _body(label: str, body: str, **changed: Any) -> AblationCondition:
    return _ours(label, body=body, head_lr=1e-3, **changed)


def _literal(label: str, variant: str = "paper", **changed: Any) -> AblationCondition:
    steps = {"steps": 400} if variant == "paper" else {}
    return AblationCondition(label, steps | changed, variant, probes=True, model=SHALLOW)


def _score(label: str, variant: str = "ours", **changed: Any) -> AblationCondition:
    return AblationCondition(label, changed, variant, model=SHALLOW)


LOOKING = _ours("the first look, then CPO", probes=True, start="first_look")
BASE = _ours("CPO from nothing", probes=True)
DISTILLED: dict[str, Any] = {"objective": "distil"}

TABLES: tuple[AblationTable, ...] = (
    AblationTable(
        "sampling",
        "cacovid",
        "CaCoVID Table 3: OCSS 58.5, multinomial 55.1, random 54.4; per video 57.2.",
        (
            BASE,
            _ours("multinomial", sampler="multinomial"),
            _ours("random", sampler="random"),
            _ours("OCSS over the whole video, as many tokens", over="video"),
        ),
        seeds=1,
    ),
    AblationTable(
        "ratio",
        "cacovid",
        "CaCoVID Table 3: r 1 / 2 / 5 %: 58.3 / 58.5 / 57.3. At one token a frame OCSS is the multinomial.",
        (
            BASE,
            _ours("one token of every frame", ratio=1 / 36),
            _ours("two tokens", ratio=2 / 36),
            _ours("four tokens", ratio=4 / 36),
        ),
    ),
    AblationTable(
        "width",
        "cacovid",
        "λ, the width of a sub-space in multiples of what is drawn (the paper has 2).",
        (BASE, _ours("λ 1", width=1.0), _ours("λ 4", width=4.0)),
        seeds=1,
    ),
    AblationTable(
        "pull",
        "cacovid",
        "The pull to ½, which neither paper has: it takes back growth of the scores that no reward supports.",
        (
            BASE,
            _ours("none", score_decay=0.0),
            _ours("three times as strong", score_decay=0.006),
            _ours("entropy floor of .5 nats instead", score_decay=0.0, entropy_floor=0.5),
        ),
    ),
    AblationTable(
        "exploration",
        "cacovid",
        "CaCoVID Table 4: 57.1; with ISF 57.3; with ISF and ER 58.1; with all three 58.5.",
        (
            BASE,
            _ours("ISF", blind_filter=True),
            _replayed("ER: five iterations a prompt, a fifth of the prompts"),
            _replayed("ISF + ER", blind_filter=True),
            _replayed("ISF + ER + DSR", blind_filter=True, dynamic_ratio=True),
            _replayed("ER, kept and dropped balanced", balanced=True),
            _replayed("five iterations, each with its own rollouts only", replay=False),
        ),
        seeds=1,
    ),
    AblationTable(
        "dynamic_ratio",
        "cacovid",
        "DSR's thresholds (the release has .125 / .875), and what a moving ratio does to replay.",
        (
            _replayed("ER at a fixed ratio"),
            _replayed(".125 / .875", dynamic_ratio=True),
            _replayed(".25 / .75", dynamic_ratio=True, ratio_low=0.25, ratio_high=0.75),
            _replayed(".125 / .875, without replay", dynamic_ratio=True, replay=False),
            _replayed(".125 / .875, kept and dropped balanced", dynamic_ratio=True, balanced=True),
        ),
        seeds=1,
    ),
    AblationTable(
        "remedies",
        "cacovid",
        "Other rewards and advantages, and rollouts over frames.",
        (
            BASE,
            _ours("agreement with the model's own answer, no labels", reward="agreement"),
            _ours("margin instead of 0/1", reward="margin"),
            _ours("advantage without std", advantage="no_std"),
            _ours("leave-one-out advantage", advantage="leave_one_out"),
            _ours("rates 3 to 25 %", rate_low=1 / 36, rate_high=0.25),
            _ours("kept and dropped balanced", balanced=True),
            _ours("frame rollouts, a quarter of all", frame_rollouts=6, token_rollouts=18),
        ),
        seeds=1,
    ),
    AblationTable(
        "match",
        "cacovid",
        "How words and tokens meet in the question path, at equal size; the base sums over words.",
        (
            BASE,
            _ours("softmax over words", match="softmax"),
            _ours("cross-attention into the network", match="cross_attention", match_width=96),
            _ours("mean of the words", match="mean"),
        ),
        seeds=1,
    ),
    AblationTable(
        "start",
        "cacovid",
        "Where the policy starts, and learning without RL (CaCoVID Figure 1: attention against contribution), in equal "
        "minutes of one core: an objective has as many steps as the first row takes time for.",
        (
            BASE,
            _ours("the first look alone", start="first_look", steps=1, log_every=1, head_lr=0.0),
            LOOKING,
            _ours("distilled from the attention of the first layer that sees the video", **DISTILLED, steps=415),
            _ours("distilled from an oracle", teacher="oracle", **DISTILLED, steps=2000),
            _ours("straight-through", objective="straight_through", steps=128),
            _ours(
                "differentiable top-k (VisionSelector)",
                objective="soft_topk",
                steps=168,
                head_lr=5e-4,
                rate_low=0.05,
                rate_high=0.25,
            ),
        ),
        transfer=True,
    ),
    AblationTable(
        "teachers",
        "cacovid",
        "Other teachers, as many steps.",
        (
            BASE,
            _ours("distilled from mean attention", teacher="attention", **DISTILLED),
            _ours("a quarter of the steps distils, then CPO", warmup_steps=STEPS // 4),
        ),
        seeds=1,
    ),
    AblationTable(
        "allocation",
        "cacovid",
        "CaCoVID Table 5: FrameAvg 57.4, FrameAda 58.1, FrameAda + ST 58.5 on VideoMME. And the wrong question given.",
        (BASE, LOOKING),
        probes=True,
        seeds=1,
    ),
    AblationTable(
        "bodies",
        "cacovid",
        "The paper's policy is one decoder layer over the prompt.",
        (
            BASE,
            _body("decoder layer", "layer"),
            _body("decoder layer, causal", "layer", causal=True),
            _body("without SwiGLU", "attention"),
            _body("within frames and to the text", "local"),
            _body("two decoder layers", "layer", depth=2),
        ),
        seeds=1,
    ),
    AblationTable(
        "literal",
        "cacovid",
        "The paper's own equations, in the sparse world under the shallow model, in 400 steps unless the row says "
        "otherwise; `official` has 100 of five iterations.",
        (
            _literal("paper"),
            _literal("paper, one token a frame", ratio=1 / 36),
            _literal("paper + pull", score_decay=0.002),
            _literal("paper, replay at a fixed ratio", iterations=5, steps=80),
            _literal("paper, replay, balanced", iterations=5, steps=80, balanced=True),
            _literal("paper, replay at a moving ratio", iterations=5, steps=80, dynamic_ratio=True),
            _literal("official", "official"),
            _literal("paper, with the question path of ours as its network", body="question"),
            _literal("paper, margin instead of 0/1", reward="margin"),
            _literal("paper, three times the steps", steps=1200),
        ),
        probes=True,
    ),
    AblationTable(
        "curriculum",
        "score",
        "SCORE Table 4, at 10 %: pseudo 55.7, pseudo then real 57.0.",
        (
            _score("real", schedule="constant"),
            _score("pseudo", schedule="constant", pseudo_steps=150),
            _score("half pseudo, then real", schedule="constant", pseudo_steps=75),
        ),
        seeds=1,
    ),
    AblationTable(
        "residual",
        "score",
        "SCORE Table 5, at 10 %: 62.0 without the residual, 63.6 with it.",
        (_score("[X; ΔX]"), _score("X alone", residual=False)),
        seeds=1,
    ),
    AblationTable(
        "score_literal",
        "score",
        "SCORE's own equations: the learning rate and the number of videos a step.",
        (
            _score("lr .002, 8 videos a step", "paper"),
            _score("lr .02, 8 videos", "paper", lr=0.02),
            _score("lr .002, 2 videos, as many videos", "paper", prompts_per_step=2, steps=400),
            _score("lr .02, 2 videos, as many videos (as printed)", "paper", lr=0.02, prompts_per_step=2, steps=400),
        ),
    ),
    AblationTable(
        "score_advantage",
        "score",
        "Eq. 7 and what else a group can be scored by; rate of the paper or of deployment.",
        (
            _score("group-normalised −CE, rates 5 to 25 %"),
            _score("leave-one-out", advantage="leave_one_out"),
            _score("no std", advantage="no_std"),
            _score("split advantage, rates 5 to 25 %", advantage="split"),
            _score("split advantage, the policy's own rate", advantage="split", rate_low=0.0, rate_high=0.0),
        ),
        seeds=1,
    ),
    AblationTable(
        "score_controls",
        "score",
        "Learning without RL.",
        (
            _score("policy gradient"),
            _score("straight-through, as many rollouts", objective="straight_through"),
            _score("distilled from the caption's attention, no rollouts", objective="distil", teacher="attention"),
            _score("distilled from the caption's first look, no rollouts", objective="distil"),
        ),
        seeds=1,
    ),
)
