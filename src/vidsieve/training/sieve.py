"""Training `sieve`, for every budget: with the question by a teacher, without it by CaCoVID's policy optimisation.

Per prompt a rate is drawn log-uniformly between `rate_low` and `rate_high`, which the policy is told.

By default (`taught`) a teacher, the LLM's own attention, teaches the reading with the question on every prompt, and the
rollouts, drawn without the question, teach the other one. The teacher's loss is divided by the number of tokens, as
CPO's is, so that neither drowns the other in what the readings share. Rollouts without the question are rewarded by
minus the cross-entropy of the video's caption, which tells of everything that may be asked about (`blind_reward`).

Without `taught` and with rewards of answers alone the rollouts are drawn without the question for `question_dropped`
of the prompts, else with it, and every group of rewards teaches both ways of reading: the one that drew the masks by
CPO, the other one by the same masks and advantages, as if it had drawn them. The reward "agreement" needs no labels:
the frozen LLM's own answer under all tokens is the one to reach.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from vidsieve.errors import TrainingError
from vidsieve.training.advantages import BY_NAME, over_finite
from vidsieve.training.cacovid import CaCoVIDTrainer, Prompted
from vidsieve.training.controls import teacher_scores
from vidsieve.training.losses import action_log_probs, cpo_loss
from vidsieve.training.rollouts import Rollouts
from vidsieve.training.settings import SieveConfig
from vidsieve.training.trainer import StepResult
from vidsieve.types import VideoTokens


class SieveTrainer(CaCoVIDTrainer):
    """CPO with a budget and a question that may be absent; see the module's text."""

    config: SieveConfig

    def policy_logits(self, prompt: Prompted, video: VideoTokens) -> tuple[Tensor, Tensor]:
        """Return the logits of tokens (N, 2) and of frames (T, 2) that masks are drawn from, at the prompt's rate."""
        if not prompt.memory:  # one reading for all iterations: the log-probabilities in a group are of one
            prompt.asked = float(torch.rand((), generator=self.generator)) >= 1 - self.config.asking
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

    def rewards(self, prompt: Prompted, keep_masks: Tensor) -> tuple[Tensor, Tensor]:
        """Return the reward of each keep-mask (G, N), and how right an answer is under it, NaN where none is given."""
        if prompt.asked or not self.config.captioned:
            return super().rewards(prompt, keep_masks)
        if prompt.sample.caption is None:
            raise TrainingError("blind_reward 'caption' needs a caption with every question: give one, or set 'answer'")
        # The video is encoded already.
        ready = self.adapter.ready_features(prompt.rollouts.encoded.videos[0].features)
        inputs = dict(prompt.sample.caption.inputs, mm_encoder_outputs=ready)
        reward = -Rollouts(self.adapter, inputs, self.packing).caption_ce(keep_masks)
        return reward, torch.full_like(reward, torch.nan)

    def cpo(self, prompt: Prompted, video: VideoTokens, token_logits: Tensor, frame_logits: Tensor) -> StepResult:
        """Return the CPO loss, with that of the other reading if it learns too; None where no reward is finite."""
        result, c = super().cpo(prompt, video, token_logits, frame_logits), self.config
        if result.loss is None and c.captioned and not prompt.asked:
            return replace(result, broken="the caption's cross-entropy is not finite")
        if result.loss is None or (c.captioned and not c.teaches):
            return result
        logits, frames = self.run_policy(video, prompt.ratio, not prompt.asked)
        if c.teaches:
            teacher = teacher_scores(prompt.rollouts, c.teacher, prompt.sample.targets)
            loss = super().distil(prompt, video, teacher, logits, frames) / video.num_tokens
        else:
            known = prompt.memory["tokens"]
            advantage = over_finite(BY_NAME[c.advantage], known.rewards)
            drawn = action_log_probs(logits.detach(), known.masks)
            loss = cpo_loss(logits, drawn, known.masks, advantage, balanced=c.balanced, kl_weight=c.score_decay)
        return replace(result, loss=result.loss + loss)
