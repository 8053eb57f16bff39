"""VideoLLaMA 3: a time in words before each frame, and frames from which the model drops what has not changed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPooling

from vidsieve.adapters.encoded import VideoFeatures
from vidsieve.adapters.families.counted import CountedAdapter
from vidsieve.adapters.transformers_api import encoder_features
from vidsieve.errors import PromptError, UnsupportedCallError
from vidsieve.types import Need, Stage, TokenGrid


class VideoLlama3Adapter(CountedAdapter):
    """Adapter of `VideoLlama3ForConditionalGeneration`.

    The processor marks in ``video_compression_mask`` the tokens that differ from those of the frame before; the others
    have no placeholder. A method chooses among those that are left, and budgets count these alone. Methods that read
    whole frames need a processor with ``use_token_compression=False``.
    """

    family: ClassVar[str] = "video_llama_3"
    video_keys: ClassVar[tuple[str, ...]] = (
        "pixel_values_videos",
        "video_grid_thw",
        "video_merge_sizes",
        "video_compression_mask",
    )
    image_keys: ClassVar[tuple[str, ...]] = ("pixel_values", "image_grid_thw", "image_merge_sizes")
    projector: ClassVar[str] = "model.projector"
    lacks: ClassVar[Mapping[Need | Stage, str]] = dict.fromkeys(
        [Stage.FRAME, Stage.ENCODER], "its processor leaves out tokens that repeat those of the frame before"
    )

    def limit_frames(self, processor: Any, tokens: int) -> None:
        """Refuse: the processor limits a video, whatever its number of frames."""
        raise UnsupportedCallError(
            f"{self.family} limits the pixels of a whole video, not of a frame: set size['longest_edge'] of its video "
            "processor"
        )

    def video_features(self, inputs: Mapping[str, Any]) -> list[VideoFeatures]:
        """Return the tokens left of each video of ``pixel_values_videos``, or of ready features of whole videos."""
        missing = [key for key in self.video_keys[1:] if inputs.get(key) is None]
        if missing:
            raise PromptError(f"{', '.join(missing)} is missing: hand over everything that the processor returned")
        grids, merges, mask = (inputs[key] for key in self.video_keys[1:])
        ready = encoder_features(inputs, "video")
        if ready is None:
            pixels = inputs["pixel_values_videos"].to(self.device)
            ready = self.model.model.get_video_features(pixels, grids, merges, return_dict=True)
        shapes = [TokenGrid(t, h // m, w // m) for (t, h, w), m in zip(grids.tolist(), merges.tolist(), strict=True)]
        sizes = [grid.num_tokens for grid in shapes]
        if mask.shape != (sum(sizes),):
            raise PromptError(f"video_compression_mask is {tuple(mask.shape)} for videos of {sum(sizes)} tokens")
        parts = torch.split(torch.cat(list(ready.pooler_output)), sizes), shapes, torch.split(mask.bool(), sizes)
        return [_left(*part) for part in zip(*parts, strict=True)]

    def ready_features(self, video: VideoFeatures) -> dict[str, Any]:
        """Return the whole video (T·H·W, D), with zeros where the model's own pruning left nothing."""
        rows = video.embeds
        if video.grid.places is not None:
            places = torch.tensor(video.grid.places, device=rows.device)
            rows = rows.new_zeros(video.grid.whole.num_tokens, rows.shape[1]).index_copy(0, places, rows)
        return {"video": BaseModelOutputWithPooling(pooler_output=[rows])}


def _left(tokens: Tensor, grid: TokenGrid, mask: Tensor) -> VideoFeatures:
    """Return the tokens (N, D) of a grid that a mask (N,) leaves."""
    left = mask.nonzero().flatten()
    if len(left) < grid.num_tokens:
        tokens, grid = tokens[left.to(tokens.device)], replace(grid, places=tuple(left.tolist()))
    return VideoFeatures(tokens, grid, tokens[:0])
