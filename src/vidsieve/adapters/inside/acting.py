"""Methods with a part inside the LLM: one way to begin them, wherever they act."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from vidsieve.adapters.decoder_layer import Decoder
from vidsieve.adapters.inside.decoding import DecodeRun
from vidsieve.adapters.inside.hooks import InnerRun as InnerRun
from vidsieve.adapters.inside.layers import LayerRun
from vidsieve.adapters.inside.view import PlacedVideo
from vidsieve.adapters.trace import VideoTrace
from vidsieve.compressors.base import Compressor
from vidsieve.compressors.inside import DecodeCompressor, LayerCompressor
from vidsieve.errors import StageError

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

    Raises
    ------
    StageError
        If it has no part there.
    """
    if isinstance(compressor, LayerCompressor):
        return LayerRun(compressor, positions, real, videos, depth, tuple(trace.select_ms for trace in traces))
    if isinstance(compressor, DecodeCompressor):
        first = compressor.first_layer(depth)
        return DecodeRun(compressor, positions, real, videos, first, text, tuple(traces))
    raise StageError(f"{compressor.name} acts {compressor.acts.value}, not inside it")


@contextmanager
def running(decoder: Decoder, run: InnerRun | None, cache: Any = None, words: Tensor | None = None) -> Iterator[None]:
    """Let a method act inside the LLM while a block runs; None: no method does.

    Parameters
    ----------
    decoder : Decoder
    run : InnerRun, optional
    cache : the cache of the call, if it is given one
    words : Tensor, (B, n), optional
        Which columns after the prompt are seen, where some are not.
    """
    if run is None:
        yield
        return
    # A language model that was compiled before does not run hooks: it runs eagerly meanwhile.
    with uncompiled(), run.hooked(decoder, cache, words):
        yield
