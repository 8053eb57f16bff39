"""Qwen3-VL with a mixture of experts in the LLM."""

from __future__ import annotations

from typing import ClassVar

from vidsieve.adapters.families.qwen3_vl import Qwen3VLAdapter


class Qwen3VLMoeAdapter(Qwen3VLAdapter):
    """Adapter of `Qwen3VLMoeForConditionalGeneration`."""

    family: ClassVar[str] = "qwen3_vl_moe"
