"""Methods with a part inside the LLM: one way to begin them, wherever they act."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from vidsieve.adapters.inside import decoding, layered
from vidsieve.adapters.placed import PlacedVideo
from vidsieve.adapters.trace import VideoTrace
from vidsieve.compressors.base import Compressor, DecodeCompressor, LayerCompressor
from vidsieve.errors import StageError

InnerRun = layered.LayerRun | decoding.DecodeRun
"""A method at work inside an LLM; it travels with the cache."""


_eager_lock, _eager_calls = threading.Lock(), 0
_stance: Any = None


@contextmanager
def uncompiled() -> Iterator[None]:
    """Run what was compiled as it was written, until the last such block ends: compiled code does not see our hooks.

    The stance is the process's, so that blocks in several threads share it.
    """
    global _eager_calls, _stance
    with _eager_lock:
        if not _eager_calls:
            _stance = torch.compiler.set_stance("force_eager")
            _stance.__enter__()
        _eager_calls += 1
    try:
        yield
    finally:
        with _eager_lock:
            _eager_calls -= 1
            if not _eager_calls:
                _stance.__exit__(None, None, None)


def begin(
    compressor: Compressor,
    depth: int,
    positions: Tensor,
    text: Tensor,
    real: Tensor,
    videos: tuple[PlacedVideo, ...],
    traces: Sequence[VideoTrace],
    rotary: Any,
) -> InnerRun:
    """Return the run of the part of a method inside an LLM, on a batch of prompts as the LLM reads it.

    Parameters
    ----------
    compressor : Compressor
    depth : int
        Number of decoder layers.
    positions : Tensor, (P, B, L), int64
        Rotary positions.
    text : Tensor, (B, L), int64
        Positions along the text, as decoder layers get them.
    real : Tensor, (B, L), bool
        False on padding.
    videos : tuple of PlacedVideo
    traces : sequence of VideoTrace
        Of the part before the LLM, if there is one.
    rotary : the LLM's rotary embedding

    Raises
    ------
    StageError
        If it has no part there.
    """
    if isinstance(compressor, LayerCompressor):
        # With several rows of positions there is no order to count along.
        counted = rotary if compressor.renumbers and len(positions) == 1 else None
        spent = tuple(trace.select_ms for trace in traces)
        return layered.LayerRun(depth, compressor, positions, real, videos, spent, counted)
    if isinstance(compressor, DecodeCompressor):
        first = compressor.first_layer(depth)
        return decoding.DecodeRun(first, compressor, positions, text, real, videos, tuple(traces))
    raise StageError(f"{compressor.name} acts {compressor.acts.value}, not inside it")


@contextmanager
def running(
    layers: Iterable[Any], text: Any, run: InnerRun | None, cache: Any = None, words: Tensor | None = None
) -> Iterator[None]:
    """Let a method act inside the LLM while a block runs; None: no method does.

    Parameters
    ----------
    layers : the LLM's decoder layers
    text : its configuration
    run : InnerRun, optional
    cache : the cache of the call, if it is given one
    words : Tensor, (B, n), optional
        Which columns after the prompt are seen, where some are not.
    """
    if run is None:
        yield
        return
    # A language model that was compiled before does not run hooks: it runs eagerly meanwhile.
    with uncompiled(), run.hooked(list(layers), text, cache, words):
        yield
