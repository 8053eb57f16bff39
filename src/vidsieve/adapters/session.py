"""Attaching a method to one model instance: every call in between goes through `prune`."""

from __future__ import annotations

import functools
import inspect
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from vidsieve.adapters.base import Adapter
from vidsieve.adapters.batch import Pruned, Template
from vidsieve.adapters.calls import (
    CacheRecord,
    PromptRestorer,
    check_generate,
    check_logits_to_keep,
    count_from_prompt,
    restore_output,
    uses_cache,
)
from vidsieve.adapters.pruning import POSITIONS, adapter_for
from vidsieve.adapters.trace import Trace
from vidsieve.compressors.base import Compressor
from vidsieve.errors import AttachError, PromptError, UnknownNameError, UnsupportedCallError
from vidsieve.types import Need

_open: weakref.WeakKeyDictionary[Any, Session] = weakref.WeakKeyDictionary()

Call = Callable[..., Any]


class Session:
    """A method attached to one model instance, until `close` (a context manager does it).

    While it is open, ``model.generate`` and ``model(...)`` drop video tokens before the LLM reads them, and
    return what they always return. Text-only prompts pass through. One call at a time.

    Attributes
    ----------
    trace : Trace
        What was kept of each video.
    kept_positions : Tensor or None, (B', L'), int64
        For the last pruned call: the column of the caller's prompt behind each column that the LLM read,
        −1 on padding. Maps the logits of a plain forward back.
    """

    def __init__(self, model: Any, adapter: Adapter, compressor: Compressor, positions: str, seed: int) -> None:
        self.model, self.adapter, self.compressor, self.seed = model, adapter, compressor, seed
        self.trace = Trace(positions)
        self.kept_positions: Tensor | None = None
        self._caches: weakref.WeakKeyDictionary[Any, CacheRecord] = weakref.WeakKeyDictionary()
        self._lock = threading.Lock()
        self._owner: int | None = None
        self._saved: dict[str, Any] | None = None

    # -- open and close -------------------------------------------------------------------------------------

    def _open(self) -> None:
        if self.model in _open:
            raise AttachError(
                f"{_open[self.model].compressor.name} is attached to this model already: close that session first"
            )
        self._saved = {name: self.model.__dict__.get(name) for name in ("generate", "forward")}
        for name, wrapper in (("generate", self._generate), ("forward", self._forward)):
            original = getattr(self.model, name)
            replacement = functools.wraps(original)(functools.partial(wrapper, original))
            # Set past nn.Module's bookkeeping: an attribute of this instance, removed on close.
            self.model.__dict__[name] = replacement
        _open[self.model] = self

    def close(self) -> None:
        """Take the method off the model; the model is then exactly as before. Safe to call twice."""
        if self._saved is None:
            return
        for name, value in self._saved.items():
            if value is None:
                self.model.__dict__.pop(name, None)
            else:
                self.model.__dict__[name] = value
        self._saved = None
        _open.pop(self.model, None)

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @contextmanager
    def _running(self) -> Iterator[None]:
        if not self._lock.acquire(blocking=False):
            raise AttachError("this session is running a call in another thread: one call at a time")
        self._owner = threading.get_ident()
        try:
            yield
        finally:
            self._owner = None
            self._lock.release()

    # -- calls ----------------------------------------------------------------------------------------------

    def _generate(self, original: Call, *args: Any, **kwargs: Any) -> Any:
        if self._owner == threading.get_ident():
            return original(*args, **kwargs)
        call = _arguments(original, args, kwargs)
        ids = call.pop("inputs", None)
        ids = call.pop("input_ids", None) if ids is None else ids
        cache = call.get("past_key_values")
        record = self._record(cache)
        if record is None and not self._has_video(ids, call, cache):
            return original(*args, **kwargs)
        with self._running():
            check_generate(call)
            if not uses_cache(self.model, call):
                raise UnsupportedCallError(
                    "generate(use_cache=False) cannot run on a pruned prompt: transformers would read the gaps in its "
                    "positions as packed sequences. Leave the cache on."
                )
            call["input_ids"] = ids
            if record is None:
                pruned = self._prune(call)
                new = pruned.inputs
                record = CacheRecord.start(ids, pruned, self.adapter.unpack_positions(new["position_ids"]))
            else:
                new = self._continue(record, call)
            short = int(new["input_ids"].shape[1])
            count_from_prompt(self.model, call, ids.shape[1], new)
            restore = PromptRestorer(ids, short)
            for name in ("logits_processor", "stopping_criteria", "prefix_allowed_tokens_fn", "streamer"):
                if new.get(name) is not None:
                    new[name] = restore.wrap(name, new[name])
            output = original(**new)
            return self._finish(output, record, restore, cache)

    def _finish(self, output: Any, record: CacheRecord, restore: PromptRestorer, cache: Any) -> Any:
        short = output if isinstance(output, Tensor) else output.sequences
        result = restore_output(output, restore)
        full = result if isinstance(result, Tensor) else result.sequences
        made = cache if cache is not None else getattr(output, "past_key_values", None)
        if made is not None:
            self._caches[made] = record.grown(full, short)
        return result

    def _forward(self, original: Call, *args: Any, **kwargs: Any) -> Any:
        if self._owner == threading.get_ident():
            return original(*args, **kwargs)
        call = _arguments(original, args, kwargs)
        ids, cache = call.get("input_ids"), call.get("past_key_values")
        record = self._record(cache)
        if record is None and not self._has_video(ids, call, cache):
            return original(*args, **kwargs)
        if ids is None:
            raise UnsupportedCallError("pass input_ids: without them a video's tokens cannot be found in the prompt")
        with self._running():
            if record is not None:
                new = record.step(ids, call, self.adapter)
                output = original(**new)
                self._caches[cache] = record.grown(
                    torch.cat([record.full_ids, ids], 1), torch.cat([record.short_ids, ids], 1)
                )
                return output
            check_logits_to_keep(call, ids, self.adapter.video_token_id)
            pruned = self._prune(call)
            output = original(**pruned.inputs)
            made = cache if cache is not None else getattr(output, "past_key_values", None)
            if made is not None:
                positions = self.adapter.unpack_positions(pruned.inputs["position_ids"])
                self._caches[made] = CacheRecord.start(ids, pruned, positions)
            return output

    # -- steps ----------------------------------------------------------------------------------------------

    def _record(self, cache: Any) -> CacheRecord | None:
        record = self._caches.get(cache) if cache is not None else None
        return record if record is not None and cache.get_seq_length() > 0 else None

    def _has_video(self, ids: Any, call: dict[str, Any], cache: Any) -> bool:
        """Return whether a call is to be pruned; refuse one whose video could slip through unpruned."""
        carries = self.adapter.carries_video(call)
        placeholders = ids is not None and bool((ids == self.adapter.video_token_id).any())
        if not carries and not placeholders:
            return False
        if self.compressor.retention == 1.0:
            return False
        if cache is not None and cache.get_seq_length() > 0:
            raise UnsupportedCallError(
                "this cache was not filled under this session: begin the conversation while the session is attached, "
                "or send the whole conversation without past_key_values"
            )
        if placeholders and not carries:
            raise PromptError(
                f"the prompt has video placeholders, but the call carries no video ({self.adapter.video_keys[0]}): "
                "hand over everything that the processor returned"
            )
        return True

    def _prune(self, call: dict[str, Any]) -> Pruned:
        generator = torch.Generator().manual_seed(self.seed)
        pruned = self.adapter.prune(call, self.compressor, generator)
        if not any(trace.kept < trace.total for trace in pruned.traces):
            raise AttachError(f"{self.compressor.describe()} dropped nothing from a prompt with a video")
        self.trace.videos.extend(pruned.traces)
        self.trace.prompt_tokens = (int(call["input_ids"].shape[1]), int(pruned.inputs["input_ids"].shape[1]))
        self.kept_positions = pruned.kept_positions
        return pruned

    def _continue(self, record: CacheRecord, call: dict[str, Any]) -> dict[str, Any]:
        """Return the arguments of a later turn on a pruned cache."""
        drop = {*self.adapter.video_keys, "mm_token_type_ids", "mm_encoder_outputs", "position_ids"}
        rest = {k: v for k, v in call.items() if k not in drop}
        if Need.QUESTION in self.compressor.needs:
            note = f"{self.compressor.name} keeps the tokens it selected for the first question of this cache"
            if note not in self.trace.notes:
                self.trace.notes.append(note)
        return rest | record.continuation(call, self.adapter)


def _arguments(original: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of a call by name, with **kwargs laid flat and absent ones left out."""
    signature = inspect.signature(original)
    bound = signature.bind(*args, **kwargs).arguments
    flat: dict[str, Any] = {}
    for name, value in bound.items():
        if signature.parameters[name].kind is inspect.Parameter.VAR_KEYWORD:
            flat |= value
        elif signature.parameters[name].kind is inspect.Parameter.VAR_POSITIONAL:
            raise UnsupportedCallError("pass the arguments of this call by name")
        else:
            flat[name] = value
    return flat


def attach(
    model: Any,
    compressor: Compressor,
    *,
    positions: str = "installed",
    template: Template | None = None,
    seed: int = 0,
) -> Session:
    """Return an open session: from now on `model` reads its videos through `compressor`.

    Parameters
    ----------
    model : a transformers model of a registered family
        This instance only; its class and other instances are not touched.
    compressor : Compressor
    positions : str
        The position convention; ``"installed"``: original ids as the installed transformers computes them.
    template : Template, optional
        Ids of the chat template, for tokenizers that vidsieve does not know.
    seed : int
        Start of the random draws of every call, for methods that draw.

    Raises
    ------
    AttachError
        If a session is open on this model.
    UnsupportedModelError, StageError, NeedError, PolicyMismatchError
        If the method cannot act on this model.

    Examples
    --------
    >>> with vidsieve.attach(model, vidsieve.load("divprune", retention=0.25)) as session:
    ...     out = model.generate(**inputs)
    >>> print(session.trace)
    """
    if positions not in POSITIONS:
        raise UnknownNameError("position convention", positions, POSITIONS)
    adapter = adapter_for(model, template)
    adapter.check(compressor)
    session = Session(model, adapter, compressor, positions, seed)
    session._open()
    return session
