"""How good a policy is while it trains: its own selection, as at inference, on prompts that it never trains on."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from vidsieve import registry
from vidsieve.adapters.adapter import Adapter
from vidsieve.compressors.base import Compressor
from vidsieve.errors import VidsieveError
from vidsieve.policies import Policy
from vidsieve.selection import indices_to_mask
from vidsieve.training.answers import judge
from vidsieve.training.data.samples import Caption, Choice
from vidsieve.training.packing import Packing
from vidsieve.training.processes import Processes
from vidsieve.training.rewards import choice_reward
from vidsieve.training.rollouts import Rollouts
from vidsieve.training.watch import rank_correlation
from vidsieve.types import Selection

PROBES = 4
"""Held-out videos on which the order of tokens is compared from checkpoint to checkpoint."""


def compressor_of(policy: Policy, retention: float) -> Compressor:
    """Return the method that serves a policy, at a retention."""
    made: Compressor = registry.compressors.get(policy.method)(
        policy=policy, retention=retention, variant=policy.config.variant
    )
    return made


@dataclass
class HeldOut:
    """Held-out prompts, and the figure that a policy reaches on them.

    For questions ``eval_accuracy``, higher is better, beside ``eval_accuracy_full`` under all tokens; for captions
    ``eval_ce_excess``, the cross-entropy above the one under all tokens in nats a token, lower is better.

    Parameters
    ----------
    adapter : Adapter
        Of the frozen model.
    data : callable
        ``data(i)`` returns held-out sample i, always the same.
    count : int
        Prompts taken.
    retention : float
        The share of tokens that is kept.
    decode : callable, optional
        Generated ids as text; without it questions without options cannot be judged.
    answer_tokens : int
        Longest generated answer.
    """

    adapter: Adapter
    data: Callable[[int], Choice | Caption]
    count: int
    retention: float
    decode: Callable[[Tensor], list[str]] | None = None
    answer_tokens: int = 16
    packing: Packing | None = None
    """How rollouts are packed; default: anew for each prompt."""
    _full: dict[int, float] = field(default_factory=dict, init=False)

    def measure(self, policy: Policy, processes: Processes) -> dict[str, float]:
        """Return the figures of a policy, the prompts shared by the processes, the same figures in each of them."""
        compressor = compressor_of(policy, self.retention)
        rows: list[dict[str, float]] = []
        error: VidsieveError | None = None
        before = policy.training
        policy.eval()
        try:
            rows = [self._row(compressor, number) for number in processes.share(range(self.count))]
        except VidsieveError as met:
            error = met
        finally:
            policy.train(before)
        processes.agree(error)
        rows = processes.in_order(rows)
        return {key: sum(row[key] for row in rows) / len(rows) for key in rows[0]}

    def _row(self, compressor: Compressor, number: int) -> dict[str, float]:
        sample = self.data(number)
        rollouts = Rollouts(self.adapter, sample.inputs, self.packing)
        chosen = compressor.compress(rollouts.video(compressor.needs))
        wanted = [chosen]
        if number not in self._full:  # the frozen model's own figure never changes
            wanted.append(Selection(torch.arange(tokens_of(rollouts))))
        values = self._values(rollouts, sample, wanted)
        full = self._full.setdefault(number, values[-1])
        if isinstance(sample, Caption):
            return {"eval_ce": values[0], "eval_ce_excess": values[0] - full}
        return {"eval_accuracy": values[0], "eval_accuracy_full": full}

    def _values(self, rollouts: Rollouts, sample: Choice | Caption, chosen: list[Selection]) -> list[float]:
        if isinstance(sample, Caption):
            return [float(value) for value in rollouts.caption_ce(chosen)]
        masks = torch.stack([indices_to_mask(s.indices.cpu(), tokens_of(rollouts)) for s in chosen])
        if len(sample.option_ids):
            right = choice_reward(rollouts.option_logits(masks, sample.option_ids), sample.answer)
            return [float(mark) for mark in right]
        texts = self.decode(rollouts.generate(masks, self.answer_tokens)) if self.decode else []
        return [float(judge(sample.kind, text, sample.truth)) for text in texts]

    def scores(self, policy: Policy, number: int) -> Tensor:
        """Return the scores (N,) of a held-out video's tokens, as the policy orders them."""
        compressor = compressor_of(policy, self.retention)
        before = policy.training
        policy.eval()
        try:
            video = Rollouts(self.adapter, self.data(number).inputs).video(compressor.needs)
            scores = compressor.compress(video).scores
        finally:
            policy.train(before)
        if scores is None:  # a budget of all tokens: nothing was scored
            return torch.zeros(video.num_tokens)
        return scores


class Maps:
    """How a policy orders the tokens of a few held-out videos, from one look to the next.

    Every process of a run has its own: a model shared out over them could not encode in one of them alone.
    """

    def __init__(self, held_out: HeldOut, policy: Policy) -> None:
        self.held_out, self.policy = held_out, policy
        self._scores = self._look()

    def _look(self) -> list[Tensor]:
        return [self.held_out.scores(self.policy, number) for number in range(min(PROBES, self.held_out.count))]

    def stability(self) -> float:
        """Return how much of the order of tokens is left since the last look, as a mean rank correlation."""
        before, self._scores = self._scores, self._look()
        pairs = [rank_correlation(a, b) for a, b in zip(before, self._scores, strict=True)]
        return sum(pairs) / len(pairs)


def tokens_of(rollouts: Rollouts) -> int:
    """Return N, the tokens of a prompt's video."""
    return rollouts.encoded.videos[0].features.grid.num_tokens


@dataclass
class Best:
    """The best figure so far, and where."""

    metric: str = ""
    value: float = 0.0
    step: int = 0

    def improved_by(self, figures: dict[str, float], step: int) -> bool:
        """Note the figures of a step; return whether they are better than any before."""
        metric, sign = ("eval_accuracy", 1) if "eval_accuracy" in figures else ("eval_ce_excess", -1)
        if not math.isfinite(figures[metric]):
            return False
        if self.metric and sign * figures[metric] <= sign * self.value:
            return False
        self.metric, self.value, self.step = metric, figures[metric], step
        return True

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for records and checkpoints; empty before the first evaluation."""
        return dict(vars(self)) if self.metric else {}
