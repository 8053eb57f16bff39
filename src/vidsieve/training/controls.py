"""Learning without reinforcement: the controls that say what the policy gradient is worth.

Straight-through: the kept tokens go into the LLM times 1 + p − sg(p), which is 1, so that the gradient of the answer's
loss reaches the keep probability p of every kept token.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vidsieve.selection import mask_to_indices
from vidsieve.training.data.samples import Choice
from vidsieve.training.rewards import caption_ce, label_span
from vidsieve.training.rollouts import Rollouts
from vidsieve.types import Selection, VideoTokens


def gated(video: VideoTokens, keep_logits: Tensor, keep_masks: Tensor) -> list[Selection]:
    """Return selections of keep-masks (G, N) through which a loss reaches the keep logits (N,)."""
    probability = keep_logits.float().sigmoid()
    gate = (1 + probability - probability.detach()).to(video.embeds)  # (N,), all ones
    chosen = [mask_to_indices(mask).to(video.embeds.device) for mask in keep_masks]
    return [Selection(indices, embeds=video.embeds[indices] * gate[indices, None]) for indices in chosen]


def choice_loss(rollouts: Rollouts, sample: Choice, selections: list[Selection]) -> tuple[Tensor, Tensor]:
    """Return −log p(right option), a scalar, and whether each selection is answered rightly (G,) float32."""
    logits = _prefilled(rollouts, selections, 1)[0][:, -1]
    options = logits[:, sample.option_ids.to(logits.device)].float()
    target = torch.full((len(selections),), sample.answer, device=options.device)
    return F.cross_entropy(options, target), (options.detach().argmax(1) == sample.answer).float()


def caption_loss(rollouts: Rollouts, selections: list[Selection]) -> Tensor:
    """Return the caption's mean cross-entropy (G,) under each selection, with its gradient."""
    span = label_span(rollouts.encoded.rest["labels"][:, rollouts.encoded.attention_mask[0]])
    logits, labels = _prefilled(rollouts, selections, span)
    return caption_ce(logits, labels[:, -span:])


def _prefilled(rollouts: Rollouts, selections: list[Selection], span: int) -> tuple[Tensor, Tensor]:
    """Return logits (G, span, V) of the last columns under each selection, with gradients, and labels (G, L)."""
    adapter = rollouts.adapter
    inputs = adapter.build(rollouts.encoded, [[s] for s in selections], rows=[0] * len(selections)).inputs
    labels = inputs.pop("labels", torch.empty(0))
    return adapter.model(**inputs, logits_to_keep=span, use_cache=False).logits, labels
