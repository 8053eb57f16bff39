"""Qwen3.5 (and 3.6, 3.8): three of four layers of the LLM are recurrent (Gated DeltaNet), the fourth attends to all."""

from __future__ import annotations

from typing import ClassVar, Literal

from vidsieve.adapters.families.mrope import MropeAdapter


class Qwen35Adapter(MropeAdapter):
    """Adapter of `Qwen3_5ForConditionalGeneration`.

    Recurrent layers and their convolution read every token before, so a pruned run equals one of the shortened prompt.
    """

    family: ClassVar[str] = "qwen3_5"
    definition: ClassVar[Literal["masked", "shortened"]] = "shortened"


class Qwen35MoeAdapter(Qwen35Adapter):
    """Adapter of `Qwen3_5MoeForConditionalGeneration`: a mixture of experts in every layer."""

    family: ClassVar[str] = "qwen3_5_moe"
