"""Hiding the shorter prompt from the caller of a pruned call: lengths, padding, and hooks of `generate`."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import (
    DynamicCache,
    LogitsProcessor,
    LogitsProcessorList,
    PrefixConstrainedLogitsProcessor,
    StoppingCriteria,
    StoppingCriteriaList,
)

from vidsieve.adapters.transformers_api import CACHE, loses_cache, repeats_hooks
from vidsieve.compressors.base import Compressor
from vidsieve.errors import UnsupportedCallError
from vidsieve.types import Stage

_REFUSED = {
    "assistant_model": "assisted decoding",
    "custom_generate": "a custom generation loop",
    "negative_prompt_ids": "classifier-free guidance",
    "prompt_lookup_num_tokens": "prompt-lookup decoding",
    "assistant_early_exit": "early-exit decoding",
    "guidance_scale": "classifier-free guidance",
    "penalty_alpha": "contrastive decoding",
    "dola_layers": "DoLa decoding",
    "prefill_chunk_size": "chunked prefill",
}
_COUNT_FROM_PROMPT = {
    "MaxLengthCriteria": "max_new_tokens",
    "MinLengthLogitsProcessor": "min_new_tokens",
    "MinNewTokensLengthLogitsProcessor": "min_new_tokens",
    "ExponentialDecayLengthPenalty": "exponential_decay_length_penalty",
    "SuppressTokensAtBeginLogitsProcessor": "begin_suppress_tokens",
    "ForcedEOSTokenLogitsProcessor": "forced_eos_token_id",
}
"""Classes of transformers that count from the length of the prompt, and the option that builds them correctly."""
_GROWING = (None, "dynamic", "offloaded", "quantized", "hybrid")
"""Kinds of cache that grow; `generate` reads "hybrid", which older models were saved with, as none."""


def arguments(signature: inspect.Signature, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of a call by name, with **kwargs flattened and absent ones left out."""
    flat: dict[str, Any] = {}
    for name, value in signature.bind(*args, **kwargs).arguments.items():
        if signature.parameters[name].kind is inspect.Parameter.VAR_KEYWORD:
            flat |= value
        elif signature.parameters[name].kind is inspect.Parameter.VAR_POSITIONAL:
            raise UnsupportedCallError("pass the arguments of this call by name")
        else:
            flat[name] = value
    return flat


def setting(model: Any, call: dict[str, Any], name: str) -> Any:
    """Return an option of `generate` as given directly, in its generation_config, or in the model's."""
    for source in (call.get(name), getattr(call.get("generation_config"), name, None)):
        if source is not None:
            return source
    return getattr(model.generation_config, name, None)


def check_generate(model: Any, call: dict[str, Any]) -> None:
    """Refuse generation modes whose result on a pruned prompt is not known to be correct.

    Raises
    ------
    UnsupportedCallError
    """
    for name, what in _REFUSED.items():
        value = setting(model, call, name)
        if value is not None and not (name == "guidance_scale" and value == 1):
            raise UnsupportedCallError(f"{what} ({name}) is not supported while a session is attached; leave it out")
    if setting(model, call, "cache_implementation") == "paged":
        raise UnsupportedCallError("a paged cache is not supported while a session is attached")
    if setting(model, call, "use_cache") is False:
        raise UnsupportedCallError(
            "generate(use_cache=False) cannot run on a pruned prompt: transformers would read the gaps in its "
            "positions as packed sequences. Leave the cache on."
        )


def fixed_length(model: Any, call: dict[str, Any]) -> bool:
    """True if `generate` runs a call on a cache of fixed length: it then makes the masks before it calls the model."""
    cache = call.get(CACHE)
    if cache is not None:
        return bool(getattr(cache, "is_compileable", False))
    return setting(model, call, "cache_implementation") not in _GROWING


def check_cache(cache: Any, compressor: Compressor) -> None:
    """Refuse caches with one length for all layers: a method inside the LLM leaves each layer a different length.

    Raises
    ------
    UnsupportedCallError
    """
    if compressor.acts is Stage.PRE_LLM:
        return
    if cache is not None and not isinstance(cache, DynamicCache):
        raise UnsupportedCallError(
            f"a method inside the LLM needs a DynamicCache, got {type(cache).__name__}: leave it out"
        )
    if getattr(cache, "offloading", False):
        raise UnsupportedCallError("a method inside the LLM needs a cache that stays where it is: leave offloading out")


def check_checkpointing(layers: Iterable[Any], filled: bool, compressor: Compressor) -> None:
    """Refuse calls that gradient checkpointing makes impossible: it runs decoder layers without their cache.

    Parameters
    ----------
    layers : the LLM's decoder layers
    filled : bool
        True if the call continues on a cache that holds a prompt.

    Raises
    ------
    UnsupportedCallError
    """
    if filled and loses_cache(layers):
        raise UnsupportedCallError(
            "gradient checkpointing runs a model in training mode without its cache, which holds the prompt here: call "
            "model.eval(), or model.gradient_checkpointing_disable()"
        )
    if compressor.acts is Stage.LAYER and repeats_hooks(layers):
        raise UnsupportedCallError(
            f"{compressor.name} cannot drop tokens inside layers that transformers before 5.23 recomputes for their "
            "gradients: install transformers 5.23 or later, choose a method that acts before the LLM, or call "
            "model.gradient_checkpointing_disable()"
        )


def check_inner(model: Any, call: dict[str, Any], compressor: Compressor) -> None:
    """Refuse calls that methods inside the LLM cannot serve: caches of one length for all layers, and rows that move.

    Raises
    ------
    UnsupportedCallError
    """
    if compressor.acts is Stage.PRE_LLM:
        return
    kind = setting(model, call, "cache_implementation")
    if kind not in (None, "dynamic"):
        raise UnsupportedCallError(f"a method inside the LLM needs a DynamicCache, got {kind}: leave it out")
    check_cache(call.get(CACHE), compressor)
    if compressor.acts is Stage.DECODE and (setting(model, call, "num_beams") or 1) > 1:
        raise UnsupportedCallError(
            f"beam search moves rows of the cache between steps, and {compressor.name} compares each step with the one "
            "before: decode greedily or sample, or switch its inner part off (inner=False)"
        )


def padding_mask(model: Any, call: dict[str, Any], ids: Tensor) -> Tensor:
    """Return the attention mask of a `generate` call, inferred from padding as transformers does if none is given."""
    mask = call.get("attention_mask")
    if mask is not None:
        return mask if isinstance(mask, Tensor) else torch.as_tensor(mask)
    pad, ends = setting(model, call, "pad_token_id"), setting(model, call, "eos_token_id")
    known = [] if ends is None else torch.as_tensor(ends).flatten().tolist()
    if pad is None or int(pad) in known:
        return torch.ones_like(ids)
    return (ids != int(pad)).long()


def check_logits_to_keep(call: dict[str, Any], ids: Tensor, video_token_id: int) -> None:
    """Refuse a `logits_to_keep` that reaches into columns which pruning removes or moves.

    Raises
    ------
    UnsupportedCallError
    """
    keep = call.get("logits_to_keep")
    if keep is None or (isinstance(keep, int) and keep == 0):
        return
    if isinstance(keep, Tensor):
        raise UnsupportedCallError("logits_to_keep as a tensor counts unpruned columns; use session.kept_positions")
    if bool((ids[:, -keep:] == video_token_id).any()):
        raise UnsupportedCallError(f"logits_to_keep={keep} reaches into the video; use session.kept_positions instead")
    mask = call.get("attention_mask")
    if mask is not None and not bool(mask[:, -keep:].bool().all()):
        raise UnsupportedCallError(
            f"logits_to_keep={keep} reaches into padding, which pruning moves to the left; use session.kept_positions"
        )


def count_from_prompt(model: Any, call: dict[str, Any], prompt: int, new: dict[str, Any]) -> None:
    """Make total lengths count the caller's prompt: `max_length`, `min_length` become numbers of new tokens.

    Raises
    ------
    UnsupportedCallError
        If `max_length` leaves no room after the prompt.
    """
    for total, fresh in (("max_length", "max_new_tokens"), ("min_length", "min_new_tokens")):
        value = setting(model, call, total)
        if value is None or setting(model, call, fresh) is not None or (total == "min_length" and value == 0):
            continue
        if total == "max_length" and value <= prompt:
            raise UnsupportedCallError(
                f"max_length={value} leaves no room for an answer after a prompt of {prompt} tokens; set max_new_tokens"
            )
        new.pop(total, None)
        new[fresh] = max(0, value - prompt)


@dataclass(frozen=True)
class PromptRestorer:
    """Puts the caller's prompt back in front of tokens that were generated after a shorter one.

    `full` (B, L) are the caller's ids, `short` the length of the pruned prompt.
    """

    full: Tensor
    short: int

    def ids(self, sequences: Tensor) -> Tensor:
        """Return (R, L + new) from (R, short + new); rows are the prompts, each repeated R / B times."""
        times = sequences.shape[0] // self.full.shape[0]
        prompt = self.full.to(sequences.device).repeat_interleave(times, 0)
        return torch.cat([prompt, sequences[:, self.short :]], 1)

    def output(self, output: Any) -> Any:
        """Return the output of `generate` with the caller's prompt at the start of its sequences."""
        if isinstance(output, Tensor):
            return self.ids(output)
        output.sequences = self.ids(output.sequences)
        return output

    def wrap_hooks(self, call: dict[str, Any]) -> None:
        """Wrap the caller's hooks in a call's arguments so that they see full sequences.

        Raises
        ------
        UnsupportedCallError
            For classes of transformers that count from the prompt: options of `generate` build them correctly.
        """
        if call.get("logits_processor"):
            call["logits_processor"] = LogitsProcessorList([self._processor(p) for p in call["logits_processor"]])
        if call.get("stopping_criteria"):
            call["stopping_criteria"] = StoppingCriteriaList([self._criteria(c) for c in call["stopping_criteria"]])
        if call.get("prefix_allowed_tokens_fn"):
            call["prefix_allowed_tokens_fn"] = self._prefix_function(call["prefix_allowed_tokens_fn"])
        if call.get("streamer"):
            call["streamer"] = _FullStreamer(self, call["streamer"])

    def _is_builtin(self, hook: Any) -> bool:
        """True if a hook is a class of transformers: it stays as it is, so that it replaces the built-in one."""
        name = type(hook).__name__
        if not type(hook).__module__.startswith("transformers.") or isinstance(hook, PrefixConstrainedLogitsProcessor):
            return False
        if name == "UnbatchedClassifierFreeGuidanceLogitsProcessor":
            raise UnsupportedCallError(
                f"classifier-free guidance ({name}) is not supported while a session is attached"
            )
        if getattr(hook, "prompt_ignore_length", None) is not None:
            return False  # it counts the caller's prompt, and gets it
        if name in _COUNT_FROM_PROMPT:
            raise UnsupportedCallError(
                f"{name} counts the tokens of the pruned prompt; pass {_COUNT_FROM_PROMPT[name]} to generate instead"
            )
        return True

    def _processor(self, hook: Any) -> Any:
        return hook if self._is_builtin(hook) else _FullProcessor(self, hook)

    def _criteria(self, hook: Any) -> Any:
        return hook if self._is_builtin(hook) else _FullCriteria(self, hook)

    def _prefix_function(self, allowed: Callable[[int, Tensor], list[int]]) -> Callable[[int, Tensor], list[int]]:
        def shown_full(row: int, ids: Tensor) -> list[int]:
            return allowed(row, torch.cat([self.full[row].to(ids.device), ids[self.short :]]))

        return shown_full


class _FullProcessor(LogitsProcessor):  # type: ignore[misc]
    def __init__(self, restorer: PromptRestorer, inner: LogitsProcessor) -> None:
        self.restorer, self.inner = restorer, inner

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        return self.inner(self.restorer.ids(input_ids), scores)


class _FullCriteria(StoppingCriteria):  # type: ignore[misc]
    def __init__(self, restorer: PromptRestorer, inner: StoppingCriteria) -> None:
        self.restorer, self.inner = restorer, inner

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        return self.inner(self.restorer.ids(input_ids), scores, **kwargs)


class _FullStreamer:
    """A streamer whose first chunk, the prompt, is the caller's."""

    def __init__(self, restorer: PromptRestorer, inner: Any) -> None:
        self.restorer, self.inner, self.started = restorer, inner, False

    def put(self, value: Tensor) -> None:
        self.inner.put(value if self.started else self.restorer.ids(value))
        self.started = True

    def end(self) -> None:
        self.inner.end()
