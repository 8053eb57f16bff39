"""Qwen3-VL with a mixture of experts in vLLM."""

from __future__ import annotations

from typing import ClassVar

from vllm.model_executor.models import qwen3_vl_moe as theirs
from vllm.model_executor.models.qwen3_vl import Qwen3VLDummyInputsBuilder
from vllm.multimodal import MULTIMODAL_REGISTRY

from vidsieve.serving.vllm.qwen3_vl import Qwen3VLProcessor, WithTimes


@MULTIMODAL_REGISTRY.register_processor(
    Qwen3VLProcessor, info=theirs.Qwen3VLMoeProcessingInfo, dummy_inputs=Qwen3VLDummyInputsBuilder
)
class Qwen3VLMoe(WithTimes, theirs.Qwen3VLMoeForConditionalGeneration):  # type: ignore[misc]
    """vLLM's model with pruned videos."""

    transformers_class: ClassVar[str] = "Qwen3VLMoeForConditionalGeneration"
