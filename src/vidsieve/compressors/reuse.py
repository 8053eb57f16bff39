"""Reuse: frames that repeat the last encoded one take its tokens, and do not go through the vision encoder."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vidsieve.compressors.base import check_bounds, within
from vidsieve.compressors.front import FrameFront


@dataclass(frozen=True)
class Reuse(FrameFront):
    """Encode a frame only where it differs from the last encoded one.

    Every token stays, at its own place: only the encoder's work gets less. A frame is one of the token grid: in Qwen's
    families a temporal step of two pictures.

    Parameters
    ----------
    tolerance : float
        Largest difference that counts as a repetition: the mean over a cell's pixel values of the absolute difference,
        largest over the cells (`Family.frame_cells`: a token's patches, or one patch). The unit is that of the
        preprocessed pixels: divided by 255 and then by the processor's deviation, so that 8 of 255 levels are about
        0.06 at a deviation of 0.5. At 0 only exactly equal frames are repetitions.

    Raises
    ------
    BudgetError
        If the tolerance is negative or no number.
    """

    name: ClassVar[str] = "reuse"

    tolerance: float = within(0.0, "[0, inf)")

    def __post_init__(self) -> None:
        check_bounds(self)

    def sources(self, frames: Tensor) -> Tensor:
        """Return for each of frames (T, C, V) the one whose tokens it takes, (T,) int64."""
        taken = [0]
        for number in range(1, len(frames)):
            last = taken[-1]
            taken.append(last if self._repeats(frames[number], frames[last]) else number)
        return torch.tensor(taken)

    def _repeats(self, frame: Tensor, last: Tensor) -> bool:
        if self.tolerance == 0:
            return torch.equal(frame, last)
        return bool((frame.float() - last.float()).abs().mean(-1).max() <= self.tolerance)
