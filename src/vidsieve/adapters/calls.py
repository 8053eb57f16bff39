"""What a pruned call must hide from its caller: lengths, prompt ids, and the cache of earlier turns."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from vidsieve.adapters.base import Adapter
from vidsieve.adapters.batch import Pruned
from vidsieve.errors import UnsupportedCallError

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


def _setting(call: dict[str, Any], name: str) -> Any:
    """Return an option of `generate` as given directly or in its generation_config."""
    value = call.get(name)
    return value if value is not None else getattr(call.get("generation_config"), name, None)


def check_generate(call: dict[str, Any]) -> None:
    """Refuse generation modes whose result on a pruned prompt is not known to be right.

    Raises
    ------
    UnsupportedCallError
    """
    for name, what in _REFUSED.items():
        value = _setting(call, name)
        if value is not None and value != 1.0:
            raise UnsupportedCallError(f"{what} ({name}) is not supported while a session is attached; leave it out")
    if _setting(call, "cache_implementation") == "paged":
        raise UnsupportedCallError("a paged cache is not supported while a session is attached")


def uses_cache(model: Any, call: dict[str, Any]) -> bool:
    """Return whether a `generate` call would run with its cache on."""
    value = _setting(call, "use_cache")
    if value is None:
        value = getattr(model.generation_config, "use_cache", True)
    return value is not False


def check_logits_to_keep(call: dict[str, Any], ids: Tensor, video_token_id: int) -> None:
    """Refuse a `logits_to_keep` that reaches into columns which pruning removes.

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


def count_from_prompt(model: Any, call: dict[str, Any], prompt: int, new: dict[str, Any]) -> None:
    """Make total lengths count the caller's prompt: `max_length`, `min_length` become numbers of new tokens."""
    for total, fresh in (("max_length", "max_new_tokens"), ("min_length", "min_new_tokens")):
        value = _setting(call, total)
        if value is None:
            value = getattr(model.generation_config, total, None)
        given = _setting(call, fresh)
        if given is None:
            given = getattr(model.generation_config, fresh, None)
        if value is None or given is not None or (total == "min_length" and value == 0):
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

    def wrap(self, name: str, value: Any) -> Any:
        """Return a caller's hook of `generate` so that it is shown full sequences."""
        if name == "logits_processor":
            return LogitsProcessorList([_FullProcessor(self, p) for p in value])
        if name == "stopping_criteria":
            return StoppingCriteriaList([_FullCriteria(self, c) for c in value])
        if name == "prefix_allowed_tokens_fn":
            return self._prefix_function(value)
        return _FullStreamer(self, value)

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
        if hasattr(inner, "eos_token_id"):
            self.eos_token_id = inner.eos_token_id  # generate looks for it to pad finished sequences

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


def restore_output(output: Any, restorer: PromptRestorer) -> Any:
    """Return what `generate` returned, with the caller's prompt at the head of its sequences."""
    if isinstance(output, Tensor):
        return restorer.ids(output)
    output.sequences = restorer.ids(output.sequences)
    return output


@dataclass(frozen=True)
class CacheRecord:
    """What a cache filled from a pruned prompt stands for.

    Parameters
    ----------
    full_ids, short_ids : Tensor, (R, ·), int64
        Every token so far as the caller sees it, and as the LLM read it.
    prompt, short_prompt : int
        Lengths of the first prompt in both.
    mask : Tensor, (R, short_prompt), int64
        Attention mask of the pruned prompt.
    positions : Tensor, (rows, R, short_prompt), int64
        Positions of the pruned prompt.
    """

    full_ids: Tensor
    short_ids: Tensor
    prompt: int
    short_prompt: int
    mask: Tensor
    positions: Tensor

    @classmethod
    def start(cls, ids: Tensor, pruned: Pruned, positions: Tensor) -> CacheRecord:
        """Return the record of a first call."""
        short = pruned.inputs["input_ids"]
        return cls(ids, short, ids.shape[1], short.shape[1], pruned.inputs["attention_mask"], positions)

    def grown(self, full_ids: Tensor, short_ids: Tensor) -> CacheRecord:
        """Return the record after more tokens; prompts are repeated where several sequences came of each."""
        times = short_ids.shape[0] // self.mask.shape[0]
        return replace(
            self, full_ids=full_ids, short_ids=short_ids, mask=self.mask.repeat_interleave(times, 0),
            positions=self.positions.repeat_interleave(times, 1),
        )  # fmt: skip

    def _later(self, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        """Return mask and positions of the pruned sequence from the caller's mask over the full one."""
        later = attention_mask[:, self.prompt :].to(self.mask)
        last = self.positions[:, :, -1:]
        steps = last + later.cumsum(1)[None]
        return torch.cat([self.mask, later], 1), torch.cat([self.positions, steps], 2)

    def continuation(self, call: dict[str, Any], adapter: Adapter) -> dict[str, Any]:
        """Return ids, mask and positions of a later turn of `generate`.

        The caller sends the whole conversation, as with an unpruned cache; it must begin with the tokens that
        the cache holds.

        Raises
        ------
        UnsupportedCallError
            If it does not, if it brings another video, or if the cache holds beams.
        """
        ids, cache = call["input_ids"], call["past_key_values"]
        held = cache.get_seq_length() + self.prompt - self.short_prompt
        if ids.shape[0] != self.full_ids.shape[0] or _cache_rows(cache) != ids.shape[0]:
            raise UnsupportedCallError(
                f"the cache holds {_cache_rows(cache)} sequences, the call has {ids.shape[0]}: a cache made by beam "
                "search cannot be continued, start a new one"
            )
        if ids.shape[1] <= held or not torch.equal(ids[:, :held], self.full_ids[:, :held].to(ids.device)):
            raise UnsupportedCallError(
                f"the conversation must begin with the {held} tokens that the cache holds and go on after them: append "
                "to the sequences that generate returned, or start without past_key_values"
            )
        fresh = ids[:, held:]
        if bool((fresh == adapter.video_token_id).any()):
            raise UnsupportedCallError("a later turn brings another video: start a new conversation without the cache")
        mask = call.get("attention_mask")
        mask, positions = self._later(torch.ones_like(ids) if mask is None else mask)
        short = torch.cat([self.short_ids[:, : cache.get_seq_length()].to(ids.device), fresh], 1)
        return {"input_ids": short, "attention_mask": mask, "position_ids": adapter.pack_positions(positions)}

    def step(self, ids: Tensor, call: dict[str, Any], adapter: Adapter) -> dict[str, Any]:
        """Return the arguments of a plain forward that adds new tokens `ids` (R, n) to the cache."""
        length = call["past_key_values"].get_seq_length()
        total = length + self.prompt - self.short_prompt + ids.shape[1]
        mask = call.get("attention_mask")
        if mask is None:
            mask = torch.ones(ids.shape[0], total, dtype=torch.int64, device=ids.device)
        if mask.shape != (ids.shape[0], total):
            raise UnsupportedCallError(
                f"attention_mask must cover the {total} tokens of the unpruned sequence, got {tuple(mask.shape)}"
            )
        mask, positions = self._later(mask)
        drop = {*adapter.video_keys, "mm_token_type_ids"}
        new = {k: v for k, v in call.items() if k not in drop}
        positions = adapter.pack_positions(positions[..., -ids.shape[1] :])
        return new | {"input_ids": ids, "attention_mask": mask, "position_ids": positions}


def _cache_rows(cache: Any) -> int:
    """Return the batch size that a cache was filled with."""
    return int(cache.layers[0].keys.shape[0])
