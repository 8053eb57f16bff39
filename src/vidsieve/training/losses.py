"""Policy-gradient losses. Pure functions; G or K rollouts over N tokens."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

CLIP_LOW, CLIP_HIGH = 0.2, 0.28
"""ε_low and ε_high of CaCoVID's objective."""
_STEEPEST = 10.0
"""log ½ − log π above which the divergence from a fair coin goes on as a straight line."""


def action_log_probs(logits: Tensor, keep_masks: Tensor) -> Tensor:
    """Return log π (G, N) of the keep or drop of each token: two-class log-softmax of logits (N, 2).

    Parameters
    ----------
    logits : Tensor, (N, 2), column 0 = drop, 1 = keep
    keep_masks : Tensor, (G, N), bool
    """
    both = logits.float().log_softmax(-1)
    return torch.where(keep_masks, both[:, 1], both[:, 0])


def clipped_surrogate(log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor) -> Tensor:
    """Return −min(ρ·A, clip(ρ)·A) for each rollout and token (G, N) (CaCoVID Eq. 17-19).

    The minimum is taken before the exponential: min(ρ·A, clip(ρ)·A) is min(ρ, 1 + high)·A where A ≥ 0 and
    max(ρ, 1 − low)·A where A < 0. After it, an overflowing ρ would turn the gradient of the other side, 0 · ∞, into
    NaN.
    """
    weight = advantages[:, None].float()
    gap = log_probs - old_log_probs
    gap = torch.where(weight >= 0, gap.clamp(max=math.log1p(CLIP_HIGH)), gap.clamp(min=math.log1p(-CLIP_LOW)))
    return -gap.exp() * weight


def cpo_loss(
    logits: Tensor,
    old_log_probs: Tensor,
    keep_masks: Tensor,
    advantages: Tensor,
    *,
    balanced: bool = False,
    kl_weight: float = 0.0,
) -> Tensor:
    """Return the combinatorial policy optimisation loss (CaCoVID Eq. 16), a scalar.

    Parameters
    ----------
    logits : Tensor, (N, 2)
    old_log_probs : Tensor, (G, N)
        `action_log_probs` under the policy that drew the masks.
    keep_masks : Tensor, (G, N), bool
    advantages : Tensor, (G,)
    balanced : bool
        Weight kept tokens by the dropped fraction of each mask and dropped ones by the kept fraction, as the release
        does for tokens; else the plain mean over tokens (Eq. 16).
    kl_weight : float
        Weight of the k3 estimate of the divergence from a fair coin, under the same weights; linear where an action
        has a probability below e^−10, so that it neither overflows nor drowns the rewards.
    """
    log_probs = action_log_probs(logits, keep_masks)
    loss = clipped_surrogate(log_probs, old_log_probs, advantages)
    if kl_weight:
        gap = math.log(0.5) - log_probs
        steep = gap.clamp(max=_STEEPEST)
        loss = loss + kl_weight * (steep.exp() * (1 + gap - steep) - gap - 1)
    if not balanced:
        return loss.mean()
    kept = keep_masks.float().mean(1, keepdim=True)
    weight = torch.where(keep_masks, 1 - kept, kept)
    return ((loss * weight).sum(1) / (weight.sum(1) + 1e-7)).mean()


def gaze_loss(
    log_probs: Tensor,
    padding: Tensor,
    rewards: Tensor,
    ends: Tensor,
    group_size: int,
    discount: float = 0.995,
) -> Tensor:
    """Return the policy loss (G·B,) of gazed trajectories (AutoGaze, its release's GRPO).

    The advantage of a patch is the sum over the rewards that come after it of the reward's distance from its group's
    mean, discounted by the patches between. It is not divided by a standard deviation, and nothing is clipped; the
    loss is a sum over patches.

    Parameters
    ----------
    log_probs : Tensor, (G·B, N), floating
        Of each patch, under the policy that drew it; G trajectories of each of B videos, those of a group B apart.
    padding : Tensor, (G·B, N), bool
    rewards : Tensor, (G·B, R)
        One for each of R frames.
    ends : Tensor, (R,), int64
        Patches up to the end of each of these frames, padding included.
    group_size : int
        G.
    discount : float
    """
    grouped = rewards.float().reshape(group_size, -1, rewards.shape[1])
    better = (grouped - grouped.mean(0)).flatten(0, 1)
    there = ~padding
    place = torch.arange(padding.shape[1], device=padding.device)
    passed = there.cumsum(1)
    between = passed.gather(1, ends.expand(len(passed), -1) - 1)[:, :, None] - passed[:, None]  # (G·B, R, N)
    weight = torch.where(place < ends[:, None], discount**between, 0.0)
    advantage = (better[..., None] * weight).sum(1) * there
    ratio = (log_probs - log_probs.detach()).exp()
    return -(ratio * advantage).sum(1)


def gaze_prediction_loss(predicted: Tensor, losses: Tensor, mask: Tensor, padding: Tensor) -> Tensor:
    """Return the error (G·B,) of predicted losses (G·B, N): squares where `mask`, over the mean number of such patches.

    AutoGaze masks the last patch of each frame that was reconstructed; `padding` (G·B, N) bool is left out.
    """
    read = mask.bool() & ~padding
    return torch.where(read, (predicted - losses).square(), 0.0).sum(1) / read.sum(1).float().mean().clamp(min=1e-8)


def reinforce_loss(logits: Tensor, keep_masks: Tensor, advantages: Tensor) -> Tensor:
    """Return −mean_k A_k · mean_n log π(m_n) (SCORE Eq. 8-9) of Bernoulli logits (N,), a scalar."""
    log_probs = torch.where(keep_masks, F.logsigmoid(logits.float()), F.logsigmoid(-logits.float()))
    return -(advantages[:, None].float() * log_probs).mean()


def entropy(keep_logits: Tensor) -> Tensor:
    """Return the mean entropy, in nats, of keep probabilities with logits (N,), a scalar."""
    logits = keep_logits.float()
    return (F.softplus(logits) - logits * logits.sigmoid()).mean()


def keep_entropy(keep_logits: Tensor) -> float:
    """Return the mean entropy in bits of keep probabilities with logits (N,): 1 is a fair coin, 0 is certain."""
    return float(entropy(keep_logits.detach())) / math.log(2)


def entropy_shortfall(keep_logits: Tensor, floor: float) -> Tensor:
    """Return the distance of the mean entropy of keep logits (N,) below `floor` nats, 0 above it."""
    return (floor - entropy(keep_logits)).clamp(min=0)


def band_distance(keep_logits: Tensor, low: float, high: float) -> Tensor:
    """Return the distance of the mean keep probability of logits (N,) from [`low`, `high`], a scalar."""
    mean = keep_logits.float().sigmoid().mean()
    return (low - mean).clamp(min=0) + (mean - high).clamp(min=0)


def distillation_loss(scores: Tensor, teacher: Tensor) -> Tensor:
    """Return the cross-entropy of softmax(scores) against softmax(teacher), both (N,), a scalar."""
    return -(teacher.float().softmax(0) * scores.float().log_softmax(0)).sum()
