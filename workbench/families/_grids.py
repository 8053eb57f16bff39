"""Prompts of families with Qwen's grids whose positions are counted: no kinds of tokens, no times between frames."""

from __future__ import annotations

import torch
from torch import Tensor

from vidsieve.testing.tiny_models import IMAGE, VIDEO, rows_to_batch
from workbench.families import Batch
from workbench.families._qwen import HEIGHT, WIDTH

SIZE, PATCHES = HEIGHT * WIDTH, [2 * HEIGHT, 2 * WIDTH]


def grid_inputs(batch: Batch, words: list[int], pad: str = "left", image: bool = False) -> dict[str, Tensor]:
    """Return the inputs of a batch, as `Tiny.inputs`."""
    draw = torch.Generator().manual_seed(1)
    parts = [[[118, *[VIDEO] * (frames * SIZE), 119] for frames in videos] for videos in batch]
    found = rows_to_batch(parts, words, pad, draw, [118, *[IMAGE] * SIZE, 119] if image else [])
    grids = torch.tensor([[frames, *PATCHES] for videos in batch for frames in videos])
    found |= {"pixel_values_videos": torch.randn(int(grids.prod(1).sum()), 96, generator=draw), "video_grid_thw": grids}
    if image:
        found["image_grid_thw"] = torch.tensor([[1, *PATCHES]] * len(batch))
        found["pixel_values"] = torch.randn(len(batch) * 4 * SIZE, 96, generator=draw)
    return found
