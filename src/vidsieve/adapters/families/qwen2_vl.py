"""Qwen2-VL: Qwen2.5-VL's layout, with frames counted instead of timed."""

from __future__ import annotations

from typing import ClassVar

from vidsieve.adapters.families.mrope import MropeAdapter


class Qwen2VLAdapter(MropeAdapter):
    """Adapter of `Qwen2VLForConditionalGeneration`."""

    family: ClassVar[str] = "qwen2_vl"
