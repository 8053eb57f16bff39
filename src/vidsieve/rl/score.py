"""Training SCORE by group rollouts, top to bottom.

Per video: draw `rollouts` Bernoulli masks at the policy's own rate, let the frozen LLM predict the caption under
each, compare its cross-entropy with the one under all tokens, and take a REINFORCE step with the split
advantage (Eq. 5-9). Left to issue C: the pseudo-video curriculum.

Variant "ours" draws each group's rate from the deployment range (so that training meets the budgets used
later), and scores rollouts by group-normalised −CE instead of the split: a group compares masks of equal rate, so
sparsity needs no reward. A penalty on the logits' variance and a cosine keep it exploring.

A rollout whose reward is not finite has no weight; `skipped` counts videos where that is so of all.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from vidsieve.adapters.base import Adapter
from vidsieve.compressors.score import ScorePolicy
from vidsieve.rl.advantages import finite_mean, group_advantage, leave_one_out, over_finite, split_advantage
from vidsieve.rl.losses import reinforce_loss
from vidsieve.rl.packing import Packing
from vidsieve.rl.rewards import score_rewards
from vidsieve.rl.rollouts import Rollouts
from vidsieve.rl.samples import Caption
from vidsieve.rl.sampling import bernoulli_masks
from vidsieve.rl.settings import ScoreConfig
from vidsieve.rl.trainer import StepResult, Trainer


class ScoreTrainer(Trainer[Caption]):
    """REINFORCE on captions; see the module's text."""

    policy: ScorePolicy
    config: ScoreConfig

    def __init__(self, adapter: Adapter, *args: Any, **kwargs: Any) -> None:
        self.adapter = adapter
        super().__init__(*args, **kwargs)
        self.ce_full: dict[str, float] = {}
        self.packing = Packing(adapter.model, self.config.rollout_tokens)

    def make_optimizer(self) -> torch.optim.Optimizer:
        """Return Adam."""
        return torch.optim.Adam(self.policy.parameters(), lr=self.config.lr)

    def learning_rate(self, step: int) -> float:
        """Return 1, or a cosine from 1 to 0."""
        if self.config.schedule == "constant":
            return 1.0
        return 0.5 + 0.5 * math.cos(math.pi * step / self.config.steps)

    def record(self) -> dict[str, Any]:
        """Return the training record, with what went into one prefill."""
        return super().record() | {"packing": self.packing.record()}

    def train_step(self, sample: Caption) -> StepResult:
        """Return the policy-gradient loss of one video."""
        c = self.config
        rollouts = Rollouts(self.adapter, sample.inputs, self.packing)
        video = rollouts.video()
        logits = self.policy(video)  # (N,)
        if c.rate_high:
            # The rate is given, so the mean is not the policy's to choose. Left in, how many tokens each mask
            # happens to keep is by far the loudest direction of the gradient, and nothing else is learned.
            logits = logits - logits.mean()
        shifted = logits + self._shift(logits.detach())  # (N,), at the group's rate
        masks = bernoulli_masks(shifted.sigmoid(), c.rollouts, self.generator)  # (K, N)
        ce = rollouts.caption_ce(masks)  # (K,)
        metrics = {"ce": finite_mean(ce), "kept": float(masks.float().mean()), "saturated": _saturated(shifted)}
        metrics["score_spread"] = float(logits.detach().std())
        if c.advantage == "split":
            ce_full = self.full_ce(sample, rollouts)
            rewards, sparsity = score_rewards(ce, ce_full, masks, c.tolerance, c.slack)  # ΔCE (K,), S (K,)
            advantage = over_finite(split_advantage, rewards, sparsity)
            metrics |= {"ce_full": ce_full, "safe": float((rewards > 0).float().mean())}
        else:
            rewards = -ce
            advantage = over_finite(group_advantage if c.advantage == "group" else leave_one_out, rewards)
        if not bool(rewards.isfinite().any()):
            return StepResult(None, {"skipped": 1.0}, broken=f"reward of the caption is {float(rewards[0])}")
        metrics["skipped"] = 0.0
        loss = reinforce_loss(shifted, masks, advantage) + c.score_decay * logits.var(correction=0)
        return StepResult(loss, metrics)

    def full_ce(self, sample: Caption, rollouts: Rollouts) -> float:
        """Return CE_base: one prefill of all tokens at a row's first visit, remembered for the passes to come.

        Not part of a checkpoint: the frozen LLM gives a resumed run the same number again.
        """
        if sample.key in self.ce_full:
            return self.ce_full[sample.key]
        found = float(rollouts.caption_ce(rollouts.encoded.everything())[0])
        if sample.key:
            self.ce_full[sample.key] = found
        return found

    def _shift(self, logits: Tensor) -> Tensor:
        """Return the constant that moves the mean keep probability to a rate drawn from the deployment range."""
        c = self.config
        if not c.rate_high:
            return torch.zeros(())
        low, high = torch.tensor([c.rate_low, c.rate_high]).log()
        rate = torch.exp(low + (high - low) * torch.rand((), generator=self.generator))
        below, above = torch.tensor(-40.0) - logits.max(), torch.tensor(40.0) - logits.min()
        for _ in range(40):  # bisection: the mean of a sigmoid grows with the shift
            middle = (below + above) / 2
            if float((logits + middle).sigmoid().mean()) < float(rate):
                below = middle
            else:
                above = middle
        return middle


def _saturated(logits: Tensor) -> float:
    """Return the share of tokens whose keep probability is within 1 % of 0 or 1."""
    return float((logits.detach().abs() > 4.6).float().mean())
