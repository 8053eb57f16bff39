"""Qwen3-VL in vLLM: frames behind their times in words, which always stay, and features added inside the LLM.

Which frame keeps how many tokens is known behind the encoder, so all that stands for a video, its words too, is
placeholders in the prompt, and the words' embeddings come with the video's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from vllm.model_executor.models import qwen3_vl as theirs
from vllm.multimodal import MULTIMODAL_REGISTRY

from vidsieve.serving.vllm.positions import CarriesPositions, Stands
from vidsieve.serving.vllm.processing import PruningProcessor


class Qwen3VLProcessor(PruningProcessor, theirs.Qwen3VLMultiModalProcessor):  # type: ignore[misc]
    """vLLM's processor with as many placeholders as tokens stay, and as the words between frames have."""

    def tokens_of(self, place: int, items: Any, fields: Any) -> tuple[int, int]:
        """Return a video's grid tokens, and the tokens of its times and marks."""
        found = {name: fields["video"][place][name].data for name in _NAMES} if "video" in fields else None
        grid, times = (fields[name][place] if found is None else found[name] for name in _NAMES)
        config = self.info.get_hf_config()
        words = words_of(times, 0, self.info.get_tokenizer(), config)
        return int(grid.prod()) // config.vision_config.spatial_merge_size**2, len(words)


@MULTIMODAL_REGISTRY.register_processor(
    Qwen3VLProcessor, info=theirs.Qwen3VLProcessingInfo, dummy_inputs=theirs.Qwen3VLDummyInputsBuilder
)
class Qwen3VL(CarriesPositions, theirs.Qwen3VLForConditionalGeneration):  # type: ignore[misc]
    """vLLM's model; a video's embeddings are cut to what stays, its times among them, before they are cached."""

    transformers_class: ClassVar[str] = "Qwen3VLForConditionalGeneration"
    _tokenizer: Any

    def stands_for(self, thw: Sequence[int], seconds: float | None, timestamps: Any) -> Stands:
        """Return each frame's time and placeholders between the marks of its beginning and end."""
        grid = self.grid(thw)
        ids = words_of(timestamps, grid.height * grid.width, self._tokenizer, self.config)
        return Stands(grid, torch.tensor(ids), {"video_grid_thw": torch.tensor([list(thw)])})


_NAMES = ("video_grid_thw", "timestamps")


def words_of(timestamps: Any, tokens: int, tokenizer: Any, config: Any) -> list[int]:
    """Return the ids of frames at `timestamps` (T,) seconds with so many tokens each, as vLLM writes them."""
    times = torch.as_tensor(timestamps, dtype=torch.float64).flatten().tolist()
    written = theirs.Qwen3VLMultiModalProcessor.get_video_repl(
        tokens_per_frame=[tokens] * len(times),
        timestamps=times,
        tokenizer=tokenizer,
        vision_start_token_id=config.vision_start_token_id,
        vision_end_token_id=config.vision_end_token_id,
        video_token_id=config.video_token_id,
    )
    return list(written.full)
