"""Training `sieve`: CaCoVID's policy optimisation, for every budget, with the question and without it.

Per prompt a rate is drawn log-uniformly between `rate_low` and `rate_high`, which the policy is told; for
`question_dropped` of the prompts it does not see the question, so that it learns what any question may be about. The
reward "agreement" needs no labels: the frozen LLM's own answer under all tokens is the one to reach.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vidsieve.training.cacovid import CaCoVIDTrainer, Prompted
from vidsieve.training.settings import SieveConfig
from vidsieve.types import VideoTokens


class SieveTrainer(CaCoVIDTrainer):
    """CPO with a budget and a question that may be absent; see the module's text."""

    config: SieveConfig

    def policy_logits(self, prompt: Prompted, video: VideoTokens) -> tuple[Tensor, Tensor]:
        """Return the policy's logits of tokens (N, 2) and of frames (T, 2) at the prompt's rate."""
        asked = float(torch.rand((), generator=self.generator)) >= self.config.question_dropped
        logits: tuple[Tensor, Tensor] = self.run_policy(video, prompt.ratio, asked)
        return logits
