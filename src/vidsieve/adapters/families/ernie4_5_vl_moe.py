"""ERNIE 4.5 VL: two frames a token, and experts of their own for visual tokens and the markers around them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from vidsieve.adapters.families.mrope import MropeAdapter
from vidsieve.adapters.locate import needed
from vidsieve.types import ENCODER_NEEDS, Need


class Ernie45VLMoeAdapter(MropeAdapter):
    """Adapter of `Ernie4_5_VLMoeForConditionalGeneration`.

    ``moe_mm_token_type_ids`` says which experts a token has, and is cut with the prompt. Times are painted into the
    frames. Every layer has full attention, whose rotary positions methods inside the LLM do not know.
    """

    family: ClassVar[str] = "ernie4_5_vl_moe"
    column_keys: ClassVar[tuple[str, ...]] = ("moe_mm_token_type_ids",)
    tower: ClassVar[str] = "model.vision_tower"
    projector: ClassVar[str] = "model.resampler_model"
    provides: ClassVar[frozenset[Need]] = frozenset({Need.QUESTION}) | ENCODER_NEEDS

    @property
    def projectors(self) -> list[Any]:
        """The resampler's layer before the one that joins the two frames of a token, and counts those of the call."""
        return [self.model.model.resampler_model.spatial_linear]

    def pool_signals(self, values: list[Tensor], inputs: Mapping[str, Any]) -> Tensor:
        """Return the mean over each token's patches, of its two frames."""
        vision = self.model.config.vision_config
        merge, patches = vision.spatial_merge_size**2, torch.cat([some.flatten(0, 1) for some in values]).float()
        sizes = [int(grid.prod()) for grid in needed(inputs, "video_grid_thw", "a video")]
        tokens = []
        for part, shape in zip(torch.split(patches, sizes), self._shapes(inputs["video_grid_thw"]), strict=True):
            laid_out = part.reshape(shape.frames, vision.temporal_merge_size, shape.per_frame, merge, -1)
            tokens.append(laid_out.mean((1, 3)).flatten(0, 1))
        return torch.cat(tokens)
