"""Attaching a method to one model instance: every call in between goes through `prune`."""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import MethodType, TracebackType
from typing import Any, NoReturn

import torch
from torch import Tensor

from vidsieve.adapters.adapter import Adapter
from vidsieve.adapters.cache import CacheRecord, keep_record, record_of
from vidsieve.adapters.calls import (
    PromptRestorer,
    arguments,
    check_cache,
    check_checkpointing,
    check_generate,
    check_inner,
    check_logits_to_keep,
    count_from_prompt,
    fixed_length,
    padding_mask,
    setting,
)
from vidsieve.adapters.family import Videos
from vidsieve.adapters.plan import Plan
from vidsieve.adapters.pruning import adapter_for, is_pruned
from vidsieve.adapters.template import Template
from vidsieve.adapters.trace import Trace
from vidsieve.adapters.transformers_api import (
    CACHE,
    FULL,
    cache_argument,
    for_model,
    layer_kinds,
    loses_cache,
    new_cache,
    normalise_cache,
    output_cache,
    uses_cache,
)
from vidsieve.compressors.base import Compressor
from vidsieve.errors import AttachError, PromptError, UnsupportedCallError
from vidsieve.types import Need, Stage, Tokens

_SESSION = "_vidsieve_session"
"""Attribute of a model that holds its open session; a session refuses to be copied or saved with the model."""

Call = Callable[..., Any]


class Session:
    """A method attached to one model instance, until `close` (a context manager does it).

    While it is open, ``model.generate`` and ``model(...)`` drop video tokens before the LLM reads them, and
    return what they always return. Text-only prompts pass through. One pruned call at a time. Call the model
    itself: ``type(model).generate(model, …)`` bypasses the session.

    A cache filled under a session stands for a shorter prompt than the caller's; later turns and steps on it
    are corrected while a session is open, and must not be run on the detached model. Tokens after a prompt
    follow at its last position + 1, as the installed `generate` decodes.

    Attributes
    ----------
    trace : Trace
        The tokens kept of each video.
    kept_positions : Tensor or None, (B', L'), int64
        Of the last pruned call: for each column that the LLM read, its column in the caller's prompt; −1 on
        padding. It maps the logits of a plain forward back.
    """

    def __init__(
        self,
        model: Any,
        adapter: Adapter,
        compressor: Compressor,
        seed: int,
        videos: Videos = None,
        reselect: bool = False,
    ) -> None:
        self.compressor, self.seed, self.videos, self.reselect = compressor, seed, videos, reselect
        self.trace = Trace(adapter.convention)
        self.kept_positions: Tensor | None = None
        self._model, self._adapter = model, adapter
        self._lock, self._here = threading.Lock(), threading.local()
        self._wrappers: dict[str, Call] = {}
        self._before: dict[str, Any] = {}
        self._functions: set[Any] = set()

    def _open(self) -> None:
        session = self._model.__dict__.get(_SESSION)
        if session is not None:
            raise AttachError(f"{session.compressor.name} is attached to this model already: close that session first")
        for name, prune in (("generate", self._generate), ("forward", self._forward)):
            original = getattr(self._model, name)
            self._before[name] = self._model.__dict__.get(name)
            self._wrappers[name] = MethodType(self._wrapper(original, prune), self._model)
            # Set past nn.Module's bookkeeping: an attribute of this instance, removed on close.
            self._model.__dict__[name] = self._wrappers[name]
        self._model.__dict__[_SESSION] = self

    def _wrapper(self, original: Call, prune: Call) -> Call:
        """Return the function that stands in for a method of the model.

        It may be bound to the model anew, as `accelerate.Accelerator.unwrap_model` does with what it finds at the end
        of a chain of ``__wrapped__``: it has none, and takes the model a second time.
        """
        signature = inspect.signature(original)

        def wrapper(model: Any, *args: Any, **kwargs: Any) -> Any:
            if args and args[0] is model:
                args = args[1:]
            return self._call(prune, original, signature, *args, **kwargs)

        functools.update_wrapper(wrapper, original)
        del wrapper.__wrapped__  # type: ignore[attr-defined]
        receiver = inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)
        wrapper.__signature__ = signature.replace(parameters=[receiver, *signature.parameters.values()])  # type: ignore[attr-defined]
        # Never traced: a model compiled in place (`model.compile()`) runs as it is written while it is attached.
        disabled: Call = torch.compiler.disable(wrapper)  # type: ignore[no-untyped-call]
        self._functions |= {disabled, wrapper}
        return disabled

    def close(self) -> None:
        """Take the method off the model; the model is then exactly as before. Safe to call twice."""
        if not self._wrappers:
            return
        for name, wrapper in self._wrappers.items():
            present = self._model.__dict__.get(name)
            function = present
            while isinstance(function, MethodType):
                function = function.__func__
            if function not in self._functions:
                continue  # wrapped once more by somebody else: what is left of us there passes calls through
            if present is wrapper and self._before[name] is not None:
                self._model.__dict__[name] = self._before[name]
            else:  # bound anew: what was there before us was unwrapped
                del self._model.__dict__[name]
        self._model.__dict__.pop(_SESSION, None)
        self._wrappers, self._before, self._functions = {}, {}, set()
        if self._lock.locked():
            return  # closed from inside a call, which still needs both
        del self._model, self._adapter  # a session is often kept for its trace; the model need not stay for it

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __reduce__(self) -> NoReturn:
        """Refuse to be copied or pickled along with the model."""
        raise AttachError("a session is attached to this model: close it before copying or saving the model")

    # -- calls ----------------------------------------------------------------------------------------------

    def _call(self, prune: Call, original: Call, signature: inspect.Signature, *args: Any, **kwargs: Any) -> Any:
        """Run a call of the model: inner calls and those without a video run unchanged."""
        if not self._wrappers or getattr(self._here, "running", False):
            return original(*args, **kwargs)
        call = arguments(signature, args, kwargs)
        normalise_cache(call)
        if call.get("inputs") is not None and call.get("input_ids") is not None:
            raise UnsupportedCallError("pass the prompt once: inputs and input_ids are the same thing")
        ids = call.pop("inputs", None)
        call["input_ids"] = call.get("input_ids") if ids is None else ids
        record = record_of(call.get(CACHE))
        with self._inside():
            if record is None and not self._to_prune(call):
                # The caller may name the cache as another version of transformers does.
                renamed = CACHE in kwargs and cache_argument(self._model) != CACHE
                return original(**for_model(call, self._model)) if renamed else original(*args, **kwargs)
            if call["input_ids"] is None:
                raise UnsupportedCallError("pass input_ids: a video's tokens cannot be found in embeddings")
            with self._alone():
                return prune(original, call, record)

    @contextmanager
    def _inside(self) -> Iterator[None]:
        self._here.running = True
        try:
            yield
        finally:
            self._here.running = False

    @contextmanager
    def _alone(self) -> Iterator[None]:
        if not self._lock.acquire(blocking=False):
            raise AttachError("this session is running a call in another thread: one call at a time")
        try:
            yield
        finally:
            self._lock.release()

    @torch.no_grad()
    def _generate(self, original: Call, call: dict[str, Any], record: CacheRecord | None) -> Any:
        check_generate(self._model, call)
        check_checkpointing(self._adapter.decoder_layers, True, self.compressor)
        check_inner(self._model, call, self.compressor)
        if record is not None and self.reselect:
            self._forget(call)
            record = None
        ids, cache = call["input_ids"], call.get(CACHE)
        call["attention_mask"] = padding_mask(self._model, call, ids)
        beams, answers = (setting(self._model, call, name) or 1 for name in ("num_beams", "num_return_sequences"))
        if record is None:
            self._adapter.check_copies(ids, max(beams, answers))
            if fixed_length(self._model, call):
                self._adapter.check_fixed_cache()
            new, record = self._begin(call)
        else:
            new = self._continue(record, call)
        count_from_prompt(self._model, call, ids.shape[1], new)
        restore = PromptRestorer(ids, int(new["input_ids"].shape[1]))
        restore.wrap_hooks(new)
        keep_record(cache, record)  # now, so that a call which breaks off leaves no cache without its record
        with self._at_work(record, cache, new):
            output = original(**for_model(new, self._model))
            short = output if isinstance(output, Tensor) else output.sequences
            if record.layers is not None:
                record.layers.check_decoded(short.shape[1] - new["input_ids"].shape[1])
        result = restore.output(output)
        full = result if isinstance(result, Tensor) else result.sequences
        used = cache if cache is not None else output_cache(output)
        keep_record(used, record.grown(full, short, beams > 1))
        return result

    def _forward(self, original: Call, call: dict[str, Any], record: CacheRecord | None) -> Any:
        check_checkpointing(self._adapter.decoder_layers, record is not None, self.compressor)
        if loses_cache(self._adapter.decoder_layers):
            call |= {CACHE: None, "use_cache": False}
        cache = call.get(CACHE)
        check_cache(cache, self.compressor)
        if record is not None:
            new, record = record.step(call["input_ids"], call, self._adapter)
        else:
            check_logits_to_keep(call, call["input_ids"], self._adapter.video_token_id)
            new, record = self._begin(call)
            if cache is None and uses_cache(self._model, call):
                # Ours, so that the record is on it however the output hands it back.
                new[CACHE] = cache = new_cache(self._model)
        with self._at_work(record, cache, new):
            output = original(**for_model(new, self._model))
        keep_record(cache if cache is not None else output_cache(output), record)
        return output

    def _to_prune(self, call: dict[str, Any]) -> bool:
        """True if a call is to be pruned; refuse one whose video would slip through unpruned."""
        ids, cache = call["input_ids"], call.get(CACHE)
        if is_pruned(call) or (self.compressor.idle and self._adapter.layout == "installed"):
            return False
        carries = self._adapter.carries_video(call)
        placeholders = ids is not None and not self._adapter.shared_placeholder and self._adapter.holds_video(ids)
        if not carries and not placeholders:
            return False
        if cache is not None and not isinstance(cache, tuple) and cache.get_seq_length() > 0:
            raise UnsupportedCallError(
                "a video cannot be pruned into a cache that holds tokens already, unless they are an earlier turn "
                "that was pruned under a session: begin with an empty cache, or send the whole conversation without "
                "past_key_values"
            )
        if placeholders and not carries:
            raise PromptError(
                f"the prompt has video placeholders, but the call carries no video ({self._adapter.video_keys[0]}): "
                "hand over everything that the processor returned"
            )
        return True

    def _begin(self, call: dict[str, Any]) -> tuple[dict[str, Any], CacheRecord]:
        """Return the pruned arguments of a first call, and the record of its prompt."""
        ids, mask = call["input_ids"], call.get("attention_mask")
        self._check_labels(call)
        self._adapter.check(self.compressor)
        encoded = self._adapter.encode_for(call, self.compressor, self.videos)
        plan = self._adapter.plan(encoded, self.compressor, torch.Generator().manual_seed(self.seed))
        if plan.run is None:
            self._note_selected(plan, int(ids.shape[1]))
        self.kept_positions = plan.kept_positions
        whole = torch.ones_like(ids) if mask is None else mask
        positions = self._adapter.unpack_positions(plan.inputs["position_ids"])
        return plan.inputs, CacheRecord.start(ids, whole, plan, positions)

    def _note_selected(self, plan: Plan, prompt: int) -> None:
        """Add the traces of a method that acts before the LLM alone."""
        # A short video may have no more than a count of tokens; at 1.0 it is laid out anew.
        whole = isinstance(self.compressor.retention, Tokens) or self.compressor.retention == 1.0
        if not whole and not any(trace.kept < trace.total for trace in plan.traces):
            raise AttachError(f"{self.compressor.describe()} dropped nothing from a prompt with a video")
        self._note_windows()
        self.trace.videos.extend(plan.traces)
        self.trace.prompt_tokens = (prompt, int(plan.inputs["input_ids"].shape[1]))

    def _forget(self, call: dict[str, Any]) -> None:
        """Take the cache out of a later turn, so that the whole conversation is pruned for its newest question."""
        if not self._adapter.carries_video(call):
            raise UnsupportedCallError(
                "reselect=True prefills a later turn anew: send the whole conversation with its video, as the "
                "processor returns it"
            )
        del call[CACHE]

    def _check_labels(self, call: dict[str, Any]) -> None:
        """Refuse labels that are predicted from a video token, which a method inside the LLM may drop."""
        labels = call.get("labels")
        if labels is None or self.compressor.acts is not Stage.LAYER:
            return
        video = call["input_ids"] == self._adapter.video_token_id
        if bool((video[:, :-1] & (labels[:, 1:] != -100)).any()):
            raise UnsupportedCallError(
                f"labels reach the token behind a video token, which {self.compressor.name} may have dropped inside "
                "the LLM: set them to -100 there"
            )

    @contextmanager
    def _at_work(self, record: CacheRecord, cache: Any, call: dict[str, Any]) -> Iterator[None]:
        """Run a method that acts inside the LLM, if the record of the prompt has one, and trace what it kept."""
        run = record.layers
        if run is None:
            yield
            return
        with self._adapter.acting(run, cache, call["attention_mask"][:, record.short_prompt :]):
            yield
        if run.fresh:
            self._note_windows()
            self.trace.prompt_tokens = (record.prompt, run.real.shape[1])
        run.fresh, before, run.listed = False, run.listed, run.traces()
        self.trace.revise(before, run.listed)

    def _note_windows(self) -> None:
        """Note once that layers which see part of the prompt count the tokens of the shorter one."""
        other = sorted(set(layer_kinds(self._model.config.get_text_config())) - {FULL})
        note = (
            f"this LLM has layers with {', '.join(other)}, which count the tokens that are kept: the result equals the "
            "model on the shortened prompt, not one whose dropped tokens are masked"
        )
        if other and note not in self.trace.notes:
            self.trace.notes.append(note)

    def _continue(self, record: CacheRecord, call: dict[str, Any]) -> dict[str, Any]:
        """Return the arguments of a later turn on a pruned cache."""
        drop = {*self._adapter.video_keys, *self._adapter.image_keys, *self._adapter.audio_keys}
        drop |= {*self._adapter.column_keys, "mm_token_type_ids", "mm_encoder_outputs", "position_ids"}
        new = {k: v for k, v in call.items() if k not in drop} | record.continuation(call, self._adapter)
        if Need.QUESTION in self.compressor.needs or self.compressor.acts is Stage.LAYER:
            note = f"{self.compressor.name} keeps the tokens it selected for the first question of this cache"
            if note not in self.trace.notes:
                self.trace.notes.append(note)
        return new


def attach(
    model: Any,
    compressor: Compressor,
    *,
    positions: str | None = None,
    layout: str | None = None,
    template: Template | None = None,
    seed: int = 0,
    videos: Videos = None,
    reselect: bool = False,
) -> Session:
    """Return an open session: from now on `model` reads its videos through `compressor`.

    Parameters
    ----------
    model : a transformers model of a registered family
        This instance only; its class and other instances are not touched. Of a model wrapped by PEFT (LoRA),
        DistributedDataParallel or FSDP it is the one inside, and calls of either are pruned.
    compressor : Compressor
    positions : str, optional
        The position convention, as in `prune`.
    layout : str
        The token layout, as in `prune`.
    template : Template, optional
        ``vidsieve.Template.of(processor)``, for methods that read the question; a model of
        `vidsieve.loading.load_model` needs none.
    seed : int
        Start of the random draws of every call, for methods that draw.
    videos : list of (first, count), optional
        As in `prune`, for every call of the session; the session's attribute `videos` changes it.
    reselect : bool
        Select again in every later turn of `generate`, for its question: the conversation is prefilled again, the
        cache that comes with it is left alone, and the output brings a new one. Without it a question-aware method
        keeps what it selected for the first question of a cache.

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
    adapter = adapter_for(model, template, positions, layout)
    adapter.check(compressor)
    adapter.check_videos(videos)
    session = Session(adapter.model, adapter, compressor, seed, videos, reselect)
    session._open()
    return session
