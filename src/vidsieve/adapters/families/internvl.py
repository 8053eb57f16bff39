"""InternVL 3: every frame an image of ⌊side·downsampling⌋² tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from vidsieve.adapters.families.frames import FrameAdapter
from vidsieve.adapters.families.llava_onevision import ReadsLayer
from vidsieve.adapters.transformers_api import encoder_features


class InternVLAdapter(ReadsLayer, FrameAdapter):
    """Adapter of `InternVLForConditionalGeneration`; images may have several tiles, a frame has one."""

    family: ClassVar[str] = "internvl"
    cls_token: ClassVar[bool] = True
    video_keys: ClassVar[tuple[str, ...]] = ("pixel_values",)

    def frame_features(self, inputs: Mapping[str, Any]) -> Tensor:
        """Return the tiles of ``pixel_values`` (F, 3, H, W), or ready features."""
        ready = encoder_features(inputs, "image")
        if ready is None:
            names = ("vision_feature_layer", "vision_feature_select_strategy")
            config = self.model.config
            options = {n: inputs[n] if inputs.get(n) is not None else getattr(config, n) for n in names}
            pixels = inputs["pixel_values"].to(self.device)
            ready = self.model.model.get_image_features(pixels, return_dict=True, **options)
        features: Tensor = ready.pooler_output
        return features.reshape(-1, self.frame_side**2, features.shape[-1])

    @property
    def frame_side(self) -> int:
        """Patches along one side, after pixel shuffle."""
        vision = self.model.config.vision_config
        return int(vision.image_size[0] // vision.patch_size[0] * self.model.config.downsample_ratio)
