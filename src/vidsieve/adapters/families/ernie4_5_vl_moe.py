"""ERNIE 4.5 VL: two frames a token, and experts of their own for visual tokens and the markers around them."""

from __future__ import annotations

from typing import ClassVar

from vidsieve.adapters.families.mrope import MropeAdapter
from vidsieve.types import Need


class Ernie45VLMoeAdapter(MropeAdapter):
    """Adapter of `Ernie4_5_VLMoeForConditionalGeneration`.

    ``moe_mm_token_type_ids`` says which experts a token has, and is cut with the prompt. Times are painted into the
    frames. Every layer has full attention, whose rotary positions methods inside the LLM do not know.
    """

    family: ClassVar[str] = "ernie4_5_vl_moe"
    column_keys: ClassVar[tuple[str, ...]] = ("moe_mm_token_type_ids",)
    projector: ClassVar[str] = "model.resampler_model"
    provides: ClassVar[frozenset[Need]] = frozenset({Need.QUESTION})
