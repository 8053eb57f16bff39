"""Positions of families that count tokens: one row, no time and space."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor


class CountedPositions:
    """The part of an adapter that knows positions, for LLMs with 1-D rotary embeddings."""

    def positions(self, input_ids: Tensor, attention_mask: Tensor, inputs: Mapping[str, Any]) -> Tensor:
        """Return (1, B, L): the count of real tokens before each."""
        return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[None]

    def pack_positions(self, positions: Tensor) -> Tensor:
        """Return (B, L)."""
        return positions[0]

    def unpack_positions(self, position_ids: Tensor) -> Tensor:
        """Return (1, B, L)."""
        return position_ids[None]
