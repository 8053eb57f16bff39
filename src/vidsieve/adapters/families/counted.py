"""Families that count their positions as text does (1-D), by the shape in which they take a video."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPooling

from vidsieve.adapters.adapter import Adapter
from vidsieve.adapters.encoded import VideoFeatures
from vidsieve.adapters.families.llava_onevision import LlavaOnevisionAdapter, layer_options
from vidsieve.adapters.locate import needed
from vidsieve.adapters.transformers_api import encoder_features
from vidsieve.errors import PromptError
from vidsieve.types import Stage, TokenGrid


class CountedAdapter(Adapter):
    """Base of families whose still images are encoded from what `image_keys` names, in this order."""

    image_keys: ClassVar[tuple[str, ...]] = ("pixel_values",)

    def image_features(self, inputs: Mapping[str, Any]) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Return the images of a call, or of ready features."""
        ready = encoder_features(inputs, "image")
        if ready is None:
            pixels, *further = [needed(inputs, key) for key in self.image_keys]
            pixels = pixels.to(self.device, self.model.dtype)
            ready = self.model.model.get_image_features(pixels, *further, return_dict=True, **layer_options(inputs))
        return torch.cat([image.flatten(0, -2) for image in ready.pooler_output]), ()


class CountedPositions(Adapter):
    """Positions of one row, counted; stands before an adapter that shares all else with a family."""

    position_rows = Adapter.position_rows
    positions = Adapter.positions
    legacy_positions = Adapter.legacy_positions
    pack_positions = Adapter.pack_positions
    unpack_positions = Adapter.unpack_positions


class CompactPositions(CountedPositions):
    """Positions counted over what is kept: the one convention of families whose `generate` ignores positions.

    Their models count every slot anew whatever positions they are given, so that a video's original ones would reach a
    plain forward and be lost in `generate`.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.convention = "compact"


class StackedAdapter(CountedAdapter):
    """Base of families that encode ``pixel_values_videos`` (videos, T, 3, H, W) frame by frame, n tokens each.

    Ready features of videos must be (videos, T, n, D), which the models take too; their own outputs do not all say
    which frames are one video.
    """

    video_keys: ClassVar[tuple[str, ...]] = ("pixel_values_videos",)
    flat: ClassVar[frozenset[str]] = frozenset({"video", "image"})
    fronts: ClassVar[frozenset[Stage]] = frozenset({Stage.FRAME, Stage.ENCODER})

    frame_cells = LlavaOnevisionAdapter.frame_cells
    frames_of = LlavaOnevisionAdapter.frames_of

    def encode_frames(self, pixels: Tensor, inputs: Mapping[str, Any]) -> Tensor:
        """Return the features of every frame of videos (videos, T, 3, H, W), T·n rows of D a video, in order."""
        ready = self.model.model.get_video_features(pixels, return_dict=True, **layer_options(inputs))
        return torch.cat([part.flatten(0, -2) for part in ready.pooler_output])

    def frame_grid(self, frames: int, tokens: int) -> TokenGrid:
        """Return the grid of a video of `frames` with `tokens` each; here a square."""
        side = math.isqrt(tokens)
        return TokenGrid(frames, side, side)

    def video_features(self, inputs: Mapping[str, Any]) -> list[VideoFeatures]:
        """Return each video of ``pixel_values_videos``, or of ready features (videos, T, n, D)."""
        ready = encoder_features(inputs, "video")
        if ready is None:
            pixels = inputs["pixel_values_videos"].to(self.device, self.model.dtype)
            features = self.encode_frames(pixels, inputs)
            features = features.reshape(*pixels.shape[:2], -1, features.shape[-1])
        else:
            features = ready.pooler_output
            if any(video.ndim != 3 for video in features):
                raise PromptError(
                    f"ready features of {self.family} do not say which frames are one video: reshape pooler_output to "
                    "(videos, frames, tokens of a frame, width)"
                )
        grids = [self.frame_grid(*video.shape[:2]) for video in features]
        return [VideoFeatures(v.flatten(0, 1), grid, v[:0, 0]) for v, grid in zip(features, grids, strict=True)]

    def ready_features(self, video: VideoFeatures) -> dict[str, Any]:
        """Return the video (1, T, n, D)."""
        frames = video.embeds.reshape(video.grid.frames, -1, video.embeds.shape[-1])
        return {"video": BaseModelOutputWithPooling(pooler_output=frames[None])}
