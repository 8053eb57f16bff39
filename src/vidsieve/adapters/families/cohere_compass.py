"""Cohere Compass: Qwen3-VL's layout over an LLM most of whose layers slide."""

from __future__ import annotations

from typing import ClassVar, Literal

from vidsieve.adapters.families.qwen3_vl import Qwen3VLAdapter


class CohereCompassAdapter(Qwen3VLAdapter):
    """Adapter of `CohereCompassForConditionalGeneration`.

    Sliding layers see a number of tokens, of which more are then kept ones: a run equals the shortened prompt, not the
    masked one.
    """

    family: ClassVar[str] = "cohere_compass"
    definition: ClassVar[Literal["masked", "shortened"]] = "shortened"
