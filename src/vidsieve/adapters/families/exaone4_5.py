"""EXAONE 4.5: Qwen2.5-VL's tower and grids, over an LLM whose layers slide but for every fourth."""

from __future__ import annotations

from typing import ClassVar, Literal

from vidsieve.adapters.families.counted import CompactPositions
from vidsieve.adapters.families.mrope import MropeAdapter
from vidsieve.adapters.families.qwen2_5_vl import Qwen25VLAdapter
from vidsieve.types import Need


class Exaone45Adapter(CompactPositions, Qwen25VLAdapter):
    """Adapter of `Exaone4_5_ForConditionalGeneration`.

    Sliding layers see a number of tokens, of which more are then kept ones: a run equals the shortened prompt, not the
    masked one. Layers have no norm before their attention, which methods that read it expect.
    """

    family: ClassVar[str] = "exaone4_5"
    definition: ClassVar[Literal["masked", "shortened"]] = "shortened"
    video_keys: ClassVar[tuple[str, ...]] = MropeAdapter.video_keys
    provides: ClassVar[frozenset[Need]] = Qwen25VLAdapter.provides - {Need.LAYER_ATTENTION}
