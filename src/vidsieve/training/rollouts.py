"""Running a frozen LLM on many keep-masks of one prompt: one encoding, a few packed prefills."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vidsieve.adapters.adapter import Adapter
from vidsieve.adapters.encoded import Encoded, on_device
from vidsieve.errors import UnsupportedCallError
from vidsieve.selection import mask_to_indices
from vidsieve.training.packing import Packing
from vidsieve.training.rewards import caption_ce, label_span
from vidsieve.types import Need, Selection, VideoTokens


class Rollouts:
    """A prompt with one video, and the frozen LLM's reaction to any subset of its tokens.

    The video is encoded when the object is made; every rollout after that costs a prefill of the kept tokens
    only, as many at a time as `packing` allows. How they are packed changes results by float noise alone.

    Parameters
    ----------
    adapter : Adapter
    inputs : mapping
        Processor outputs of one prompt with one video; ``labels`` where a caption is scored.
    packing : Packing, optional
        One for all prompts of a run keeps what did not fit from being tried again; default: a new one.
    """

    def __init__(self, adapter: Adapter, inputs: Mapping[str, Any], packing: Packing | None = None) -> None:
        self.adapter, self.packing = adapter, packing or Packing(adapter.model)
        with torch.no_grad():
            self.encoded: Encoded = adapter.encode(on_device(inputs, adapter.device))
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

        def work(batch: dict[str, Any]) -> Tensor:
            batch.pop("labels", None)  # with them the model would compute a loss over every position
            logits: Tensor = self.adapter.model(**batch, logits_to_keep=1, use_cache=False).logits
            return logits[:, -1, option_ids]

        return torch.cat(self._packed(keep_masks, work))

    @torch.no_grad()
    def blind_logits(self, option_ids: Tensor) -> Tensor:
        """Return the next-token logits (options,) of the option words after the prompt without its video.

        The prompt loses everything from the video's first token to its last, time stamps of frames included, and
        the markers of its ends where the model's configuration names them.

        Parameters
        ----------
        option_ids : Tensor, (options,), int64
        """
        encoded, span, config = self.encoded, self.encoded.videos[0], self.adapter.model.config
        ids = encoded.input_ids[0]
        columns = torch.cat([span.columns, span.tail_columns, span.surplus_columns])
        first, last = int(columns.min()), int(columns.max())
        if first > 0 and int(ids[first - 1]) == getattr(config, "vision_start_token_id", None):
            first -= 1
        if last + 1 < len(ids) and int(ids[last + 1]) == getattr(config, "vision_end_token_id", None):
            last += 1
        keep = encoded.attention_mask[0].clone()
        keep[first : last + 1] = False
        words = ids[keep][None]
        positions = torch.arange(words.shape[1], device=words.device).expand(len(encoded.positions), 1, -1)
        logits = self.adapter.model(
            input_ids=words,
            attention_mask=torch.ones_like(words),
            position_ids=self.adapter.pack_positions(positions),
            logits_to_keep=1,
            use_cache=False,
        ).logits
        found: Tensor = logits[0, -1, option_ids]
        return found

    @torch.no_grad()
    def generate(self, keep_masks: Tensor, max_new_tokens: int) -> Tensor:
        """Return greedy answers (G, E) int64 under each keep-mask (G, N), E ≤ `max_new_tokens`, padded on the right."""
        settings = self.adapter.model.generation_config
        pad = settings.pad_token_id if settings.pad_token_id is not None else 0

        def work(batch: dict[str, Any]) -> Tensor:
            batch.pop("labels", None)
            out = self.adapter.model.generate(**batch, max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=pad)
            answers: Tensor = out[:, batch["input_ids"].shape[1] :]
            return answers

        parts = self._packed(keep_masks, work, cache=True)
        longest = max(part.shape[1] for part in parts)
        return torch.cat([F.pad(part, (0, longest - part.shape[1]), value=pad) for part in parts])

    @torch.no_grad()
    def caption_ce(self, kept: Tensor | Sequence[Selection]) -> Tensor:
        """Return the caption's cross-entropy per token (G,) under each keep-mask (G, N) or selection.

        Raises
        ------
        UnsupportedCallError
            If the prompt carries no labels, or none on any token.
        """
        if "labels" not in self.encoded.rest:
            raise UnsupportedCallError("caption_ce needs labels in the inputs")
        labels = self.encoded.rest["labels"][:, self.encoded.attention_mask[0]]
        if not bool((labels[:, 1:] != -100).any()):
            raise UnsupportedCallError("the caption is empty: labels are -100 on every token that could be predicted")
        span = label_span(labels)

        def work(batch: dict[str, Any]) -> Tensor:
            labels = batch.pop("labels")
            logits = self.adapter.model(**batch, logits_to_keep=span, use_cache=False).logits
            return caption_ce(logits, labels[:, -span:])

        return torch.cat(self._packed(kept, work, positions=span))

    def _packed(
        self,
        kept: Tensor | Sequence[Selection],
        work: Callable[[dict[str, Any]], Tensor],
        positions: int = 1,
        cache: bool = False,
    ) -> list[Tensor]:
        """Return what `work` makes of the inputs under each keep-mask, one tensor a prefill."""
        chosen = [Selection(mask_to_indices(mask)) for mask in kept] if isinstance(kept, Tensor) else list(kept)
        text = int(self.encoded.attention_mask.sum()) - self.encoded.videos[0].features.grid.num_tokens
        length = text + max(selection.num_kept for selection in chosen)

        def prefill(some: Sequence[Selection]) -> Tensor:
            return work(
                self.adapter.build(self.encoded, [[selection] for selection in some], rows=[0] * len(some)).inputs
            )

        return self.packing.run(chosen, prefill, length, positions, cache)
