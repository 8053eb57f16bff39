"""Training `sieve`: CaCoVID's policy optimisation, for every budget, with the question and without it at once.

Per prompt a rate is drawn log-uniformly between `rate_low` and `rate_high`, which the policy is told. Its rollouts are
drawn without the question for `question_dropped` of the prompts, else with it, and every group of rewards teaches both
ways of reading: the one that drew the masks by CPO, the other one by the same masks and advantages, as if it had drawn
them. So no prompt is lost to either, and each learns from masks that it would seldom draw itself.

With `taught`, rewards teach the reading without the question alone, and `teacher` the other one, on every prompt. Its
loss is divided by the number of tokens, as CPO's is, so that neither drowns the other in what the readings share.

The reward "agreement" needs no labels: the frozen LLM's own answer under all tokens is the one to reach.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from vidsieve.training.advantages import BY_NAME, over_finite
from vidsieve.training.cacovid import CaCoVIDTrainer, Prompted
from vidsieve.training.controls import teacher_scores
from vidsieve.training.losses import action_log_probs, cpo_loss
from vidsieve.training.settings import SieveConfig
from vidsieve.training.trainer import StepResult
from vidsieve.types import VideoTokens


class SieveTrainer(CaCoVIDTrainer):
    """CPO with a budget and a question that may be absent; see the module's text."""

    config: SieveConfig

    def policy_logits(self, prompt: Prompted, video: VideoTokens) -> tuple[Tensor, Tensor]:
        """Return the logits of tokens (N, 2) and of frames (T, 2) that masks are drawn from, at the prompt's rate."""
        if not prompt.memory:  # one reading for all iterations: the log-probabilities in a group are of one
            drawn = float(torch.rand((), generator=self.generator))
            prompt.asked = drawn >= self.config.question_dropped and not self.config.taught
        logits: tuple[Tensor, Tensor] = self.run_policy(video, prompt.ratio, prompt.asked)
        return logits

    def distil(
        self, prompt: Prompted, video: VideoTokens, teacher: Tensor, token_logits: Tensor, frame_logits: Tensor
    ) -> Tensor:
        """Return the loss of both readings against a teacher's scores."""
        other = self.run_policy(video, prompt.ratio, not prompt.asked)
        return super().distil(prompt, video, teacher, token_logits, frame_logits) + super().distil(
            prompt, video, teacher, *other
        )

    def cpo(self, prompt: Prompted, video: VideoTokens, token_logits: Tensor, frame_logits: Tensor) -> StepResult:
        """Return the CPO loss, with that of the reading that did not draw the masks; None where no reward is finite."""
        result, c = super().cpo(prompt, video, token_logits, frame_logits), self.config
        if result.loss is None:
            return result
        logits, frames = self.run_policy(video, prompt.ratio, not prompt.asked)
        if c.taught:
            teacher = teacher_scores(prompt.rollouts, c.teacher, prompt.sample.targets)
            loss = super().distil(prompt, video, teacher, logits, frames) / video.num_tokens
        else:
            known = prompt.memory["tokens"]
            advantage = over_finite(BY_NAME[c.advantage], known.rewards)
            drawn = action_log_probs(logits.detach(), known.masks)
            loss = cpo_loss(logits, drawn, known.masks, advantage, balanced=c.balanced, kl_weight=c.score_decay)
        return replace(result, loss=result.loss + loss)
