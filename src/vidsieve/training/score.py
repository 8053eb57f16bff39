"""Training SCORE by group rollouts, top to bottom.

Per video: draw `rollouts` Bernoulli masks at the policy's own rate, let the frozen LLM predict the caption under
each, compare its cross-entropy with the one under all tokens, and take a REINFORCE step with the split
advantage (Eq. 5-9). The first `pseudo_steps` see pseudo-videos under `pseudo_tolerance` (§4.4).

Variant "ours" draws each group's rate from the deployment range (so that training meets the budgets used
later), and scores rollouts by group-normalised −CE instead of the split: a group compares masks of equal rate, so
sparsity needs no reward. A penalty on the logits' variance and a cosine keep it exploring.

A rollout whose reward is not finite has no weight; `skipped` counts videos of which none is.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from vidsieve.compressors.score import ScorePolicy
from vidsieve.compressors.visionselector import VisionSelectorPolicy
from vidsieve.errors import TrainingError
from vidsieve.training.advantages import BY_NAME, finite_mean, over_finite, split_advantage
from vidsieve.training.controls import caption_loss, gated, shift_to_sum, softly_selected, teacher_scores
from vidsieve.training.data.samples import Caption
from vidsieve.training.losses import band_distance, distillation_loss, entropy_shortfall, keep_entropy, reinforce_loss
from vidsieve.training.rewards import score_rewards
from vidsieve.training.rollouts import Rollouts
from vidsieve.training.sampling import bernoulli_masks, log_uniform
from vidsieve.training.settings import ScoreConfig
from vidsieve.training.trainer import StepResult, Trainer
from vidsieve.types import Selection, VideoTokens

SATURATED = 4.6
"""Logit beyond which a keep probability is within 1 % of 0 or 1."""


class ScoreTrainer(Trainer[Caption]):
    """REINFORCE on captions; see the module's text."""

    policy: ScorePolicy | VisionSelectorPolicy
    config: ScoreConfig

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.ce_full: dict[str, float] = {}

    def make_optimizer(self) -> torch.optim.Optimizer:
        """Return Adam."""
        return torch.optim.Adam(self.policy.parameters(), lr=self.config.lr)

    def check_data(self) -> None:
        """Refuse captions that one token predicts as well as all do: then every rollout is safe, and all is dropped.

        Raises
        ------
        TrainingError
        """
        c = self.config
        if c.advantage != "split" or c.objective != "policy_gradient":
            return
        rows: list[dict[str, float]] = []
        with self.processes.agreeing():
            for number in self.processes.share(range(c.prompts_per_step)):
                sample = self.data(number)
                rollouts = Rollouts(self.adapter, sample.inputs, self.packing)
                middle = rollouts.num_tokens // 2
                one = float(rollouts.caption_ce([Selection(torch.tensor([middle]))])[0])
                rows.append({"one": one, "full": self.full_ce(sample, rollouts)})
        rows = self.processes.in_order(rows)
        one, full = (finite_mean(torch.tensor([row[name] for row in rows])) for name in ("one", "full"))
        if one <= (c.pseudo_tolerance if c.pseudo_steps else c.tolerance) * full:
            raise TrainingError(
                f"a single token predicts the captions of the first {len(rows)} videos as well as all tokens do "
                f"(cross-entropy {one:.3f} and {full:.3f}): keeping nothing would be rewarded. Take captions that "
                "depend on the video, or advantage 'group' with rate_low and rate_high"
            )

    def learning_rate(self, step: int) -> float:
        """Return 1, or a cosine from 1 to 0."""
        return 1.0 if self.config.schedule == "constant" else super().learning_rate(step)

    @property
    def rollouts(self) -> int:
        """Masks under which the frozen model predicts the caption."""
        return 0 if self.distils else self.config.masks

    def train_step(self, sample: Caption) -> StepResult:
        """Return the loss of one video: a policy gradient, or a control without it."""
        c = self.config
        rollouts = Rollouts(self.adapter, sample.inputs, self.packing)
        video = rollouts.video()
        logits = self.run_policy(video)  # (N,)
        metrics = {"score_spread": float(logits.detach().std())}
        shift, rate = torch.zeros(()), 0.0
        if c.rate_high:
            # The rate is given, so the mean is not the policy's to choose. Left in, the number of tokens that each mask
            # happens to keep is by far the loudest direction of the gradient, and nothing else is learned.
            logits = logits - logits.mean()
            rate = log_uniform(c.rate_low, c.rate_high, self.generator)
            shift = shift_to_sum(logits.detach(), rate * len(logits))
        drawn = logits + shift  # (N,), at the group's rate
        if self.distils:
            # A warm-up's loss is of the size of the rewards', or Adam would hardly move after it.
            scale = 1 if c.objective == "distil" else len(logits)
            loss = distillation_loss(logits, teacher_scores(rollouts, c.teacher)) / scale
        elif c.objective == "soft_topk":
            chosen, constraint = softly_selected(video, logits, rate, self.progress)
            ce = caption_loss(rollouts, [chosen]).mean()
            loss = ce + constraint
            metrics |= {"ce": float(ce.detach()), "constraint": float(constraint.detach())}
        else:
            result = self.rolled_out(sample, rollouts, video, drawn)
            if result.loss is None:
                return result
            loss, metrics = result.loss, metrics | result.metrics
        if c.score_decay:
            loss = loss + c.score_decay * logits.var(correction=0)
        if c.entropy_floor:
            loss = loss + entropy_shortfall(drawn, c.entropy_floor)
        if c.kept_low > 0 or c.kept_high < 1:
            loss = loss + band_distance(logits, c.kept_low, c.kept_high)
        return StepResult(loss, metrics)

    def rolled_out(self, sample: Caption, rollouts: Rollouts, video: VideoTokens, logits: Tensor) -> StepResult:
        """Return the loss of K masks drawn at keep logits (N,); None where no reward is finite."""
        c = self.config
        masks = bernoulli_masks(logits.sigmoid(), c.rollouts, self.generator).to(logits.device)  # (K, N)
        metrics = {
            "kept": float(masks.float().mean()),
            "saturated": float((logits.detach().abs() > SATURATED).float().mean()),
            "entropy": keep_entropy(logits),
        }
        if c.objective == "straight_through":
            loss = caption_loss(rollouts, gated(video, logits, masks)).mean()
            return StepResult(loss, metrics | {"ce": float(loss.detach())})
        ce = rollouts.caption_ce(masks)  # (K,)
        metrics["ce"] = finite_mean(ce)
        if c.advantage == "split":
            ce_full = self.full_ce(sample, rollouts)
            tolerance = c.pseudo_tolerance if self.step < c.pseudo_steps else c.tolerance
            rewards, sparsity = score_rewards(ce, ce_full, masks, tolerance)  # ΔCE (K,), S (K,)
            advantage = over_finite(partial(split_advantage, least_safe=c.least_safe), rewards, sparsity)
            metrics |= {"ce_full": ce_full, "safe": float((rewards > 0).float().mean())}
        else:
            rewards = -ce
            advantage = over_finite(BY_NAME[c.advantage], rewards)
        if not bool(rewards.isfinite().any()):
            return StepResult(None, {"skipped": 1.0}, broken=f"reward of the caption is {float(rewards[0])}")
        metrics |= {"skipped": 0.0, "dead_groups": float(not bool(advantage.any()))}
        return StepResult(reinforce_loss(logits, masks, advantage), metrics)

    def full_ce(self, sample: Caption, rollouts: Rollouts) -> float:
        """Return CE_base: one prefill of all tokens at a row's first visit, remembered for the passes to come.

        Not part of a checkpoint: the frozen LLM gives a resumed run the same number again.
        """
        if sample.key in self.ce_full:
            return self.ce_full[sample.key]
        ce = float(rollouts.caption_ce(rollouts.encoded.everything())[0])
        if sample.key:
            self.ce_full[sample.key] = ce
        return ce
