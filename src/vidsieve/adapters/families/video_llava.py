"""Video-LLaVA: frames of 16×16 patches, each with the class token of its vision tower before them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from vidsieve.adapters.adapter import Adapter
from vidsieve.adapters.families.counted import StackedAdapter
from vidsieve.adapters.families.llava_onevision import ReadsLayer
from vidsieve.types import ENCODER_NEEDS, Need, TokenGrid


class VideoLlavaAdapter(ReadsLayer, StackedAdapter):
    """Adapter of `VideoLlavaForConditionalGeneration`.

    A frame's class token is one of its tokens, so that a frame is no rectangle: its grid is one row of 1 + 256. Images,
    which have a tower of their own, go in separate calls.
    """

    family: ClassVar[str] = "video_llava"
    provides: ClassVar[frozenset[Need]] = StackedAdapter.provides | ENCODER_NEEDS
    image_keys: ClassVar[tuple[str, ...]] = ()
    tower: ClassVar[str] = "model.video_tower"

    image_features = Adapter.image_features

    def pool_signals(self, values: list[Tensor], inputs: Mapping[str, Any]) -> Tensor:
        """Return the patches, the class token among them, as they are: each is a token."""
        return torch.cat([some.flatten(0, 1) for some in values]).float()

    def frame_grid(self, frames: int, tokens: int) -> TokenGrid:
        """Return T × 1 × n."""
        return TokenGrid(frames, 1, tokens)
