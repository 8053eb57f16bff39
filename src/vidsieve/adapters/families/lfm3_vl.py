"""LFM3-VL: short convolutions, sliding windows and full attention; Qwen's video grids with 1-D positions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from vidsieve.adapters.families.counted import CountedPositions
from vidsieve.adapters.families.mrope import MropeAdapter
from vidsieve.adapters.probe import attention_modules


class Lfm3VlAdapter(CountedPositions, MropeAdapter):
    """Adapter of `Lfm3VlForConditionalGeneration`.

    Videos come as in Qwen's families, frames between their times; only positions are counted. Convolutions and windows
    read neighbours among the tokens that are kept, so a pruned run equals one of the shortened prompt.
    """

    family: ClassVar[str] = "lfm3_vl"
    oldest: ClassVar[str] = "5.23"
    definition: ClassVar[Literal["masked", "shortened"]] = "shortened"
    projector: ClassVar[str] = "model.multi_modal_projector"

    def probe_point(self, inputs: Mapping[str, Any]) -> tuple[Any, Any]:
        """Return the last block that has attention; some are convolutions."""
        return self.model.config.vision_config, attention_modules(self.model.model.vision_tower)[-1]
