"""Methods with a part inside the LLM: one way to begin them, wherever they act."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Generator, Tensor

from vidsieve.adapters.decoder_layer import Decoder
from vidsieve.adapters.encoded import Encoded, Pruned
from vidsieve.adapters.inside import decoding, layers
from vidsieve.adapters.inside.hooks import InnerRun as InnerRun
from vidsieve.compressors.base import Compressor
from vidsieve.compressors.inside import DecodeCompressor, LayerCompressor
from vidsieve.errors import StageError
from vidsieve.types import Stage

if TYPE_CHECKING:
    from vidsieve.adapters.adapter import Adapter


def acts_inside(compressor: Compressor | None) -> bool:
    """Return whether a method has a part that hooks must run."""
    return compressor is not None and compressor.acts is not Stage.PRE_LLM


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


def begin(adapter: Adapter, encoded: Encoded, compressor: Compressor, generator: Generator) -> tuple[Pruned, InnerRun]:
    """Return the prompt as the LLM gets it, and the method that goes on inside.

    Raises
    ------
    StageError
        If it has no part there.
    """
    if isinstance(compressor, LayerCompressor):
        return layers.begin(adapter, encoded, compressor, generator)
    if isinstance(compressor, DecodeCompressor):
        return decoding.begin(adapter, encoded, compressor, generator)
    raise StageError(f"{compressor.name} acts {compressor.acts.value}, not inside it")


@contextmanager
def running(adapter: Adapter, run: InnerRun | None, cache: Any = None, words: Tensor | None = None) -> Iterator[None]:
    """Let a method work inside the LLM while a block runs, on a cache if there is one; None: no method does.

    `words` (B, n) says which columns behind the prompt are seen, where some are not.
    """
    if run is None:
        yield
        return
    # A language model that was compiled before does not see hooks: it runs as it was written meanwhile.
    with uncompiled(), run.hooked(Decoder.of(adapter), cache, words):
        yield
