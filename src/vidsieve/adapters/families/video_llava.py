"""Video-LLaVA: frames of 16×16 patches, each with the class token of its vision tower before them."""

from __future__ import annotations

from typing import ClassVar

from vidsieve.adapters.adapter import Adapter
from vidsieve.adapters.families.counted import StackedAdapter
from vidsieve.types import TokenGrid


class VideoLlavaAdapter(StackedAdapter):
    """Adapter of `VideoLlavaForConditionalGeneration`.

    A frame's class token is one of its tokens, so that a frame is no rectangle: its grid is one row of 1 + 256. Images,
    which have a tower of their own, go in separate calls.
    """

    family: ClassVar[str] = "video_llava"
    image_keys: ClassVar[tuple[str, ...]] = ()

    image_features = Adapter.image_features

    def frame_grid(self, frames: int, tokens: int) -> TokenGrid:
        """Return T × 1 × n."""
        return TokenGrid(frames, 1, tokens)
