"""Training CaCoVID by combinatorial policy optimisation, top to bottom.

Per prompt: draw `token_rollouts` keep-masks by OCSS over token scores and `frame_rollouts` over frame scores,
let the frozen LLM answer under each, turn rewards into group advantages, and take a clipped step on the
log-probability of every keep and drop (Eq. 5-19). Left to issue C: replay over several iterations of a
sample, dynamic ratio, filtering. With one iteration the importance ratio is 1 and the clip is inactive.

Variant "ours" differs from the paper in the policy's body (an explicit question path), and in a pull of
`score_decay` towards a fair coin, since scores otherwise grow without limit over prompts.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from vidsieve.adapters.base import Adapter
from vidsieve.compressors.cacovid import CaCoVIDPolicy
from vidsieve.rl import sampling
from vidsieve.rl.advantages import group_advantage
from vidsieve.rl.losses import action_log_probs, cpo_loss
from vidsieve.rl.rewards import choice_reward, margin_reward
from vidsieve.rl.rollouts import Rollouts
from vidsieve.rl.samples import Choice
from vidsieve.rl.settings import CaCoVIDConfig
from vidsieve.rl.trainer import StepResult, Trainer
from vidsieve.types import Need


class CaCoVIDTrainer(Trainer[Choice]):
    """CPO on multiple-choice prompts; see the module's text."""

    policy: CaCoVIDPolicy
    config: CaCoVIDConfig

    def __init__(self, adapter: Adapter, *args: Any, **kwargs: Any) -> None:
        self.adapter = adapter
        super().__init__(*args, **kwargs)

    def make_optimizer(self) -> torch.optim.Optimizer:
        """Return AdamW with the body at its own rate."""
        body = [p for n, p in self.policy.named_parameters() if n.startswith("layers.") and p.requires_grad]
        rest = [p for n, p in self.policy.named_parameters() if not n.startswith("layers.") and p.requires_grad]
        groups = [{"params": rest, "lr": self.config.head_lr}]
        if body:
            groups.append({"params": body, "lr": self.config.body_lr})
        return torch.optim.AdamW(groups, weight_decay=self.config.weight_decay)

    def learning_rate(self, step: int) -> float:
        """Return a cosine from 1 to 0."""
        return 0.5 + 0.5 * math.cos(math.pi * step / self.config.steps)

    def train_step(self, sample: Choice) -> StepResult:
        """Return the CPO loss of one prompt."""
        c = self.config
        rollouts = Rollouts(self.adapter, sample.inputs)
        video = rollouts.video(frozenset({Need.QUESTION}))
        token_logits, frame_logits = self.policy(video)  # (N, 2), (T, 2)
        token_scores = (token_logits[:, 1] - token_logits[:, 0]).detach()  # (N,)
        frame_scores = (frame_logits[:, 1] - frame_logits[:, 0]).detach()  # (T,)

        token_masks = sampling.token_masks(
            token_scores, video.grid, c.ratio, c.token_rollouts, self.generator,
            sampler=c.sampler, over=c.over, width=c.width,
        )  # (G_t, N)  # fmt: skip
        frame_masks, kept_by_frames = sampling.frame_masks(
            token_scores, frame_scores, video.grid, c.ratio, c.frame_rollouts, self.generator, width=c.width
        )  # (G_f, T), (G_f, N)

        logits = rollouts.option_logits(torch.cat([token_masks, kept_by_frames]), sample.option_ids)  # (G, options)
        right = choice_reward(logits, sample.answer)  # (G,)
        rewards = right if c.reward == "choice" else margin_reward(logits, sample.answer)
        token_rewards, frame_rewards = rewards[: c.token_rollouts], rewards[c.token_rollouts :]

        loss = torch.zeros(())
        for out, masks, reward, balanced in (
            (token_logits, token_masks, token_rewards, c.balanced),
            (frame_logits, frame_masks, frame_rewards, False),
        ):
            advantage = group_advantage(reward)  # (G,)
            old = action_log_probs(out, masks).detach()  # the policy that drew the masks is the current one
            loss = loss + cpo_loss(out, old, masks, advantage, balanced=balanced, kl_weight=c.score_decay)
        probability = token_scores.sigmoid()
        return StepResult(
            loss,
            {
                "reward": float(rewards.mean()), "right": float(right.mean()),
                "dead_groups": float(bool((token_rewards == token_rewards[0]).all())),
                "score_spread": float(token_scores.std()), "keep_probability": float(probability.mean()),
            },
        )  # fmt: skip
