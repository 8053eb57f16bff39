"""MiniCPM-V 4.7: MiniCPM-V 4.6 with positions on a canvas for each frame, which its slices share."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from vidsieve.adapters.families.minicpmv4_6 import MiniCPMV46Adapter
from vidsieve.adapters.families.mrope import MropeAdapter


class MiniCPMV47Adapter(MiniCPMV46Adapter, MropeAdapter):
    """Adapter of `MiniCPMV4_7ForConditionalGeneration`: markers stay, at the corners of their canvas."""

    family: ClassVar[str] = "minicpmv4_7"

    def legacy_positions(self, positions: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return the installed positions: those on a canvas have not been counted in another way."""
        return positions
