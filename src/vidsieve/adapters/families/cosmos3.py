"""NVIDIA's Cosmos 3: Qwen3-VL's layout over LLMs and towers of their own."""

from __future__ import annotations

from typing import ClassVar

from vidsieve.adapters.families.mrope import MropeAdapter
from vidsieve.adapters.families.qwen3_vl import Qwen3VLAdapter


class Cosmos3EdgeAdapter(MropeAdapter):
    """Adapter of `Cosmos3EdgeForConditionalGeneration`."""

    family: ClassVar[str] = "cosmos3_edge"
    oldest: ClassVar[str] = "5.23"
    projector: ClassVar[str] = "model.projector"


class Cosmos3OmniAdapter(Qwen3VLAdapter):
    """Adapter of `Cosmos3OmniForConditionalGeneration`: features are added inside the first layers."""

    family: ClassVar[str] = "cosmos3_omni"
