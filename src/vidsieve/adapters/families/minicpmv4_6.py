"""MiniCPM-V 4.6 and MiniCPM-OCR: frames with slices that show them larger, merged inside the vision tower."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from vidsieve.adapters.adapter import Adapter
from vidsieve.adapters.families.pieces import Encoding, Frames, Piece, PieceAdapter
from vidsieve.adapters.locate import needed
from vidsieve.adapters.transformers_api import encoder_features
from vidsieve.types import Need

CLOSE = 2
"""Markers between two pictures of a video: one ends the first, one begins the second."""


class MiniCPMV46Adapter(PieceAdapter):
    """Adapter of `MiniCPMV4_6ForConditionalGeneration`, whose LLM is Qwen3.5's hybrid; positions are 1-D.

    Frames that only markers part are one video. Of a video with slices, the overviews of its frames are one grid, and
    the slices, put together, another: methods see two videos. So they do where stacked frames differ in size.
    """

    family: ClassVar[str] = "minicpmv4_6"
    definition: ClassVar[Literal["masked", "shortened"]] = "shortened"
    video_keys: ClassVar[tuple[str, ...]] = ("pixel_values_videos", "target_sizes_videos", "downsample_mode")
    image_keys: ClassVar[tuple[str, ...]] = ("pixel_values", "target_sizes")
    projector: ClassVar[str] = "model.merger"
    provides: ClassVar[frozenset[Need]] = Adapter.provides

    def pieces(self, inputs: Mapping[str, Any]) -> list[Encoding]:
        """Return each picture of ``pixel_values_videos`` by ``target_sizes_videos`` (pieces, 2), or ready features."""
        sizes = needed(inputs, "target_sizes_videos", "a video")
        mode = inputs.get("downsample_mode") or self.model.config.downsample_mode
        ready = encoder_features(inputs, "video")
        if ready is None:
            pixels = inputs["pixel_values_videos"].to(self.device)
            ready = self.model.model.get_video_features(pixels, sizes.to(self.device), mode, return_dict=True)
        merged = 2 if mode == "4x" else 4
        shapes = [(height // merged, width // merged) for height, width in sizes.tolist()]
        parts = torch.split(torch.cat(list(ready.pooler_output)), [height * width for height, width in shapes])
        return [(part, *shape) for part, shape in zip(parts, shapes, strict=True)]

    def grids(self, pieces: Sequence[Piece], ids: Tensor) -> Iterator[Frames]:
        """Return by video the overviews of one size, and the slices that tile a frame alike."""
        overview = ids[pieces[0].columns[0] - 1]  # the marker before a frame; slices have another
        videos: list[list[list[Piece]]] = []
        for piece in pieces:
            if ids[piece.columns[0] - 1] != overview:
                videos[-1][-1].append(piece)
            elif videos and piece.gap == CLOSE:
                videos[-1].append([piece])
            else:
                videos.append([[piece]])
        for frames in videos:
            alike: dict[tuple[int, ...], list[list[Piece]]] = {}
            for first, *slices in frames:
                alike.setdefault((first.height, first.width), []).append([first])
                if slices:  # a newline ends a row of them
                    ends = (number for number, piece in enumerate(slices) if number and piece.gap > CLOSE)
                    kind = (slices[0].height, slices[0].width, next(ends, len(slices)), len(slices))
                    alike.setdefault(kind, []).append(slices)
            yield from ((some, kind[2] if len(kind) > 2 else 1) for kind, some in alike.items())

    def image_features(self, inputs: Mapping[str, Any]) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Return the images of ``pixel_values`` by ``target_sizes`` (pieces, 2), or of ready features."""
        ready = encoder_features(inputs, "image")
        if ready is None:
            pixels = needed(inputs, "pixel_values").to(self.device)
            sizes = needed(inputs, "target_sizes").to(self.device)
            ready = self.model.model.get_image_features(pixels, sizes, inputs.get("downsample_mode"), return_dict=True)
        return torch.cat(list(ready.pooler_output)), ()


class MiniCPMOcrAdapter(MiniCPMV46Adapter):
    """Adapter of `MiniCPMOcrForConditionalGeneration`: MiniCPM-V 4.6 that merges less, by its configuration."""

    family: ClassVar[str] = "minicpm_ocr"
    oldest: ClassVar[str] = "5.22"
