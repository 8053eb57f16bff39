"""Qwen3-VL in vLLM: each frame follows its time in words, which are always kept; deepstack features inside the LLM.

Qwen3-VL-MoE and Qwen3.5 have the same processor and prompts, and vLLM's classes of them inherit from Qwen3-VL's.

The number of tokens that each frame keeps is known only after the vision encoder, so the whole video, its words too, is
placeholders in the prompt, and the words' embeddings come with the video's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from vllm.model_executor.models import qwen3_vl as theirs
from vllm.multimodal import MULTIMODAL_REGISTRY

from vidsieve.serving.vllm.positions import CarriesPositions, UnprunedVideo
from vidsieve.serving.vllm.processing import PruningProcessor


class Qwen3VLProcessor(PruningProcessor, theirs.Qwen3VLMultiModalProcessor):  # type: ignore[misc]
    """vLLM's processor with one placeholder per kept token and per token of the words between frames."""

    def tokens_of(self, place: int, items: Any, fields: Any) -> tuple[int, int]:
        """Return a video's grid tokens, and the tokens of its times and marks."""
        names = ("video_grid_thw", "timestamps")
        if "video" in fields:
            grid, times = (fields["video"][place][name].data for name in names)
        else:
            grid, times = (fields[name][place] for name in names)
        config = self.info.get_hf_config()
        words = words_of(times, 0, self.info.get_tokenizer(), config)
        return int(grid.prod()) // config.vision_config.spatial_merge_size**2, len(words)


class WithTimes(CarriesPositions):
    """Mixed in before a vLLM model whose frames follow their times."""

    _tokenizer: Any

    def unpruned(self, thw: Sequence[int], seconds: float | None, timestamps: Any) -> UnprunedVideo:
        """Return each frame's time and its placeholders between their start and end marks."""
        grid = self.grid(thw)
        ids = words_of(timestamps, grid.height * grid.width, self._tokenizer, self.config)
        return UnprunedVideo(grid, torch.tensor(ids), {"video_grid_thw": torch.tensor([list(thw)])})


@MULTIMODAL_REGISTRY.register_processor(
    Qwen3VLProcessor, info=theirs.Qwen3VLProcessingInfo, dummy_inputs=theirs.Qwen3VLDummyInputsBuilder
)
class Qwen3VL(WithTimes, theirs.Qwen3VLForConditionalGeneration):  # type: ignore[misc]
    """vLLM's model with pruned videos."""

    transformers_class: ClassVar[str] = "Qwen3VLForConditionalGeneration"


def words_of(timestamps: Any, tokens: int, tokenizer: Any, config: Any) -> list[int]:
    """Return the ids of frames at `timestamps` (T,) seconds with so many tokens each, as vLLM writes them."""
    times = torch.as_tensor(timestamps, dtype=torch.float64).flatten().tolist()
    replacement = theirs.Qwen3VLMultiModalProcessor.get_video_repl(
        tokens_per_frame=[tokens] * len(times),
        timestamps=times,
        tokenizer=tokenizer,
        vision_start_token_id=config.vision_start_token_id,
        vision_end_token_id=config.vision_end_token_id,
        video_token_id=config.video_token_id,
    )
    return list(replacement.full)
