"""Frame difference: keep the tokens that changed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from vidsieve.compressors.base import ScoreCompressor
from vidsieve.errors import UnknownNameError
from vidsieve.types import VideoTokens


@dataclass(frozen=True)
class FrameDifference(ScoreCompressor):
    """Keep the tokens that differ most from the same place one frame before (L2 norm).

    The norm of SCORE's surprise ΔX (Eq. 2) without any learning.

    Parameters
    ----------
    first_frame : {"zero", "next"}
        Reference of the first frame: the virtual zero frame of SCORE, which keeps most of it, or
        the frame after it.
    """

    name: ClassVar[str] = "frame_difference"
    paper: ClassVar[str] = "baseline (SCORE Eq. 2)"
    local: ClassVar[bool] = True
    first_frame: Literal["zero", "next"] = "zero"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.first_frame not in ("zero", "next"):
            raise UnknownNameError("first_frame", self.first_frame, ("zero", "next"))
        if self.first_frame == "next":
            object.__setattr__(self, "local", False)

    def score(self, video: VideoTokens) -> Tensor:
        """Return ‖X_t − X_{t−1}‖ for every token, (N,) float32."""
        frames = video.embeds.reshape(video.grid.frames, video.grid.per_frame, -1)
        before, changes = torch.zeros_like(frames[0], dtype=torch.float32), []
        for frame in frames:  # one by one: no second copy of the video
            now = frame.float()
            changes.append((now - before).norm(dim=-1))
            before = now
        if self.first_frame == "next" and len(changes) > 1:
            changes[0] = changes[1]
        return torch.cat(changes)
