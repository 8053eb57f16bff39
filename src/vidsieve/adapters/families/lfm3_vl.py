"""LFM3-VL: short convolutions, sliding windows and full attention; Qwen's video grids with 1-D positions."""

from __future__ import annotations

from typing import ClassVar, Literal

from vidsieve.adapters.adapter import Adapter
from vidsieve.adapters.families.mrope import MropeAdapter
from vidsieve.types import Need


class Lfm3VlAdapter(MropeAdapter):
    """Adapter of `Lfm3VlForConditionalGeneration`.

    Videos come as in Qwen's families, frames between their times; only positions are counted. Convolutions and windows
    read neighbours among the tokens that are kept, so a pruned run equals one of the shortened prompt.
    """

    family: ClassVar[str] = "lfm3_vl"
    definition: ClassVar[Literal["masked", "shortened"]] = "shortened"
    provides: ClassVar[frozenset[Need]] = frozenset({Need.QUESTION})
    position_rows: ClassVar[slice] = slice(None)
    projector: ClassVar[str] = "model.multi_modal_projector"

    positions = Adapter.positions
    legacy_positions = Adapter.legacy_positions
    pack_positions = Adapter.pack_positions
    unpack_positions = Adapter.unpack_positions
