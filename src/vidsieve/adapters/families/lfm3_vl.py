"""LFM3-VL: short convolutions, sliding windows and full attention; Qwen's video grids with 1-D positions."""

from __future__ import annotations

from typing import ClassVar, Literal

from vidsieve.adapters.families.counted import CountedPositions
from vidsieve.adapters.families.mrope import MropeAdapter


class Lfm3VlAdapter(CountedPositions, MropeAdapter):
    """Adapter of `Lfm3VlForConditionalGeneration`.

    Videos come as in Qwen's families, frames between their times; only positions are counted. Convolutions and windows
    read neighbours among the tokens that are kept, so a pruned run equals one of the shortened prompt.
    """

    family: ClassVar[str] = "lfm3_vl"
    oldest: ClassVar[str] = "5.23"
    definition: ClassVar[Literal["masked", "shortened"]] = "shortened"
    tower: ClassVar[str] = "model.vision_tower"
    projector: ClassVar[str] = "model.multi_modal_projector"
