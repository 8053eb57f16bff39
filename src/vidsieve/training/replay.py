"""What a prompt remembers over its iterations: earlier rollouts, and how many tokens the next ones keep."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Memory:
    """Rollouts of one prompt so far: G of them over N tokens (or T frames).

    Parameters
    ----------
    masks : Tensor, (G, N), bool
    log_probs : Tensor, (G, N), float32
        Of what was done with each token, under the policy that drew the mask (Eq. 17).
    rewards, right : Tensor, (G,), float32
        What each was worth, and whether it was answered rightly.
    """

    masks: Tensor
    log_probs: Tensor
    rewards: Tensor
    right: Tensor

    def __len__(self) -> int:
        return len(self.rewards)

    def with_more(self, more: Memory) -> Memory:
        """Return the memory after another iteration; earlier rollouts stay in the group."""
        return Memory(
            torch.cat([self.masks, more.masks]),
            torch.cat([self.log_probs, more.log_probs]),
            torch.cat([self.rewards, more.rewards]),
            torch.cat([self.right, more.right]),
        )


def next_ratio(
    ratio: float,
    right: float,
    *,
    least: float,
    most: float = 0.12,
    low: float = 0.125,
    high: float = 0.875,
    inclusive: bool = False,
) -> float:
    """Return the sampling ratio of a prompt's next iteration (dynamic sample ratio).

    Halved where more than `high` of the last rollouts were right, doubled where less than `low` were, so that a group
    is neither all right nor all wrong.

    Parameters
    ----------
    ratio : float
    right : float
        Share of the last iteration's rollouts that the model answered rightly.
    least, most : float
        Bounds: one token a frame, and 0.12 in the release. A ratio outside them already is left where it is.
    inclusive : bool
        Whether the thresholds themselves count, as in the release.
    """
    if right > high or (inclusive and right == high):
        return min(ratio, max(ratio / 2, least))
    if right < low or (inclusive and right == low):
        return max(ratio, min(2 * ratio, most))
    return ratio
