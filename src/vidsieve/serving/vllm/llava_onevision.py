"""LLaVA-OneVision in vLLM: one placeholder per kept token, and the newline.

Positions are compact: vLLM counts 1-D positions over the kept tokens (``positions="compact"`` under transformers).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.models import llava_onevision as theirs
from vllm.multimodal import MULTIMODAL_REGISTRY

from vidsieve.serving.vllm.processing import PruningProcessor
from vidsieve.serving.vllm.shared import CARRIED, Selector, check_engine, settings_of
from vidsieve.types import TokenGrid


class LlavaOnevisionProcessor(PruningProcessor, theirs.LlavaOnevisionMultiModalProcessor):  # type: ignore[misc]
    """vLLM's processor with one placeholder per kept token, and the newline."""

    def tokens_of(self, place: int, items: Any, fields: Any) -> tuple[int, int]:
        """Return a video's grid tokens, and its tokens outside the grid."""
        videos = items.get_items("video", theirs.VideoProcessorItems)
        size = videos.get_frame_size(place)
        count = self.info.get_num_video_tokens(
            image_width=size.width, image_height=size.height, num_frames=videos.get_num_frames(place)
        )
        return count - 1, 1


@MULTIMODAL_REGISTRY.register_processor(
    LlavaOnevisionProcessor,
    info=theirs.LlavaOnevisionProcessingInfo,
    dummy_inputs=theirs.LlavaOnevisionDummyInputsBuilder,
)
class LlavaOnevision(theirs.LlavaOnevisionForConditionalGeneration):  # type: ignore[misc]
    """vLLM's model with pruned videos."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        settings = settings_of(vllm_config.model_config.hf_config)
        if settings is not None:
            check_engine(vllm_config)
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self._selector = Selector.of(settings, self, "LlavaOnevisionForConditionalGeneration", vllm_config.model_config)
        self._carried: dict[str, Any] = {}

    def embed_multimodal(self, **kwargs: Any) -> Any:
        """Return the embeddings of every image and video, the latter pruned."""
        self._carried = {name: kwargs.pop(name, None) for name in CARRIED}
        return super().embed_multimodal(**kwargs)

    def _process_video_pixels(self, inputs: Any) -> Sequence[Tensor]:
        videos = list(super()._process_video_pixels(inputs))
        if self._selector is None:
            return videos
        vision = self.config.vision_config
        side = -(-(vision.image_size // vision.patch_size) // 2)
        for place, video in enumerate(videos):
            tokens = video.reshape(-1, video.shape[-1])
            grid = TokenGrid((len(tokens) - 1) // side**2, side, side)
            _, kept, _ = self._selector(tokens[:-1], grid, self._carried, place, tail=tokens[-1:])
            videos[place] = torch.cat([kept, tokens[-1:]])
        return videos

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Load weights, also those of vision towers under the names of transformers 5."""
        return set(super().load_weights(_renamed(weights)))


def _renamed(weights: Iterable[tuple[str, Tensor]]) -> Iterable[tuple[str, Tensor]]:
    for name, weight in weights:
        head, mark, rest = name.partition("vision_tower.")
        if mark and not rest.startswith("vision_model."):
            name = f"{head}{mark}vision_model.{rest}"
        yield name, weight
