"""Kimi-K2.5 (and 2.6): frames averaged in chunks, each chunk behind a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any, ClassVar

import torch
from torch import Tensor

from vidsieve.adapters.adapter import Adapter
from vidsieve.adapters.families.pieces import Encoding, Frames, Piece, PieceAdapter
from vidsieve.adapters.locate import needed
from vidsieve.adapters.transformers_api import encoder_features
from vidsieve.types import Need

LONGEST = 16
"""Most tokens between two chunks of a video: the four around them, and the twelve characters of a time."""


class KimiK25Adapter(PieceAdapter):
    """Adapter of `Kimi_K25ForConditionalGeneration`; positions are 1-D.

    A chunk is a frame to methods. Chunks of one size between which lies no more than a time, as much as between any in
    the prompt, are one video. Methods inside the LLM do not know its latent attention.
    """

    family: ClassVar[str] = "kimi_k25"
    oldest: ClassVar[str] = "5.24"
    video_keys: ClassVar[tuple[str, ...]] = ("pixel_values_videos", "video_grid_thw")
    image_keys: ClassVar[tuple[str, ...]] = ("pixel_values", "image_grid_thw")
    projector: ClassVar[str] = "model.mm_projector"
    provides: ClassVar[frozenset[Need]] = Adapter.provides - {Need.LAYER_ATTENTION}

    def pieces(self, inputs: Mapping[str, Any]) -> list[Encoding]:
        """Return each chunk of ``pixel_values_videos`` by ``video_grid_thw`` (chunks, 3), or of ready features."""
        grids = needed(inputs, "video_grid_thw", "a video")
        ready = encoder_features(inputs, "video")
        if ready is None:
            pixels = inputs["pixel_values_videos"].to(self.device)
            ready = self.model.model.get_video_features(pixels, grids.to(self.device), return_dict=True)
        down, across = self.model.config.vision_config.merge_kernel_size
        shapes = [(height // down, width // across) for _, height, width in grids.tolist()]
        parts = torch.split(torch.cat(list(ready.pooler_output)), [height * width for height, width in shapes])
        return [(part, *shape) for part, shape in zip(parts, shapes, strict=True)]

    def grids(self, pieces: Sequence[Piece], ids: Tensor) -> Iterator[Frames]:
        """Return the chunks of each video."""
        gap = min([LONGEST, *(piece.gap for piece in pieces[1:])])
        frames = [[pieces[0]]]
        for before, piece in pairwise(pieces):
            if piece.gap != gap or (piece.height, piece.width) != (before.height, before.width):
                yield frames, 1
                frames = []
            frames.append([piece])
        yield frames, 1

    def image_features(self, inputs: Mapping[str, Any]) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Return the images of ``pixel_values`` by ``image_grid_thw`` (images, 3), or of ready features."""
        ready = encoder_features(inputs, "image")
        if ready is None:
            pixels = needed(inputs, "pixel_values").to(self.device)
            grids = needed(inputs, "image_grid_thw").to(self.device)
            ready = self.model.model.get_image_features(pixels, grids, return_dict=True)
        return torch.cat(list(ready.pooler_output)), ()
