"""Training `visionselector`: SCORE's captions, and a differentiable top-k in place of rollouts.

Per video a rate is drawn between `rate_low` and `rate_high`. All tokens go into the frozen LLM, times a soft mask of
the policy's scores whose sum is that share of the tokens. The loss is the caption's cross-entropy, differentiated
through the LLM, and a constraint of growing weight that pulls the mask to 0 and 1 (`controls.softly_selected`).
"""

from __future__ import annotations

from vidsieve.training.score import ScoreTrainer
from vidsieve.training.settings import VisionSelectorConfig

RISE = 0.03
"""Share of the steps over which the learning rate rises, as in the release."""


class VisionSelectorTrainer(ScoreTrainer):
    """Soft top-k on captions; see the module's text."""

    config: VisionSelectorConfig

    def learning_rate(self, step: int) -> float:
        """Return SCORE's factor, times a rise to 1 over the first steps."""
        return super().learning_rate(step) * min(1.0, (step + 1) / (RISE * self.config.steps))
