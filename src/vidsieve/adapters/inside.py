"""Methods with a part inside the LLM: one way to begin them, wherever they act."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Generator

from vidsieve.adapters import decoding, layered
from vidsieve.adapters.batch import Encoded, Pruned
from vidsieve.compressors.base import Compressor, DecodeCompressor, LayerCompressor
from vidsieve.errors import StageError
from vidsieve.types import Stage

if TYPE_CHECKING:
    from vidsieve.adapters.base import Adapter

InnerRun = layered.LayerRun | decoding.DecodeRun
"""A method at work inside an LLM; it travels with the cache."""


def acts_inside(compressor: Compressor | None) -> bool:
    """Return whether a method has a part that hooks must run."""
    return compressor is not None and compressor.acts is not Stage.PRE_LLM


def begin(adapter: Adapter, encoded: Encoded, compressor: Compressor, generator: Generator) -> tuple[Pruned, InnerRun]:
    """Return the prompt as the LLM gets it, and the method that goes on inside.

    Raises
    ------
    StageError
        If it has no part there.
    """
    if isinstance(compressor, LayerCompressor):
        return layered.begin(adapter, encoded, compressor)
    if isinstance(compressor, DecodeCompressor):
        return decoding.begin(adapter, encoded, compressor, generator)
    raise StageError(f"{compressor.name} acts {compressor.acts.value}, not inside it")
