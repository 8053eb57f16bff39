"""LLaVA-OneVision: T × ⌈h/2⌉ × ⌈w/2⌉ pooled tokens and one newline after the whole video."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPooling

from vidsieve.adapters.adapter import Adapter
from vidsieve.adapters.encoded import VideoFeatures
from vidsieve.adapters.front import cells
from vidsieve.adapters.locate import needed
from vidsieve.adapters.probe import attention_modules
from vidsieve.adapters.transformers_api import encoder_features
from vidsieve.errors import UnsupportedCallError
from vidsieve.types import ENCODER_NEEDS, Need, Stage, TokenGrid


class ReadsLayer(Adapter):
    """Base of families whose projector reads the hidden states that ``vision_feature_layer`` names."""

    def probe_point(self, inputs: Mapping[str, Any]) -> tuple[Any, Any]:
        """Return the block whose output the projector reads (several: the last)."""
        number = _feature_layers(self.model, inputs)[-1]
        blocks = attention_modules(self.model.get_submodule(self.tower))
        return self.model.config.vision_config, blocks[number if number < 0 else number - 1]

    def encoder_blocks(self, inputs: Mapping[str, Any]) -> list[Any]:
        """Return the blocks up to the one whose output the projector reads.

        Raises
        ------
        UnsupportedCallError
            If it reads several, whose frames would differ.
        """
        if len(layers := _feature_layers(self.model, inputs)) > 1:
            raise UnsupportedCallError(
                f"the projector reads several blocks of the vision encoder (vision_feature_layer {layers}): frames "
                "cannot be merged between them"
            )
        return super().encoder_blocks(inputs)


class LlavaOnevisionAdapter(ReadsLayer):
    """Adapter of `LlavaOnevisionForConditionalGeneration`.

    Each frame is pooled to a square grid by the model; its ``image_newline`` closes the video, lies outside
    the grid and is always kept. Positions are 1-D.
    """

    family: ClassVar[str] = "llava_onevision"
    flat: ClassVar[frozenset[str]] = frozenset({"video"})
    video_keys: ClassVar[tuple[str, ...]] = ("pixel_values_videos", "image_sizes_videos")
    provides: ClassVar[frozenset[Need]] = Adapter.provides | ENCODER_NEEDS
    image_keys: ClassVar[tuple[str, ...]] = ("pixel_values", "image_sizes", "batch_num_images", "vision_aspect_ratio")
    fronts: ClassVar[frozenset[Stage]] = frozenset({Stage.FRAME, Stage.ENCODER})

    def video_features(self, inputs: Mapping[str, Any]) -> list[VideoFeatures]:
        """Return each video of ``pixel_values_videos`` (videos, T, 3, H, W), or of ready features."""
        ready = encoder_features(inputs, "video")
        if ready is None:
            pixels = inputs["pixel_values_videos"].to(self.device, self.model.dtype)
            ready = self.model.model.get_video_features(pixels, return_dict=True, **layer_options(inputs))
        vision = self.model.config.vision_config
        side = -(-(vision.image_size // vision.patch_size) // 2)
        videos = []
        for tokens in ready.pooler_output:
            grid = TokenGrid((tokens.shape[0] - 1) // side**2, side, side)
            videos.append(VideoFeatures(tokens[:-1], grid, tokens[-1:]))
        return videos

    def frame_cells(self, inputs: Mapping[str, Any]) -> list[Tensor]:
        """Return the pixels of each video's frames by the patches of the vision tower."""
        patch = self.model.config.vision_config.patch_size
        return [cells(frames, patch) for frames in inputs["pixel_values_videos"]]

    def frames_of(self, inputs: Mapping[str, Any], video: int, frames: Tensor) -> dict[str, Any]:
        """Return a call with some frames of one video."""
        pixels = inputs["pixel_values_videos"][video]
        return {**inputs, "pixel_values_videos": pixels[frames.to(pixels.device)][None]}

    def ready_features(self, video: VideoFeatures) -> dict[str, Any]:
        """Return the video (1, N + 1, D) with its newline."""
        return {"video": BaseModelOutputWithPooling(pooler_output=torch.cat([video.embeds, video.tail])[None])}

    def image_features(self, inputs: Mapping[str, Any]) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Return the images of ``pixel_values`` (images, tiles, 3, H, W), or of ready features."""
        ready = encoder_features(inputs, "image")
        if ready is None:
            options = layer_options(inputs) | {k: inputs[k] for k in self.image_keys[2:] if inputs.get(k) is not None}
            pixels = needed(inputs, "pixel_values").to(self.device, self.model.dtype)
            sizes = needed(inputs, "image_sizes")
            ready = self.model.model.get_image_features(pixels, sizes, return_dict=True, **options)
        return torch.cat(list(ready.pooler_output)), ()

    def pool_signals(self, values: list[Tensor], inputs: Mapping[str, Any]) -> Tensor:
        """Return patches pooled to tokens as features are."""
        return torch.cat([self.model.model.apply_pooling(some.float()).flatten(0, 1) for some in values])


def layer_options(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a call that choose layers of the vision tower."""
    names = ("vision_feature_layer", "vision_feature_select_strategy")
    return {name: inputs[name] for name in names if inputs.get(name) is not None}


def _feature_layers(model: Any, inputs: Mapping[str, Any]) -> list[int]:
    """Return the numbers of the hidden states of the vision tower that the projector reads."""
    chosen = inputs.get("vision_feature_layer")
    layer = model.config.vision_feature_layer if chosen is None else chosen
    return [layer] if isinstance(layer, int) else list(layer)
