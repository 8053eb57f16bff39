"""Qwen3.5 in vLLM, dense and with experts: most layers of the LLM are recurrent, and none gets deep features."""

from __future__ import annotations

from typing import ClassVar

from vllm.model_executor.models import qwen3_5 as theirs
from vllm.model_executor.models.qwen3_vl import Qwen3VLDummyInputsBuilder
from vllm.multimodal import MULTIMODAL_REGISTRY

from vidsieve.serving.vllm.qwen3_vl import Qwen3VLProcessor, WithTimes


@MULTIMODAL_REGISTRY.register_processor(
    Qwen3VLProcessor, info=theirs.Qwen3_5ProcessingInfo, dummy_inputs=Qwen3VLDummyInputsBuilder
)
class Qwen35(WithTimes, theirs.Qwen3_5ForConditionalGeneration):  # type: ignore[misc]
    """vLLM's model with pruned videos."""

    transformers_class: ClassVar[str] = "Qwen3_5ForConditionalGeneration"


@MULTIMODAL_REGISTRY.register_processor(
    Qwen3VLProcessor, info=theirs.Qwen3_5MoeProcessingInfo, dummy_inputs=Qwen3VLDummyInputsBuilder
)
class Qwen35Moe(WithTimes, theirs.Qwen3_5MoeForConditionalGeneration):  # type: ignore[misc]
    """vLLM's model with pruned videos."""

    transformers_class: ClassVar[str] = "Qwen3_5MoeForConditionalGeneration"
