"""Running a frozen LLM on many keep-masks of one prompt: one encoding, a few packed prefills."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vidsieve.adapters.base import Adapter
from vidsieve.adapters.batch import Encoded
from vidsieve.errors import UnsupportedCallError
from vidsieve.rl.rewards import caption_ce, label_span
from vidsieve.selection import mask_to_indices
from vidsieve.types import Need, Selection, VideoTokens


class Rollouts:
    """A prompt with one video, and the frozen LLM's reaction to any subset of its tokens.

    The video is encoded when the object is made; every rollout after that costs a prefill of the kept tokens
    only, packed `max_tokens` tokens at a time.

    Parameters
    ----------
    adapter : Adapter
    inputs : mapping
        Processor outputs of one prompt with one video; ``labels`` where a caption is scored.
    max_tokens : int
        Most tokens, padding included, in one prefill.
    """

    def __init__(self, adapter: Adapter, inputs: Mapping[str, Any], max_tokens: int = 16384) -> None:
        self.adapter, self.max_tokens = adapter, max_tokens
        with torch.no_grad():
            self.encoded: Encoded = adapter.encode(inputs)
        if self.encoded.input_ids.shape[0] != 1 or len(self.encoded.videos) != 1:
            raise UnsupportedCallError("rollouts need one prompt with one video at a time")

    def video(self, needs: frozenset[Need] = frozenset()) -> VideoTokens:
        """Return the video as a policy reads it."""
        with torch.no_grad():
            return self.adapter.video_tokens(self.encoded, 0, needs)

    @torch.no_grad()
    def option_logits(self, keep_masks: Tensor, option_ids: Tensor) -> Tensor:
        """Return the next-token logits (G, options) of the option words after the prompt.

        Parameters
        ----------
        keep_masks : Tensor, (G, N), bool
        option_ids : Tensor, (options,), int64
        """
        parts = []
        for batch in self._batches(keep_masks):
            batch.pop("labels", None)  # with them the model would compute a loss over every position
            parts.append(self.adapter.model(**batch, logits_to_keep=1, use_cache=False).logits[:, -1, option_ids])
        return torch.cat(parts)

    @torch.no_grad()
    def generate(self, keep_masks: Tensor, max_new_tokens: int) -> Tensor:
        """Return greedy answers (G, E) int64 under each keep-mask (G, N), E ≤ `max_new_tokens`, padded on the right."""
        parts, settings = [], self.adapter.model.generation_config
        pad = settings.pad_token_id if settings.pad_token_id is not None else 0
        for batch in self._batches(keep_masks):
            batch.pop("labels", None)
            out = self.adapter.model.generate(**batch, max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=pad)
            parts.append(out[:, batch["input_ids"].shape[1] :])
        longest = max(part.shape[1] for part in parts)
        return torch.cat([F.pad(part, (0, longest - part.shape[1]), value=pad) for part in parts])

    @torch.no_grad()
    def caption_ce(self, kept: Tensor | Sequence[Selection]) -> Tensor:
        """Return the caption's cross-entropy per token (G,) under each keep-mask (G, N) or selection.

        Raises
        ------
        UnsupportedCallError
            If the prompt carries no labels.
        """
        if "labels" not in self.encoded.rest:
            raise UnsupportedCallError("caption_ce needs labels in the inputs")
        parts = []
        for batch in self._batches(kept):
            labels = batch.pop("labels")
            span = label_span(labels)
            logits = self.adapter.model(**batch, logits_to_keep=span, use_cache=False).logits
            parts.append(caption_ce(logits, labels[:, -span:]))
        return torch.cat(parts)

    def _batches(self, kept: Tensor | Sequence[Selection]) -> Iterator[dict[str, Any]]:
        chosen = [Selection(mask_to_indices(mask)) for mask in kept] if isinstance(kept, Tensor) else list(kept)
        text = int(self.encoded.attention_mask.sum()) - self.encoded.videos[0].features.grid.num_tokens
        size = max(1, self.max_tokens // (text + max(selection.num_kept for selection in chosen)))
        for start in range(0, len(chosen), size):
            some = [[selection] for selection in chosen[start : start + size]]
            yield self.adapter.build(self.encoded, some, rows=[0] * len(some)).inputs
