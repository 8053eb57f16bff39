"""Methods with a part inside the LLM: one way to begin them, wherever they act."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Generator, Tensor

from vidsieve.adapters.encoded import Encoded, Pruned
from vidsieve.adapters.inside import decoding, layered
from vidsieve.adapters.placed import place
from vidsieve.compressors.base import Compressor, DecodeCompressor, LayerCompressor
from vidsieve.errors import StageError
from vidsieve.types import Stage

if TYPE_CHECKING:
    from vidsieve.adapters.adapter import Adapter

InnerRun = layered.LayerRun | decoding.DecodeRun
"""A method at work inside an LLM; it travels with the cache."""


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
        return _layered(adapter, encoded, compressor, generator)
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
    with uncompiled(), run.hooked(list(adapter.decoder_layers), adapter.model.config.get_text_config(), cache, words):
        yield


def _layered(
    adapter: Adapter, encoded: Encoded, compressor: LayerCompressor, generator: Generator
) -> tuple[Pruned, layered.LayerRun]:
    """Return a prompt, padded on the left, and the method that will drop tokens inside the LLM.

    The prompt is whole, or what a part before the LLM leaves of it.
    """
    depth = len(adapter.decoder_layers)
    outer, spent = compressor.outer(depth), []
    if outer is None:
        selections = encoded.everything()
    else:
        selections, traces = adapter.select(encoded, outer, generator)
        spent = [trace.select_ms for trace in traces]
    pruned = adapter.build(encoded, encoded.per_row(selections))
    positions = adapter.unpack_positions(pruned.inputs["position_ids"])[adapter.position_rows]
    real, videos = pruned.kept_positions >= 0, place(encoded, pruned, selections)
    # With several rows of positions there is no order to count along.
    rotary = adapter.language_model.rotary_emb if compressor.renumbers and len(positions) == 1 else None
    return pruned, layered.LayerRun(depth, compressor, positions, real, videos, tuple(spent), rotary)
