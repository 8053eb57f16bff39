"""Qwen2.5-VL in vLLM: embeddings that carry their positions, as in vLLM's own video pruning."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from vllm.model_executor.models import qwen2_5_vl as theirs
from vllm.multimodal import MULTIMODAL_REGISTRY

from vidsieve.serving.vllm.positions import CarriesPositions, UnprunedVideo
from vidsieve.serving.vllm.processing import PruningProcessor


class Qwen2_5VLProcessor(PruningProcessor, theirs.Qwen2_5_VLMultiModalProcessor):  # type: ignore[misc]
    """vLLM's processor with one placeholder per kept token."""

    def tokens_of(self, place: int, items: Any, fields: Any) -> tuple[int, int]:
        """Return a video's grid tokens; it has none outside."""
        grid = fields["video"][place]["video_grid_thw"].data if "video" in fields else fields["video_grid_thw"][place]
        return int(grid.prod()) // self.info.get_hf_config().vision_config.spatial_merge_size ** 2, 0


@MULTIMODAL_REGISTRY.register_processor(
    Qwen2_5VLProcessor, info=theirs.Qwen2_5_VLProcessingInfo, dummy_inputs=theirs.Qwen2_5_VLDummyInputsBuilder
)
class Qwen25VL(CarriesPositions, theirs.Qwen2_5_VLForConditionalGeneration):  # type: ignore[misc]
    """vLLM's model with pruned videos."""

    transformers_class: ClassVar[str] = "Qwen2_5_VLForConditionalGeneration"

    def unpruned(self, thw: Sequence[int], seconds: float | None, timestamps: Any) -> UnprunedVideo:
        """Return placeholders alone; time is counted in seconds if they are known."""
        grid, inputs = self.grid(thw), {"video_grid_thw": torch.tensor([list(thw)])}
        if seconds is not None:
            inputs["second_per_grid_ts"] = torch.tensor([float(seconds)])
        return UnprunedVideo(grid, torch.full((grid.num_tokens,), int(self.config.video_token_id)), inputs)
