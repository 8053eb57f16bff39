"""HyperCLOVA X Vision 2: Qwen2.5-VL's tower and grids, over an LLM that scales its logits."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from vidsieve.adapters.families.counted import CompactPositions
from vidsieve.adapters.families.mrope import MropeAdapter
from vidsieve.adapters.families.qwen2_5_vl import Qwen25VLAdapter


class HyperCLOVAXVisionV2Adapter(CompactPositions, Qwen25VLAdapter):
    """Adapter of `HyperCLOVAXVisionV2ForConditionalGeneration`."""

    family: ClassVar[str] = "hyperclovax_vision_v2"
    video_keys: ClassVar[tuple[str, ...]] = MropeAdapter.video_keys
    tower: ClassVar[str] = "model.vision_model"
    projector: ClassVar[str] = "model.projector"

    @property
    def projectors(self) -> list[Any]:
        """The tower's merger, behind which windows' order is undone."""
        return [self.model.model.vision_model.merger]

    def logits(self, hidden: Tensor) -> Tensor:
        """Return the head's outputs times ``logits_scaling``."""
        scaling: float = self.model.config.get_text_config().logits_scaling
        return super().logits(hidden) * scaling
