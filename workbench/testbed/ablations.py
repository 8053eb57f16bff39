"""Ablations of both papers' training on the testbed: conditions and tables.

CaCoVID's tables start cold: body "question" sees the mean of the LLM's first look over the words asked, and must learn
which of them count. With the strongest one in sight a single step of training is nearly enough (table "start"), and no
ingredient could show; without any first look nothing is learned in the time there is. Rollouts, not prompts, are what
training costs, so conditions have equal rollouts unless their label says otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

COLD = {"looks": "mean", "reward": "choice", "steps": 40, "log_every": 4}
"""CaCoVID's base: 320 prompts, too few to be done: what helps shows in how far a run has come."""
REPLAYED = COLD | {"steps": 8, "iterations": 5, "log_every": 1}
"""As many rollouts on a fifth of the prompts."""
TWO_STAGE = {"steps": 30, "log_every": 3}
"""SCORE's base: 240 videos."""


@dataclass(frozen=True)
class AblationCondition:
    """One line of a table: its label, and a trainer's settings on top of the variant's.

    Parameters
    ----------
    probes : bool
        Also give the policy another question, and spend the budget in the other ways it knows.
    """

    label: str
    settings: dict[str, Any]
    variant: str = "ours"
    probes: bool = False


@dataclass(frozen=True)
class AblationTable:
    """Conditions against the first of them.

    Parameters
    ----------
    paper : str
        Where the papers have it and what they find, or why it is here.
    seeds : int
        Training seeds, 0 = as many as the command is told.
    curves : bool
        Keep the learning curves.
    probes : bool
        Show what conditions with probes do when given another question, and with other ways of spending the budget.
    """

    name: str
    method: str
    paper: str
    conditions: tuple[AblationCondition, ...]
    seeds: int = 0
    curves: bool = False
    probes: bool = False

    def count(self, seeds: int) -> int:
        """Return how many seeds are trained where the command is told `seeds`."""
        return min(self.seeds or seeds, seeds)


def _cold(label: str, probes: bool = False, **changed: Any) -> AblationCondition:
    return AblationCondition(label, COLD | changed, probes=probes)


def _replayed(label: str, **changed: Any) -> AblationCondition:
    return AblationCondition(label, REPLAYED | changed)


def _body(label: str, body: str, **changed: Any) -> AblationCondition:
    return AblationCondition(label, COLD | {"body": body, "steps": 80, "log_every": 8} | changed)


def _score(label: str, **changed: Any) -> AblationCondition:
    return AblationCondition(label, TWO_STAGE | changed)


def _pairs(label: str, **changed: Any) -> AblationCondition:
    return _cold(label, ratio=2 / 36, **changed)


BASE = _cold("OCSS, per frame, one token a frame, λ 2", probes=True)
PAIRS = _pairs("OCSS, per frame, two tokens a frame, λ 2")
REPLAY = _replayed("ER: five iterations a prompt, a fifth of the prompts")

TABLES: tuple[AblationTable, ...] = (
    AblationTable(
        "sampling",
        "cacovid",
        "CaCoVID Table 3: OCSS 58.5, multinomial 55.1, random 54.4; per video 57.2. At two tokens a frame: for one, "
        "OCSS is the multinomial, since a sub-space's mass times the share inside it is the token's own.",
        (
            PAIRS,
            _pairs("multinomial", sampler="multinomial"),
            _pairs("random", sampler="random"),
            _pairs("OCSS over the whole video, as many tokens", over="video"),
        ),
        curves=True,
    ),
    AblationTable(
        "ratio",
        "cacovid",
        "CaCoVID Table 3: r 1 / 2 / 5 %: 58.3 / 58.5 / 57.3.",
        (BASE, PAIRS, _cold("four tokens a frame", ratio=4 / 36)),
    ),
    AblationTable(
        "width",
        "cacovid",
        "λ, the width of a sub-space in multiples of what is drawn (the paper has 2).",
        (PAIRS, _pairs("λ 1", width=1.0), _pairs("λ 4", width=4.0)),
    ),
    AblationTable(
        "exploration",
        "cacovid",
        "CaCoVID Table 4: 57.1; with ISF 57.3; with ISF and ER 58.1; with all three 58.5.",
        (
            BASE,
            _cold("ISF", blind_filter=True),
            REPLAY,
            _replayed("ISF + ER", blind_filter=True),
            _replayed("ISF + ER + DSR", blind_filter=True, dynamic_ratio=True),
        ),
    ),
    AblationTable(
        "prompts",
        "cacovid",
        "What replay is worth where prompts are scarce: 64 of them.",
        (
            _cold("one iteration: 8 optimiser steps", steps=8, log_every=1),
            _replayed("five iterations, each with its own rollouts only: 40 optimiser steps", replay=False),
            _replayed("five iterations with replay: 40 optimiser steps"),
        ),
    ),
    AblationTable(
        "dynamic_ratio",
        "cacovid",
        "DSR's thresholds (the release has .125 / .875).",
        (
            REPLAY,
            _replayed(".125 / .875", dynamic_ratio=True),
            _replayed(".25 / .75", dynamic_ratio=True, ratio_low=0.25, ratio_high=0.75),
            _replayed(".33 / .67", dynamic_ratio=True, ratio_low=0.33, ratio_high=0.67),
            _replayed(".25 / .75, without replay", dynamic_ratio=True, ratio_low=0.25, ratio_high=0.75, replay=False),
            _replayed("ER at a ratio of .06, where .25 / .75 ends", ratio=2 / 36),
        ),
        curves=True,
    ),
    AblationTable(
        "remedies",
        "cacovid",
        "Remedies of the literature for sparse, unequal or collapsing groups.",
        (
            BASE,
            _cold("margin instead of 0/1", reward="margin"),
            _cold("advantage without std", advantage="no_std"),
            _cold("leave-one-out advantage", advantage="leave_one_out"),
            _cold("no pull to ½", score_decay=0.0),
            _cold("entropy floor of .69 nats instead", score_decay=0.0, entropy_floor=0.69),
            _cold("rates 3 to 25 %", rate_low=1 / 36, rate_high=0.25),
            _cold("kept and dropped balanced", balanced=True),
            _cold("no frame rollouts", frame_rollouts=0, token_rollouts=32),
        ),
    ),
    AblationTable(
        "start",
        "cacovid",
        "Where the policy starts: from nothing, from the LLM's first look, from a teacher.",
        (
            BASE,
            _cold("the strongest first look in sight", looks="all", trust=0.0),
            _cold("the same, one step", looks="all", trust=0.0, steps=1, log_every=1),
            _cold("first look, trust .25 (ours)", looks="all", probes=True),
            _cold("no first look", looks="none"),
            _cold("warm-up: 20 of 40 steps distil the first look, no rollouts in them", warmup_steps=20),
        ),
    ),
    AblationTable(
        "allocation",
        "cacovid",
        "CaCoVID Table 5: FrameAvg 57.4, FrameAda 58.1, FrameAda + ST 58.5 on VideoMME. And the wrong question given.",
        (_cold("first look, trust .25 (ours)", looks="all", probes=True), BASE),
        probes=True,
    ),
    AblationTable(
        "controls",
        "cacovid",
        "CaCoVID Figure 1, attention against contribution; and learning without RL.",
        (
            BASE,
            _cold("straight-through, as many rollouts", objective="straight_through", token_rollouts=32),
            _cold("distilled from mean attention, no rollouts", objective="distil", teacher="attention"),
            _cold("distilled from the first look, no rollouts", objective="distil"),
        ),
    ),
    AblationTable(
        "bodies",
        "cacovid",
        "The paper's policy is one decoder layer over the prompt. Twice the base.",
        (
            _body("question path", "question"),
            _body("decoder layer", "layer"),
            _body("without SwiGLU", "attention"),
            _body("within frames and to the text", "local"),
            _body("two decoder layers", "layer", depth=2),
            _body("three decoder layers", "layer", depth=3),
        ),
    ),
    AblationTable(
        "question_path",
        "cacovid",
        "Can a body read the question at all? Distilled from the first look; the release is causal in effect.",
        (
            _body("question path", "question", objective="distil"),
            _body("decoder layer, bidirectional", "layer", objective="distil"),
            _body("decoder layer, causal", "layer", objective="distil", causal=True),
            _body("without SwiGLU", "attention", objective="distil"),
            _body("within frames and to the text", "local", objective="distil"),
        ),
    ),
    AblationTable(
        "curriculum",
        "score",
        "SCORE Table 4, at 10 %: pseudo 55.7, pseudo then real 57.0.",
        (
            _score("real", schedule="constant"),
            _score("pseudo", schedule="constant", pseudo_steps=30),
            _score("half pseudo, then real", schedule="constant", pseudo_steps=15),
        ),
    ),
    AblationTable(
        "residual",
        "score",
        "SCORE Table 5, at 10 %: 62.0 without the residual, 63.6 with it.",
        (_score("[X; ΔX]"), _score("X alone", residual=False)),
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
            _score(
                "the same, band .05 to .5", advantage="split", rate_low=0.0, rate_high=0.0, kept_low=0.05, kept_high=0.5
            ),
        ),
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
    ),
    AblationTable(
        "full_length",
        "cacovid",
        "The order of samplers again, six times as long.",
        (
            _cold("OCSS", steps=240, log_every=20),
            _cold("multinomial", steps=240, log_every=20, sampler="multinomial"),
            _cold("random", steps=240, log_every=20, sampler="random"),
        ),
        seeds=3,
    ),
)
