"""Rewards of rollouts, from the frozen LLM's own outputs. Pure functions."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def choice_reward(option_logits: Tensor, answer: int) -> Tensor:
    """Return 1 where the right option has the highest logit, else 0, (G,) float32; NaN where a logit is not finite.

    `option_logits` (G, options) are the next-token logits of the options, `answer` is the number of the right one.
    """
    right = (option_logits.argmax(1) == answer).float()
    # argmax treats NaN as the largest value: a broken rollout would count as an answer.
    return right.masked_fill(~option_logits.isfinite().all(1), torch.nan)


def margin_reward(option_logits: Tensor, answer: int, blind_logits: Tensor | None = None) -> Tensor:
    """Return log p(right) − max log p(wrong) (G,) float32: positive where the model answers correctly.

    With `blind_logits` each option counts by log p(option | video) − log p(option | no video), before the best wrong
    option is chosen. Subtracted from the margin afterwards it would shift all rewards of a group
    equally, and the advantage removes such a shift. With two options it is still only a shift and has no effect.

    Parameters
    ----------
    option_logits : Tensor, (G, options)
    answer : int
    blind_logits : Tensor, (options,), optional
        Next-token logits of the options without the video.
    """
    log_p = option_logits.float().log_softmax(1)
    if blind_logits is not None:
        log_p = log_p - blind_logits.float().log_softmax(0)
    wrong = torch.cat([log_p[:, :answer], log_p[:, answer + 1 :]], 1)
    return log_p[:, answer] - wrong.amax(1)


def caption_ce(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the cross-entropy per caption token (G,) float32, averaged over each row's labelled tokens.

    Parameters
    ----------
    logits : Tensor, (G, L, V)
    labels : Tensor, (G, L), int64
        −100 where there is nothing to predict; shifted inside, as in a causal LM.
    """
    predicted, wanted = logits[:, :-1].float(), labels[:, 1:]
    loss = F.cross_entropy(predicted.flatten(0, 1), wanted.flatten(), ignore_index=-100, reduction="none")
    counted = wanted != -100
    return loss.view_as(wanted).sum(1) / counted.sum(1)


def label_span(labels: Tensor) -> int:
    """Return the number of last columns of labels (G, L) that hold every label and the column before the first.

    Rows are padded on the left, so the text after a video is at the end of every row.
    """
    return labels.shape[1] - int((labels != -100).any(0).nonzero()[0]) + 1


def score_rewards(ce: Tensor, ce_full: float, keep_masks: Tensor, tolerance: float) -> tuple[Tensor, Tensor]:
    """Return SCORE's ΔCE = τ·CE_base − CE and sparsity S, both (K,) float32 (Eq. 5-6).

    Parameters
    ----------
    ce : Tensor, (K,), cross-entropy under each mask
    ce_full : float, CE_base, under all tokens
    keep_masks : Tensor, (K, N), bool
    tolerance : float, τ ≥ 1
    """
    return tolerance * ce_full - ce.float(), 1 - keep_masks.float().mean(1)
