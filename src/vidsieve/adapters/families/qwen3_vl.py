"""Qwen3-VL: Qwen2.5-VL's layout with a time stamp between frames, and features added inside the first layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor
from transformers.models.qwen3_vl.modeling_qwen3_vl import BaseModelOutputWithDeepstackFeatures

from vidsieve.adapters.families.qwen2_5_vl import Qwen25VLAdapter


class Qwen3VLAdapter(Qwen25VLAdapter):
    """Adapter of `Qwen3VLForConditionalGeneration`.

    Frames of one video stand apart in the prompt, each behind its time in words; those words are always kept.
    Deepstack features are pruned like the tokens they belong to.
    """

    family: ClassVar[str] = "qwen3_vl"
    video_keys: ClassVar[tuple[str, ...]] = ("pixel_values_videos", "video_grid_thw")

    @property
    def deep_layers(self) -> int:
        """Number of first LLM layers that get deep features."""
        return len(self.model.config.vision_config.deepstack_visual_indexes)

    def window_order(self, inputs: Mapping[str, Any]) -> None:
        """Return None: blocks see the tokens in raster order."""
        return None

    def encoder_outputs(
        self, rows: Sequence[Tensor], deep: Sequence[Sequence[Tensor]], modality: str
    ) -> BaseModelOutputWithDeepstackFeatures:
        """Return the features and each layer's deep features as one tensor per prompt."""
        layers = [list(layer) for layer in deep]
        return BaseModelOutputWithDeepstackFeatures(pooler_output=list(rows), deepstack_features=layers)
