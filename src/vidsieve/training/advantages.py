"""Advantages from the rewards of a group of rollouts. Pure functions."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def over_finite(advantage: Callable[..., Tensor], rewards: Tensor, *others: Tensor) -> Tensor:
    """Return a group's advantages (G,) float32 among its finite rewards, 0 where a reward is NaN or infinite.

    `advantage` is one of the functions below, `others` (G,) its further arguments.
    """
    finite = rewards.isfinite()
    weights = torch.zeros(rewards.shape, dtype=torch.float32, device=rewards.device)
    if bool(finite.any()):
        weights[finite] = advantage(rewards[finite], *(other[finite] for other in others))
    return weights


def finite_mean(values: Tensor) -> float:
    """Return the mean of the finite ones of values (G,); NaN where there is none."""
    return float(values[values.isfinite()].float().mean())


def group_advantage(rewards: Tensor) -> Tensor:
    """Return (R − mean) / std (G,) float32, the population std; zero when all rewards are equal (CaCoVID Eq. 15)."""
    rewards = rewards.float()
    centred = rewards - rewards.mean()
    if bool((rewards == rewards[0]).all()):
        return torch.zeros_like(rewards)
    return centred / centred.square().mean().sqrt()


def official_advantage(rewards: Tensor) -> Tensor:
    """Return (R − mean) / (std + 1e-4) (G,) float32 with the unbiased std, as CaCoVID's release has it; 0 for one."""
    rewards = rewards.float()
    if len(rewards) < 2:
        return torch.zeros_like(rewards)
    return (rewards - rewards.mean()) / (rewards.std() + 1e-4)


def leave_one_out(rewards: Tensor) -> Tensor:
    """Return each reward minus the mean of the others (G,) float32; zero for a group of one (RLOO, 2402.14740)."""
    rewards, count = rewards.float(), rewards.shape[0]
    if count == 1:
        return torch.zeros_like(rewards)
    return (rewards - rewards.mean()) * count / (count - 1)


def no_std(rewards: Tensor) -> Tensor:
    """Return R − mean (G,) float32: easy and hard prompts keep their weight (Dr. GRPO, 2503.20783)."""
    rewards = rewards.float()
    return rewards - rewards.mean()


def split_advantage(delta_ce: Tensor, sparsity: Tensor, epsilon: float = 1e-6, least_safe: int = 1) -> Tensor:
    """Return SCORE's split advantage (K,) float32 (Eq. 7).

    Safe zone (ΔCE > 0): ΔCE · (S − μ⁺)/(σ⁺ + ε), the population mean and std over the safe rollouts; a single
    safe one has advantage 0. Penalty zone: ΔCE · S, not above 0.

    Parameters
    ----------
    delta_ce : Tensor, (K,), τ·CE_base − CE (Eq. 5)
    sparsity : Tensor, (K,), share of tokens dropped, in [0, 1] (Eq. 6)
    least_safe : int
        With fewer safe rollouts, theirs is ΔCE · S as in the other zone, above 0 here; Eq. 7 has 1.
    """
    delta_ce, sparsity = delta_ce.float(), sparsity.float()
    safe = delta_ce > 0
    advantage = delta_ce * sparsity
    if int(safe.sum()) >= max(1, least_safe):
        inside = sparsity[safe]
        spread = inside.std(correction=0)
        advantage[safe] = delta_ce[safe] * (inside - inside.mean()) / (spread + epsilon)
    return advantage


BY_NAME = {"group": group_advantage, "official": official_advantage, "no_std": no_std, "leave_one_out": leave_one_out}
"""Advantages of a whole group by the names of the settings."""
