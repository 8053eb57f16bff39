"""The unpruned prompt behind a cache that was filled from a pruned one, recorded on the cache itself."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from vidsieve.adapters.adapter import Adapter
from vidsieve.adapters.inside.hooks import InnerRun
from vidsieve.adapters.plan import Plan
from vidsieve.adapters.transformers_api import CACHE, first_keys
from vidsieve.errors import UnsupportedCallError

_MARK = "_vidsieve_record"


@dataclass(frozen=True)
class CacheRecord:
    """The prompt behind a pruned cache. It travels with the cache object, copies and sessions included.

    Parameters
    ----------
    full_ids, short_ids : Tensor, (R, ·), int64
        All tokens so far, as the caller sees them and as the LLM read them.
    full_mask : Tensor, (R, prompt), bool
        The caller's attention mask of the prompt.
    mask : Tensor, (R, short_prompt), int64
        Attention mask of the pruned prompt.
    positions : Tensor, (rows, R, short_prompt), int64
        Positions of the pruned prompt. Tokens after it follow at the last one + 1, as `generate` decodes.
    beams : bool
        True if beam search filled it: its rows are not sequences.
    fingerprint : Tensor or None, (R, short_prompt)
        A sample of each row's keys, to detect rows that were moved.
    layers : InnerRun or None
        The part of the method inside the LLM: what each layer kept, or what decoding steps read.
    """

    full_ids: Tensor
    short_ids: Tensor
    full_mask: Tensor
    mask: Tensor
    positions: Tensor
    beams: bool = False
    fingerprint: Tensor | None = None
    layers: InnerRun | None = None

    @property
    def prompt(self) -> int:
        """Length of the caller's prompt."""
        return int(self.full_mask.shape[1])

    @property
    def short_prompt(self) -> int:
        """Length of the pruned prompt."""
        return int(self.mask.shape[1])

    @classmethod
    def start(
        cls,
        ids: Tensor,
        full_mask: Tensor,
        plan: Plan,
        positions: Tensor,
    ) -> CacheRecord:
        """Return the record of a first call."""
        inputs = plan.inputs
        return cls(ids, inputs["input_ids"], full_mask.bool(), inputs["attention_mask"], positions, layers=plan.run)

    def grown(self, full_ids: Tensor, short_ids: Tensor, beams: bool = False) -> CacheRecord:
        """Return the record after more tokens; prompts are repeated where several sequences came of each."""
        times = short_ids.shape[0] // self.mask.shape[0]
        return replace(
            self,
            full_ids=full_ids,
            short_ids=short_ids,
            full_mask=self.full_mask.repeat_interleave(times, 0),
            mask=self.mask.repeat_interleave(times, 0),
            positions=self.positions.repeat_interleave(times, 1),
            beams=self.beams or beams,
        )

    def continuation(self, call: dict[str, Any], adapter: Adapter) -> dict[str, Any]:
        """Return ids, mask and positions of a later turn of `generate`.

        The caller sends the whole conversation, as with an unpruned cache; it must begin with the tokens that
        the cache holds.

        Raises
        ------
        UnsupportedCallError
            If it does not, or brings another video or an image, or the cache cannot be continued.
        """
        ids, cache = call["input_ids"], call[CACHE]
        if call.get("position_ids") is not None or call.get("inputs_embeds") is not None:
            raise UnsupportedCallError("a later turn takes input_ids alone: its positions follow from the first turn")
        self._check_rows(cache, ids.shape[0])
        held = cache.get_seq_length() + self.prompt - self.short_prompt
        if ids.shape[1] <= held or not torch.equal(ids[:, :held], self.full_ids[:, :held].to(ids.device)):
            raise UnsupportedCallError(
                f"the conversation must begin with the {held} tokens that the cache holds and go on after them: append "
                "to the sequences that generate returned, or start without past_key_values"
            )
        fresh = ids[:, held:]
        # The model's last answer is not in the cache yet: a placeholder in it is a word like any other.
        answer = self.full_ids[:, held : ids.shape[1]].to(ids.device)
        same = fresh[:, : answer.shape[1]] == answer
        brought = fresh.clone()
        brought[:, : answer.shape[1]][same] = -1
        # The first turn's pixels may come again with the conversation.
        _check_words_only(brought, call, adapter, pixels=False, image=not adapter.holds_image(self.full_ids))
        mask, positions = self._later(call["attention_mask"], ids.shape[1])
        short = torch.cat([self.short_ids[:, : cache.get_seq_length()].to(ids.device), fresh], 1)
        return {"input_ids": short, "attention_mask": mask, "position_ids": adapter.pack_positions(positions)}

    def step(self, ids: Tensor, call: dict[str, Any], adapter: Adapter) -> tuple[dict[str, Any], CacheRecord]:
        """Return the arguments of a plain forward that adds tokens `ids` (R, n), and the record after it.

        Raises
        ------
        UnsupportedCallError
            If the tokens bring a video or an image, or mask and rows do not fit the cache.
        """
        cache = call[CACHE]
        self._check_rows(cache, ids.shape[0])
        # One token without pixels is a word, even the placeholder: the model may have generated it.
        spoken = torch.full_like(ids, -1) if ids.shape[1] == 1 else ids
        _check_words_only(spoken, call, adapter, pixels=True, image=True)
        if call.get("position_ids") is not None:
            raise UnsupportedCallError("leave position_ids out: positions on a pruned cache follow from its prompt")
        held = cache.get_seq_length() + self.prompt - self.short_prompt
        total = held + ids.shape[1]
        mask = call.get("attention_mask")
        if mask is None:
            after = torch.ones(ids.shape[0], total - self.prompt, dtype=torch.bool, device=ids.device)
            mask = torch.cat([self.full_mask.to(ids.device), after], 1)
        mask, positions = self._later(mask, total)
        drop = {*adapter.video_keys, *adapter.image_keys, *adapter.audio_keys, *adapter.column_keys}
        drop |= {"mm_token_type_ids"}
        new = {k: v for k, v in call.items() if k not in drop} | {
            "input_ids": ids,
            "attention_mask": mask,
            "position_ids": adapter.pack_positions(positions[..., -ids.shape[1] :]),
        }
        full = torch.cat([self.full_ids[:, :held].to(ids.device), ids], 1)
        short = torch.cat([self.short_ids[:, : cache.get_seq_length()].to(ids.device), ids], 1)
        return new, self.grown(full, short)

    def _later(self, attention_mask: Tensor, total: int) -> tuple[Tensor, Tensor]:
        """Return mask and positions of the pruned sequence from the caller's mask (R, total) over the full one."""
        rows = self.mask.shape[0]
        if tuple(attention_mask.shape) != (rows, total):
            raise UnsupportedCallError(
                f"attention_mask must cover the {total} tokens of the unpruned sequence: ({rows}, {total}), got "
                f"{tuple(attention_mask.shape)}"
            )
        if not torch.equal(attention_mask[:, : self.prompt].bool(), self.full_mask.to(attention_mask.device)):
            raise UnsupportedCallError(
                "attention_mask hides other tokens of the prompt than in the first call: a pruned cache cannot follow"
            )
        later = attention_mask[:, self.prompt :].to(self.mask)
        steps = self.positions[:, :, -1:] + later.cumsum(1)[None]
        return torch.cat([self.mask, later], 1), torch.cat([self.positions, steps], 2)

    def _check_rows(self, cache: Any, rows: int) -> None:
        if self.beams:
            raise UnsupportedCallError("a cache filled by beam search cannot be continued: start a new one")
        if cache.get_seq_length() < self.short_prompt:
            raise UnsupportedCallError("the cache was cropped into its pruned prompt: start a new conversation")
        moved = self.fingerprint is not None and not _same(self.fingerprint, _fingerprint(cache, self.short_prompt))
        if rows != self.mask.shape[0] or moved:
            raise UnsupportedCallError(
                f"the cache was filled with {self.mask.shape[0]} sequences in another order or number than this call's "
                f"{rows}: rows of a pruned cache cannot be moved, repeated or dropped"
            )


def _check_words_only(fresh: Tensor, call: dict[str, Any], adapter: Adapter, *, pixels: bool, image: bool) -> None:
    """Refuse tokens of a later call that need the vision encoder.

    `pixels`: nor may the first video come again; `image`: nor an image.
    """
    if bool((fresh == adapter.video_token_id).any()) or (pixels and adapter.carries_video(call)):
        raise UnsupportedCallError("a later turn brings another video: start a new conversation without the cache")
    if adapter.holds_image(fresh) or (image and adapter.carries_image(call, fresh)):
        raise UnsupportedCallError("a later turn brings an image: not supported on a pruned cache")
    if adapter.holds_sound(fresh):
        raise UnsupportedCallError("a later turn brings a sound: not supported on a pruned cache")


def record_of(cache: Any) -> CacheRecord | None:
    """Return the record of a cache that was filled from a pruned prompt; an emptied cache forgets it."""
    record: CacheRecord | None = getattr(cache, _MARK, None)
    if record is not None and cache.get_seq_length() == 0:
        delattr(cache, _MARK)
        return None
    return record


def keep_record(cache: Any, record: CacheRecord) -> None:
    """Put a record on its cache, with a fingerprint of the rows once they are filled."""
    if cache is None or isinstance(cache, tuple):
        return
    prints = _fingerprint(cache, record.short_prompt) if record.fingerprint is None and not record.beams else None
    setattr(cache, _MARK, replace(record, fingerprint=prints) if prints is not None else record)


def _fingerprint(cache: Any, length: int) -> Tensor | None:
    """Return one component of layer 0's keys (R, length): a function of each row's tokens and positions."""
    keys = first_keys(cache, length)
    return None if keys is None else keys[:, 0, :length, 0].clone()


def _same(first: Tensor, second: Tensor | None) -> bool:
    return second is None or (first.shape == second.shape and bool(torch.equal(first, second.to(first))))
