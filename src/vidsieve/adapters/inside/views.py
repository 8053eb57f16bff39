"""What a method inside the LLM may ask to see beyond the last token's attention: the text behind a video."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vidsieve.adapters.inside.layers import block_shape
from vidsieve.adapters.placed import PlacedVideo
from vidsieve.compressors._decoder import rotary


def text_places(videos: Sequence[PlacedVideo], row: int, line: Tensor, behind: Tensor) -> Tensor:
    """Return the places (Q,) among the columns `line` of a row that hold text behind the column `behind`."""
    visual = torch.cat([part for video in videos if video.row == row for part in (video.columns, video.newlines)])
    return ((line > behind.to(line.device)) & ~torch.isin(line, visual.to(line.device))).nonzero().flatten()


def rope_bias(text: Any, layer: Any, queries: Tensor, keys: Tensor) -> Tensor:
    """Return (Q, n) float32: what a query and a key of ones would score, by their positions (P, Q) and (P, n) alone."""
    shape = block_shape(text, layer)
    cosine_q, sine_q = rotary(queries, shape)
    cosine_k, sine_k = rotary(keys, shape)
    bias: Tensor = (cosine_q @ cosine_k.T + sine_q @ sine_k.T) / shape.head_dim**0.5
    return bias
