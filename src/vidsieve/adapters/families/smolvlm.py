"""SmolVLM 2: every frame an image of (side / scale)² tokens, between markers and a time stamp."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from vidsieve.adapters.families.frames import FrameAdapter
from vidsieve.adapters.transformers_api import encoder_features


class SmolVLMAdapter(FrameAdapter):
    """Adapter of `SmolVLMForConditionalGeneration`; the LLM is a Llama under ``text_model``."""

    family: ClassVar[str] = "smolvlm"
    video_keys: ClassVar[tuple[str, ...]] = ("pixel_values", "pixel_attention_mask")
    tower: ClassVar[str] = "model.vision_model"
    projector: ClassVar[str] = "model.connector"

    @property
    def language_model(self) -> Any:
        """The Llama inside."""
        return self.model.model.text_model

    def frame_features(self, inputs: Mapping[str, Any]) -> Tensor:
        """Return the images of ``pixel_values`` (B, images, 3, H, W) that are not padding, or ready features."""
        ready = encoder_features(inputs, "image")
        if ready is None:
            pixels = inputs["pixel_values"].to(self.device)
            ready = self.model.model.get_image_features(pixels, inputs.get("pixel_attention_mask"), return_dict=True)
        features = torch.cat([part.reshape(-1, part.shape[-1]) for part in ready.pooler_output])
        return features.reshape(-1, self.frame_side**2, features.shape[-1])

    def images(self, inputs: Mapping[str, Any]) -> Tensor:
        """Return the images of ``pixel_values`` that are not padding, which is zero."""
        pixels: Tensor = inputs["pixel_values"].flatten(0, 1)
        return pixels[pixels.flatten(1).any(1)]

    def images_of(self, inputs: Mapping[str, Any], frames: Tensor) -> dict[str, Any]:
        """Return a call with some of the images that are not padding, as if they were one prompt's."""
        parts = {name: inputs.get(name) for name in self.video_keys}
        real = inputs["pixel_values"].flatten(0, 1).flatten(1).any(1)
        chosen = {
            name: part.flatten(0, 1)[real][frames.to(real.device)] for name, part in parts.items() if part is not None
        }
        return {**inputs, **{name: part[None] for name, part in chosen.items()}}

    @property
    def frame_side(self) -> int:
        """Patches along one side over the connector's scale factor."""
        vision = self.model.config.vision_config
        return int(vision.image_size // vision.patch_size // self.model.config.scale_factor)
