"""Qwen2.5-VL: times in seconds, and a vision tower that sees windows in an order of their own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor
from transformers.vision_utils import get_vision_window_index

from vidsieve.adapters.families.mrope import MropeAdapter


class Qwen25VLAdapter(MropeAdapter):
    """Adapter of `Qwen2_5_VLForConditionalGeneration`."""

    family: ClassVar[str] = "qwen2_5_vl"
    video_keys: ClassVar[tuple[str, ...]] = (*MropeAdapter.video_keys, "second_per_grid_ts")

    def pool_signals(self, values: list[Tensor], inputs: Mapping[str, Any]) -> Tensor:
        """Return the mean over each token's patches, in raster order: the windows' order is undone."""
        vision = self.model.config.vision_config
        order: Tensor = get_vision_window_index(
            inputs["video_grid_thw"],
            spatial_merge_size=vision.spatial_merge_size,
            window_size=vision.window_size,
            patch_size=vision.patch_size,
        )[0]
        tokens = super().pool_signals(values, inputs)
        return tokens[order.argsort().to(tokens.device)]
