"""Random: the floor under every table."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Generator

from vidsieve.compressors.base import Compressor
from vidsieve.types import Selection, VideoTokens


@dataclass(frozen=True)
class Random(Compressor):
    """Keep tokens drawn uniformly without replacement.

    At 25 % it already keeps most of a model's accuracy on multiple choice, so no table is trusted without
    it. Seeded by the generator of the call.
    """

    name: ClassVar[str] = "random"
    paper: ClassVar[str] = "baseline"

    def _select(self, video: VideoTokens, budget: int, generator: Generator) -> Selection:
        order = torch.randperm(video.num_tokens, generator=generator, device=generator.device)
        return Selection(order[:budget].sort().values.to(video.embeds.device))
