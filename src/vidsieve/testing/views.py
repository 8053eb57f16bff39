"""A view of a video before an LLM layer, made of given tensors, to test `LayerCompressor.step` without a model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from vidsieve.compressors.inside import LayerView, Rows
from vidsieve.errors import NeedError


@dataclass(frozen=True)
class GivenView(LayerView):
    """A `LayerView` of given tensors.

    Parameters
    ----------
    rows : mapping of (rows, layer) to Tensor or callable
        Attention, as `LayerView.attention` returns it, or a function that computes it.
    tensors : mapping of str to Tensor
        ``hidden``, ``before``, ``video``, ``text`` and ``rope_bias``, those that the method reads.

    Raises
    ------
    NeedError
        If a method reads what is not given.
    """

    rows: Mapping[tuple[Rows, int], Tensor | Callable[[], Tensor]] = field(default_factory=dict)
    tensors: Mapping[str, Tensor] = field(default_factory=dict)

    def attention(self, rows: Rows, layer: int) -> Tensor:
        """Return the given attention (H, Q, n)."""
        weights = self._given(self.rows, (rows, layer))
        return weights if isinstance(weights, Tensor) else weights()

    hidden = property(lambda self: self._given(self.tensors, "hidden"))
    before = property(lambda self: self._given(self.tensors, "before"))
    video = property(lambda self: self._given(self.tensors, "video"))
    text = property(lambda self: self._given(self.tensors, "text"))
    rope_bias = property(lambda self: self._given(self.tensors, "rope_bias"))

    def _given(self, tensors: Mapping[Any, Any], name: object) -> Any:
        if name not in tensors:
            raise NeedError(f"the view holds no {name}")
        return tensors[name]
