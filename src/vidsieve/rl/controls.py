"""Learning without reinforcement: the controls that say what the policy gradient is worth.

Straight-through: the kept tokens go into the LLM times 1 + p − sg(p), which is 1, so that the gradient of the answer's
loss reaches the keep probability p of every kept token.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vidsieve.rl.rewards import caption_ce, label_span
from vidsieve.rl.rollouts import Rollouts
from vidsieve.rl.samples import Choice
from vidsieve.selection import mask_to_indices
from vidsieve.types import Selection, VideoTokens


def gated(video: VideoTokens, keep_logits: Tensor, keep_masks: Tensor) -> list[Selection]:
    """Return selections of keep-masks (G, N) through which a loss reaches the keep logits (N,)."""
    probability = keep_logits.float().sigmoid()
    gate = (1 + probability - probability.detach()).to(video.embeds)  # (N,), all ones
    chosen = [mask_to_indices(mask).to(video.embeds.device) for mask in keep_masks]
    return [Selection(indices, embeds=video.embeds[indices] * gate[indices, None]) for indices in chosen]


def choice_loss(rollouts: Rollouts, sample: Choice, selections: list[Selection]) -> tuple[Tensor, Tensor]:
    """Return −log p(right option), a scalar, and whether each selection is answered rightly (G,) float32."""
    inputs = rollouts.adapter.build(rollouts.encoded, [[s] for s in selections], rows=[0] * len(selections)).inputs
    inputs.pop("labels", None)
    logits = rollouts.adapter.model(**inputs, logits_to_keep=1, use_cache=False).logits[:, -1]
    options = logits[:, sample.option_ids.to(logits.device)].float()
    target = torch.full((len(selections),), sample.answer, device=options.device)
    return F.cross_entropy(options, target), (options.detach().argmax(1) == sample.answer).float()


def caption_loss(rollouts: Rollouts, selections: list[Selection]) -> Tensor:
    """Return the caption's mean cross-entropy (G,) under each selection, with its gradient."""
    inputs = rollouts.adapter.build(rollouts.encoded, [[s] for s in selections], rows=[0] * len(selections)).inputs
    labels = inputs.pop("labels")
    span = label_span(labels)
    logits = rollouts.adapter.model(**inputs, logits_to_keep=span, use_cache=False).logits
    return caption_ce(logits, labels[:, -span:])
