"""Qwen3-VL: a time in words before each frame, and features added inside the LLM's first layers."""

from __future__ import annotations

from typing import ClassVar

from vidsieve.adapters.families.mrope import MropeAdapter


class Qwen3VLAdapter(MropeAdapter):
    """Adapter of `Qwen3VLForConditionalGeneration`; the words between frames are always kept."""

    family: ClassVar[str] = "qwen3_vl"
