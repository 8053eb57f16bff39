"""Held-out evaluation in training: the policy's own selection, as at inference, on prompts it is never trained on."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from vidsieve import registry
from vidsieve.adapters.adapter import Adapter
from vidsieve.compressors.base import Compressor
from vidsieve.policies import Policy
from vidsieve.training.data.samples import Caption, Choice
from vidsieve.training.judging import judge
from vidsieve.training.processes import Processes
from vidsieve.training.rewards import choice_reward
from vidsieve.training.rollouts import Packing, Rollouts
from vidsieve.types import Selection

PROBES = 4
"""Held-out videos whose token order is compared from checkpoint to checkpoint."""


@dataclass
class HeldOut:
    """Held-out prompts, and the figures that a policy reaches on them.

    For questions ``eval_accuracy``, higher is better, and ``eval_accuracy_full`` under all tokens; for captions
    ``eval_ce_excess``, the cross-entropy above the one under all tokens in nats a token, lower is better.

    Parameters
    ----------
    adapter : Adapter
        Of the frozen model.
    data : callable
        ``data(i)`` returns held-out sample i, always the same.
    count : int
        Number of prompts.
    retention : float
        Fraction of the tokens kept.
    decode : callable, optional
        Generated ids (G, E) → texts; needed for questions without options.
    answer_tokens : int
        Longest generated answer.
    packing : Packing, optional
        Default: a new one for each prompt.
    """

    adapter: Adapter
    data: Callable[[int], Choice | Caption]
    count: int
    retention: float
    decode: Callable[[Tensor], list[str]] | None = None
    answer_tokens: int = 16
    packing: Packing | None = None
    _full: dict[int, float] = field(default_factory=dict, init=False)
    """Figures under all tokens by prompt: those of the frozen model never change."""
    _scores: list[Tensor] = field(default_factory=list, init=False)

    def measure(self, policy: Policy, processes: Processes) -> dict[str, float]:
        """Return the mean figures of a policy; the processes share the prompts, and all get the same figures."""
        with self._deployed(policy) as compressor, processes.agreeing():
            rows = [self._row(compressor, number) for number in processes.share(range(self.count))]
        rows = processes.in_order(rows)
        return {key: sum(row[key] for row in rows) / len(rows) for key in rows[0]}

    @contextmanager
    def _deployed(self, policy: Policy) -> Iterator[Compressor]:
        """Yield the compressor that serves the policy; for the block the policy is in evaluation mode."""
        before = policy.training
        policy.eval()
        try:
            yield registry.compressors.get(policy.method)(
                policy=policy, retention=self.retention, variant=policy.config.variant
            )
        finally:
            policy.train(before)

    def _row(self, compressor: Compressor, number: int) -> dict[str, float]:
        sample = self.data(number)
        rollouts = Rollouts(self.adapter, sample.inputs, self.packing)
        selections = [compressor.compress(rollouts.video(compressor.needs))]
        if number not in self._full:
            selections.append(Selection(torch.arange(rollouts.num_tokens)))
        values = self._values(rollouts, sample, selections)
        full = self._full.setdefault(number, values[-1])
        if isinstance(sample, Caption):
            return {"eval_ce": values[0], "eval_ce_excess": values[0] - full}
        return {"eval_accuracy": values[0], "eval_accuracy_full": full}

    def _values(self, rollouts: Rollouts, sample: Choice | Caption, selections: list[Selection]) -> list[float]:
        """Return the cross-entropy or the score of the answer under each selection."""
        if isinstance(sample, Caption):
            return [float(value) for value in rollouts.caption_ce(selections)]
        if len(sample.option_ids):
            right = choice_reward(rollouts.option_logits(selections, sample.option_ids), sample.answer)
            return [float(value) for value in right]
        texts = self.decode(rollouts.generate(selections, self.answer_tokens)) if self.decode else []
        return [float(judge(sample.kind, text, sample.truth)) for text in texts]

    def stability(self, policy: Policy) -> float:
        """Return the mean rank correlation of a policy's scores with those of the last call; NaN for the first.

        Every process of a run calls it: a sharded model could not encode in one of them alone.
        """
        before, self._scores = self._scores, []
        with self._deployed(policy) as compressor:
            for number in range(min(PROBES, self.count)):
                video = Rollouts(self.adapter, self.data(number).inputs).video(compressor.needs)
                scores = compressor.compress(video).scores
                # A budget of all tokens needs no scores.
                self._scores.append(torch.zeros(video.num_tokens) if scores is None else scores)
        pairs = [rank_correlation(a, b) for a, b in zip(before, self._scores, strict=False)]
        return sum(pairs) / len(pairs) if pairs else math.nan


def ranks(values: Tensor) -> Tensor:
    """Return the ranks (N,) float64 of values (N,), from 1; equal values share their mean rank."""
    _, inverse, counts = torch.unique(values, sorted=True, return_inverse=True, return_counts=True)
    ends = counts.cumsum(0).double()
    means: Tensor = ends - (counts.double() - 1) / 2
    return means[inverse]


def rank_correlation(a: Tensor, b: Tensor) -> float:
    """Return Spearman's rank correlation of two (N,); 0 where one of them is constant."""
    x, y = ranks(a), ranks(b)
    x, y = x - x.mean(), y - y.mean()
    scale = float((x.square().sum() * y.square().sum()).sqrt())
    return float((x * y).sum()) / scale if scale > 0 else 0.0


@dataclass
class Best:
    """The best figure so far, and its step."""

    metric: str = ""
    value: float = 0.0
    step: int = 0

    def improved_by(self, figures: dict[str, float], step: int) -> bool:
        """Take the figures of a step if they are better than any before; return True if so."""
        metric, sign = ("eval_accuracy", 1) if "eval_accuracy" in figures else ("eval_ce_excess", -1)
        if not math.isfinite(figures[metric]):
            return False
        if self.metric and sign * figures[metric] <= sign * self.value:
            return False
        self.metric, self.value, self.step = metric, figures[metric], step
        return True

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for records and checkpoints; empty before the first evaluation."""
        return asdict(self) if self.metric else {}
