"""Molmo2: a time before each frame, between markers; all visual tokens of a prompt see each other both ways."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from vidsieve.adapters.adapter import Adapter
from vidsieve.adapters.encoded import Encoded, VideoFeatures
from vidsieve.adapters.locate import needed
from vidsieve.adapters.transformers_api import encoder_features
from vidsieve.types import Need, Prompt, Stage, TokenGrid


class Molmo2Adapter(Adapter):
    """Adapter of `Molmo2ForConditionalGeneration`; positions are 1-D.

    ``mm_token_type_ids`` mark the block in which attention goes both ways: a mask of the whole prompt is no stock call,
    and methods inside the LLM, which mask causally, are refused. Images have the videos' placeholders, and the model
    takes one or the other.
    """

    family: ClassVar[str] = "molmo2"
    oldest: ClassVar[str] = "5.20"
    definition: ClassVar[Literal["masked", "shortened"]] = "shortened"
    video_keys: ClassVar[tuple[str, ...]] = ("pixel_values_videos", "video_token_pooling", "video_grids")
    image_keys: ClassVar[tuple[str, ...]] = ("pixel_values", "image_token_pooling", "image_grids", "image_num_crops")
    column_keys: ClassVar[tuple[str, ...]] = ("mm_token_type_ids",)
    provides: ClassVar[frozenset[Need]] = frozenset({Need.QUESTION})
    lacks: ClassVar[Mapping[Need | Stage, str]] = {
        Stage.FRAME: "its tokens are pooled by the numbers of patches among those of all frames",
        Stage.ENCODER: "its projector reads several blocks of the vision encoder",
    }

    def holds_video(self, ids: Tensor) -> bool:
        """True if prompts hold placeholders, and a frame's marker or none of an image."""
        config = self.model.config
        frame, image = ids == config.frame_start_token_id, ids == config.low_res_image_start_token_id
        return super().holds_video(ids) and bool(frame.any() or not image.any())

    def holds_image(self, ids: Tensor) -> bool:
        """True if prompts hold an image's marker."""
        return bool((ids == self.model.config.low_res_image_start_token_id).any())

    def video_features(self, inputs: Mapping[str, Any]) -> list[VideoFeatures]:
        """Return each video of ``pixel_values_videos`` by ``video_grids`` (videos, 3), or of ready features."""
        grids = needed(inputs, "video_grids", "a video")
        ready = encoder_features(inputs, "video")
        if ready is None:
            pixels = inputs["pixel_values_videos"].to(self.device)
            pooling = needed(inputs, "video_token_pooling", "a video").to(self.device)
            ready = self.model.model.get_video_features(pixels, pooling, grids, return_dict=True)
        shapes = [TokenGrid(*grid) for grid in grids.tolist()]
        parts = torch.split(torch.cat(list(ready.pooler_output)), [grid.num_tokens for grid in shapes])
        return [VideoFeatures(part, grid, part[:0]) for part, grid in zip(parts, shapes, strict=True)]

    def prompt(self, encoded: Encoded, video: int) -> Prompt:
        """Return the whole prompt around one video; the LLM reads the sum of a feature and its placeholder's word."""
        prompt, row = super().prompt(encoded, video), encoded.videos[video].row
        ids = encoded.input_ids[row][encoded.attention_mask[row]]
        word = self.model.get_input_embeddings()(ids.new_tensor([self.video_token_id]))
        visual = (ids == self.video_token_id)[:, None].to(prompt.embeds.device)
        return replace(prompt, embeds=prompt.embeds + visual * word.to(prompt.embeds))
