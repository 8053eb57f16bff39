"""Perception LM: frames of 32×32 patches, pooled after the projector to 16×16 tokens each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from vidsieve.adapters.families.counted import StackedAdapter


class PerceptionLMAdapter(StackedAdapter):
    """Adapter of `PerceptionLMForConditionalGeneration`, which encodes frames as it does the tiles of images."""

    family: ClassVar[str] = "perception_lm"

    def encode_frames(self, pixels: Tensor, inputs: Mapping[str, Any]) -> Tensor:
        """Return the features (videos·T, n, D) of every frame."""
        features: Tensor = self.model.model.get_image_features(pixels, return_dict=True).pooler_output
        return features
