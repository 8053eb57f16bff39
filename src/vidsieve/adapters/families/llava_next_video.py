"""LLaVA-NeXT-Video: frames of 24×24 patches, pooled 2×2 to 144 tokens each, without newlines."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from vidsieve.adapters.families.counted import StackedAdapter
from vidsieve.adapters.families.llava_onevision import ReadsLayer
from vidsieve.adapters.probe import block_mean
from vidsieve.types import ENCODER_NEEDS, Need


class LlavaNextVideoAdapter(ReadsLayer, StackedAdapter):
    """Adapter of `LlavaNextVideoForConditionalGeneration`; the vision tower is CLIP."""

    family: ClassVar[str] = "llava_next_video"
    flat: ClassVar[frozenset[str]] = frozenset({"video"})
    provides: ClassVar[frozenset[Need]] = StackedAdapter.provides | ENCODER_NEEDS
    image_keys: ClassVar[tuple[str, ...]] = ("pixel_values", "image_sizes")
    cls_token: ClassVar[bool] = True

    def pool_signals(self, values: list[Tensor], inputs: Mapping[str, Any]) -> Tensor:
        """Return the mean of the patches that each token is pooled from."""
        patches = torch.cat(values).float()
        return block_mean(patches, math.isqrt(patches.shape[1]), self.model.config.spatial_pool_stride).flatten(0, 1)
