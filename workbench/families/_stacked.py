"""Tiny models whose processors stack the frames of videos: ``pixel_values_videos`` (videos, T, 3, H, W)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vidsieve.testing.tiny_models import IMAGE, VIDEO, VISION, rows_to_batch
from workbench.families import Batch

SIDE = 48
"""Pixels of a frame's side."""
CLIP = VISION | {"model_type": "clip_vision_model", "image_size": SIDE, "patch_size": 8, "projection_dim": 32}
"""A vision tower with 6×6 patches and a class token."""
CLIP_LAYERS = CLIP | {"num_hidden_layers": 3}
LLAVA_IDS = {"image_token_index": IMAGE, "video_token_index": VIDEO}


def stacked_inputs(
    size: int, image_tokens: int, image_pixels: dict[str, Any]
) -> Callable[[Batch, list[int], str, bool], dict[str, Tensor]]:
    """Return the function that makes inputs.

    Parameters
    ----------
    size : int
        Tokens of a frame.
    image_tokens : int
        Tokens of the still image that each prompt gets with ``image=True``.
    image_pixels : dict
        By argument, the shape of one image, or a list of numbers that the argument has for each.
    """

    def inputs(batch: Batch, words: list[int], pad: str = "left", image: bool = False) -> dict[str, Tensor]:
        draw = torch.Generator().manual_seed(1)
        frames = max(frames for videos in batch for frames in videos)
        count = sum(len(videos) for videos in batch)
        parts = [[[VIDEO] * (frames * size) for _ in videos] for videos in batch]
        found = rows_to_batch(parts, words, pad, draw, [IMAGE] * image_tokens if image else [])
        found["pixel_values_videos"] = torch.randn(count, frames, 3, SIDE, SIDE, generator=draw)
        for name, value in image_pixels.items() if image else ():
            one = torch.randn(1, *value, generator=draw) if isinstance(value, tuple) else torch.tensor([value])
            found[name] = one.repeat(len(batch), *[1] * (one.ndim - 1))
        return found

    return inputs
