"""vLLM's entry point: models that keep the tokens of a video that an answer depends on, in place of vLLM's own.

Without ``vidsieve`` in ``--hf-overrides`` they are vLLM's own models and prune nothing.
"""

from __future__ import annotations

from typing import Any

from vidsieve.io.versions import warn_untested

MODELS = {
    "LlavaOnevisionForConditionalGeneration": "vidsieve.serving.vllm.llava_onevision:LlavaOnevision",
    "Qwen2_5_VLForConditionalGeneration": "vidsieve.serving.vllm.qwen2_5_vl:Qwen25VL",
    "Qwen3VLForConditionalGeneration": "vidsieve.serving.vllm.qwen3_vl:Qwen3VL",
}
"""Architecture: the class that serves it."""


def register() -> None:
    """Register the models, and mend what is around them; vLLM calls this in each of its processes.

    Entry point ``vllm.general_plugins``.
    """
    from vllm import ModelRegistry, __version__

    warn_untested("vllm", __version__)
    for name, place in MODELS.items():
        ModelRegistry.register_model(name, place)
    _mend_cpu_runner()
    _watch_failures()


def _watch_failures() -> None:
    """Have the front end answer a request whose method raised with an error."""
    from functools import partial
    from http import HTTPStatus

    from vllm.exceptions import GracefulHTTPError
    from vllm.v1.engine import FinishReason
    from vllm.v1.engine.output_processor import OutputProcessor

    from vidsieve.serving.vllm.failures import server_name, watch

    server_name()  # made up by the first process, inherited by those it starts

    refusal = partial(GracefulHTTPError, http_status=HTTPStatus.INTERNAL_SERVER_ERROR)
    watch(OutputProcessor, refusal, FinishReason.ERROR)


def _mend_cpu_runner() -> None:
    """Have vLLM's CPU runner note that a model prunes, as its GPU runner does when a model is loaded (0.32)."""
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
        able = getattr(self.get_model(), "supports_multimodal_pruning", False)
        self.is_multimodal_pruning_enabled = bool(
            able and config is not None and config.is_multimodal_pruning_enabled()
        )

    loaded.vidsieve = True  # type: ignore[attr-defined]
    CPUModelRunner.load_model = loaded
