"""Base of methods at work inside an LLM: hooks on its decoder layers, for the length of one call."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NoReturn

import torch
from torch import Tensor

from vidsieve.adapters.decoder_layer import Decoder
from vidsieve.adapters.inside.view import PlacedVideo
from vidsieve.adapters.trace import VideoTrace
from vidsieve.adapters.transformers_api import is_flash, layer_cache, layer_hidden, unsupported
from vidsieve.compressors.base import Compressor
from vidsieve.errors import UnsupportedCallError


@dataclass
class InnerRun(ABC):
    """A method at work inside an LLM, on one batch of prompts and the tokens that follow on the same cache.

    Parameters
    ----------
    compressor : Compressor
    positions : Tensor, (P, B, L), int64
        Rotary positions of the prompts.
    real : Tensor, (B, L), bool
        False on padding.
    videos : tuple of PlacedVideo
        With the tokens that the part before the LLM has left.
    """

    compressor: Compressor
    positions: Tensor
    real: Tensor
    videos: tuple[PlacedVideo, ...]
    fresh: bool = field(default=True, kw_only=True)
    """True until the run has run once."""
    listed: list[VideoTrace] = field(default_factory=list, kw_only=True)
    """Traces already appended to `Session.trace`."""

    def __post_init__(self) -> None:
        self._decoder = Decoder((), None, None)
        self._mine = OwnPasses(None)
        self._words: Tensor | None = None
        self._passes = 0

    @abstractmethod
    def traces(self) -> list[VideoTrace]:
        """Return one trace a video."""

    @abstractmethod
    def check_decoded(self, tokens: int) -> None:
        """Raise an error if `generate` decoded `tokens` tokens and a method that acts meanwhile saw no step."""

    @contextmanager
    def hooked(self, decoder: Decoder, cache: Any = None, words: Tensor | None = None) -> Iterator[None]:
        """Act on every pass through the layers of `decoder` until the block ends.

        Passes of other calls, on another cache or in another thread, are left alone. `words` (B, n) marks the columns
        after the prompt that are visible; without it, and beyond n, all are. Masks of layers cannot be used for this:
        transformers sizes them by the cache of one layer, which may be shorter.

        Raises
        ------
        UnsupportedTransformersError
            If the block ends and nothing passed.
        """
        self._decoder, self._mine, self._words, self._passes = decoder, OwnPasses(cache), words, 0
        handles: list[Any] = []
        try:
            for number in self._hooked_layers():
                layer = decoder.layers[number]
                handles.append(layer.register_forward_pre_hook(self._before(number), with_kwargs=True))
            handles.append(decoder.layers[-1].register_forward_hook(self._after, with_kwargs=True))
            with uncompiled():
                yield
            if not self._complete():
                unsupported(f"{self.compressor.name} saw no prompt pass through the decoder layers")
        finally:
            for handle in handles:
                handle.remove()
            self._end()
            # The run travels with the cache: it must not keep the model alive.
            self._decoder, self._mine = Decoder((), None, None), OwnPasses(None)

    def _before(self, number: int) -> Any:
        def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            hidden, cache = layer_hidden(args, kwargs, module), layer_cache(kwargs, module)
            if not self._mine(cache):
                return None
            hidden, changes = self._enter(number, module, hidden, cache, kwargs)
            self._passes += 1
            if args:
                return (hidden, *args[1:]), kwargs | changes
            return (), kwargs | changes | {"hidden_states": hidden}

        return hook

    @abstractmethod
    def _hooked_layers(self) -> Sequence[int]:
        """Return the numbers of the layers that are hooked."""

    @abstractmethod
    def _enter(
        self, number: int, layer: Any, hidden: Tensor, cache: Any, kwargs: dict[str, Any]
    ) -> tuple[Tensor, dict[str, Any]]:
        """Return the hidden states that layer `number` gets, and the arguments that change."""

    def _after(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """Return the output of the last layer."""
        return output

    def _complete(self) -> bool:
        """Return True if everything passed that should have."""
        return self._passes > 0

    @abstractmethod
    def _end(self) -> None:
        """Drop the state of one call."""

    def _refuse_filled(self) -> NoReturn:
        """Refuse a prompt that goes into a cache with tokens that were put there from inside the call."""
        raise UnsupportedCallError(
            f"{self.compressor.name} acts inside the LLM, and the prompt goes into a cache that holds tokens already: "
            "prefix tuning (PEFT) is not supported under such a method; choose one that acts before the LLM"
        )

    def _mask(self, seen: Tensor, allowed: Tensor, hidden: Tensor) -> Tensor | None:
        """Return the attention mask for hidden states (B, q, D).

        Parameters
        ----------
        seen : Tensor, (B, k), bool
            Columns that are not padding, for flash attention, which adds causality itself.
        allowed : Tensor, (B, q, k), bool
            Columns that each query may see, for the others.
        """
        if is_flash(self._decoder.config):
            return None if bool(seen.all()) else seen.long()
        zeros = torch.zeros(allowed.shape, dtype=hidden.dtype, device=hidden.device)
        return zeros.masked_fill(~allowed, torch.finfo(hidden.dtype).min)[:, None]


class OwnPasses:
    """Tells passes through a layer that belong to the present call, by thread and cache.

    If the call begins without a cache, the first one that passes is its own: nothing else runs in its thread before.
    """

    def __init__(self, cache: Any) -> None:
        self.cache, self._thread = cache, threading.get_ident()

    def __call__(self, cache: Any) -> bool:
        """Return True if a pass with `cache` belongs to the call."""
        if threading.get_ident() != self._thread:
            return False
        if self.cache is None:
            self.cache = cache
        return cache is self.cache


def per_row(table: Tensor, rows: int) -> Tensor:
    """Return a table with one line a prompt as one with one line for each of `rows`: beams repeat each prompt."""
    return table.repeat_interleave(rows // len(table), 0)


_eager_lock, _eager_calls = threading.Lock(), 0
_stance: Any = None


@contextmanager
def uncompiled() -> Iterator[None]:
    """Run compiled code eagerly until the last such block ends: compiled code does not run hooks.

    The stance belongs to the process, so that blocks in several threads share it.
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
