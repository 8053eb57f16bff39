"""Perception LM: frames of 32×32 patches, pooled after the projector to 16×16 tokens each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor
from torch.nn import Conv2d

from vidsieve.adapters.families.counted import StackedAdapter
from vidsieve.adapters.front import cells
from vidsieve.types import ENCODER_NEEDS, Need, Stage


class PerceptionLMAdapter(StackedAdapter):
    """Adapter of `PerceptionLMForConditionalGeneration`, which encodes frames as it does the tiles of images."""

    family: ClassVar[str] = "perception_lm"
    fronts: ClassVar[frozenset[Stage]] = frozenset({Stage.FRAME})
    lacks: ClassVar[Mapping[Need | Stage, str]] = dict.fromkeys(
        [*ENCODER_NEEDS, Stage.ENCODER], "its vision encoder is timm's, whose attention is not transformers' own"
    )

    def frame_cells(self, inputs: Mapping[str, Any]) -> list[Tensor]:
        """Return the pixels of each video's frames by the patches of the vision tower, which timm configures."""
        first = next(module for module in self.model.model.vision_tower.modules() if isinstance(module, Conv2d))
        return [cells(frames, first.kernel_size[0]) for frames in inputs["pixel_values_videos"]]

    def encode_frames(self, pixels: Tensor, inputs: Mapping[str, Any]) -> Tensor:
        """Return the features (videos·T, n, D) of every frame."""
        features: Tensor = self.model.model.get_image_features(pixels, return_dict=True).pooler_output
        return features
