"""The entry point ``vllm.general_plugins``: served models that prune videos, in place of vLLM's own.

Without ``vidsieve`` in ``--hf-overrides`` they behave as vLLM's own models.
"""

from __future__ import annotations

from typing import Any

from vidsieve.io.versions import warn_untested

MODELS = {
    "LlavaOnevisionForConditionalGeneration": "vidsieve.serving.vllm.llava_onevision:LlavaOnevision",
    "Qwen2_5_VLForConditionalGeneration": "vidsieve.serving.vllm.qwen2_5_vl:Qwen25VL",
    "Qwen3VLForConditionalGeneration": "vidsieve.serving.vllm.qwen3_vl:Qwen3VL",
    "Qwen3VLMoeForConditionalGeneration": "vidsieve.serving.vllm.qwen3_vl_moe:Qwen3VLMoe",
    "Qwen3_5ForConditionalGeneration": "vidsieve.serving.vllm.qwen3_5:Qwen35",
    "Qwen3_5MoeForConditionalGeneration": "vidsieve.serving.vllm.qwen3_5:Qwen35Moe",
}
"""The serving class of each architecture."""


def register() -> None:
    """Register the models and patch what vLLM 0.32 offers no hook for; vLLM calls this in each of its processes."""
    from vllm import ModelRegistry, __version__

    warn_untested("vllm", __version__)
    for name, path in MODELS.items():
        ModelRegistry.register_model(name, path)
    _patch_cpu_runner()
    _watch_failures()


def _watch_failures() -> None:
    """Let the front end answer a request whose method raised with an error."""
    from functools import partial
    from http import HTTPStatus

    from vllm.exceptions import GracefulHTTPError
    from vllm.v1.engine import FinishReason
    from vllm.v1.engine.output_processor import OutputProcessor

    from vidsieve.serving.vllm.failures import server_name, watch

    server_name()  # set by the first process, inherited by those it starts
    refusal = partial(GracefulHTTPError, http_status=HTTPStatus.INTERNAL_SERVER_ERROR)
    watch(OutputProcessor, refusal, FinishReason.ERROR)


def _patch_cpu_runner() -> None:
    """Let vLLM's CPU runner set `is_multimodal_pruning_enabled` when it loads a model, as its GPU runner does."""
    try:
        from vllm.v1.worker.cpu_model_runner import CPUModelRunner
    except ImportError:
        return
    load = CPUModelRunner.load_model
    if getattr(load, "vidsieve", False):
        return

    def loaded(self: Any, *arguments: Any, **options: Any) -> None:
        load(self, *arguments, **options)
        config = self.model_config.multimodal_config
        supported = getattr(self.get_model(), "supports_multimodal_pruning", False)
        self.is_multimodal_pruning_enabled = bool(supported and config and config.is_multimodal_pruning_enabled())

    loaded.vidsieve = True  # type: ignore[attr-defined]
    CPUModelRunner.load_model = loaded
