"""Run a frozen LLM on many keep-masks of one prompt: one encoding, a few packed prefills."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from vidsieve.adapters.adapter import Adapter
from vidsieve.adapters.encoded import Encoded, on_device
from vidsieve.adapters.plan import Plan
from vidsieve.adapters.transformers_api import head_sizes, is_eager, mlp_width
from vidsieve.errors import TrainingError, UnsupportedCallError
from vidsieve.io.machine import total_memory
from vidsieve.selection import mask_to_indices
from vidsieve.training.rewards import caption_ce, label_span
from vidsieve.types import Need, Selection, VideoTokens

Item = TypeVar("Item")
Result = TypeVar("Result")

CPU_TOKENS = 2048
"""Tokens in one prefill on the CPU; more answer no more rollouts per second (benchmarks/rollouts.py)."""
GPU_TOKENS = 65536
"""Tokens in the first prefill on a GPU; what does not fit is halved."""
CPU_SHARE = 4
"""A prefill on the CPU may use one part in so many of the machine's memory."""


@dataclass(frozen=True)
class Footprint:
    """Estimate, from a model's configuration, of the bytes that a prefill under `no_grad` holds at once.

    Without gradients and without a cache one layer's activations replace those of the layer before.

    Parameters
    ----------
    token : int
        A token's hidden states and the widest activations of one layer.
    pair : int
        A query and a key: the mask, and under eager attention the scores of every head.
    logits : int
        A position's logits over the vocabulary, and two float32 copies for log-probabilities.
    cached : int
        A token's keys and values in all layers, where a cache is kept.
    """

    token: int
    pair: int
    logits: int
    cached: int

    @classmethod
    def of(cls, model: Any) -> Footprint:
        """Return the footprint of a transformers model."""
        text, size = model.config.get_text_config(), torch.finfo(model.dtype).bits // 8
        scores = 2 * text.num_attention_heads if is_eager(text) else 0
        return cls(
            token=size * (8 * text.hidden_size + 3 * mlp_width(text)),
            pair=size * (1 + scores),
            logits=text.vocab_size * (size + 8),
            cached=2 * size * sum(width * heads for width, heads in head_sizes(text)),
        )

    def rollout(self, length: int, positions: int = 1, cache: bool = False) -> int:
        """Return the bytes of one rollout of `length` tokens with logits at `positions` of them."""
        per_token = self.token + (self.cached if cache else 0)
        return length * per_token + length * length * self.pair + positions * self.logits


class Packing:
    """Number of rollouts in one prefill; one object serves all prompts of a run and remembers what did not fit.

    On the CPU it depends on the model and on the machine's total memory alone, never on what is free at the moment:
    float results differ in their last bits between shapes of a batch, and a run must be repeatable. On a GPU it starts
    large and is halved when memory runs out.

    Parameters
    ----------
    model : the transformers model
    tokens : int
        Most tokens, padding included, in one prefill; 0: as many as memory allows.
    """

    def __init__(self, model: Any, tokens: int = 0) -> None:
        self.device, self.footprint = model.device, Footprint.of(model)
        self.bytes = math.inf
        gpu = self.device.type == "cuda"
        self.tokens = tokens or (GPU_TOKENS if gpu else CPU_TOKENS)
        if not tokens:
            self.bytes = (
                torch.cuda.get_device_properties(self.device).total_memory if gpu else total_memory() // CPU_SHARE
            )

    def rows(self, length: int, positions: int = 1, cache: bool = False) -> int:
        """Return the number of rollouts in one prefill, at least 1; arguments as `Footprint.rollout`."""
        fitting = min(self.tokens // length, self.bytes / self.footprint.rollout(length, positions, cache))
        return max(1, math.floor(fitting))

    def run(
        self,
        items: Sequence[Item],
        work: Callable[[Sequence[Item]], Result],
        length: int,
        positions: int = 1,
        cache: bool = False,
    ) -> list[Result]:
        """Return the results of `work` on the items, pack by pack; a pack that runs out of memory is halved.

        Raises
        ------
        TrainingError
            If a single rollout does not fit.
        """
        results: list[Result] = []
        start = 0
        while start < len(items):
            pack = items[start : start + self.rows(length, positions, cache)]
            try:
                results.append(work(pack))
                start += len(pack)
                continue
            except torch.cuda.OutOfMemoryError:
                pass  # the error holds the frames, and with them the tensors that filled the memory: leave it first
            if len(pack) == 1:
                raise TrainingError(
                    f"a single rollout of {length} tokens with {positions} positions of logits does not fit into the "
                    f"memory of {self.device}: take fewer frames a video, keep fewer tokens (ratio, rate_high), or "
                    "shorten the caption; rollout_tokens cannot help"
                )
            self.bytes = len(pack) * self.footprint.rollout(length, positions, cache) / 2
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
        return results

    def record(self) -> dict[str, int | None]:
        """Return the present bounds on a prefill: tokens, and bytes by the estimate (None: no bound)."""
        return {"tokens": self.tokens, "bytes": None if self.bytes == math.inf else int(self.bytes)}


class Rollouts:
    """A prompt with one video, and the frozen LLM's outputs under any subset of its tokens.

    The video is encoded when the object is made; every rollout after that costs a prefill of the kept tokens only.
    How rollouts are packed changes results by float noise alone.

    Parameters
    ----------
    adapter : Adapter
    inputs : mapping
        Processor outputs of one prompt with one video; ``labels`` where a caption is scored.
    packing : Packing, optional
        The packing of the run; default: a new one.
    """

    def __init__(self, adapter: Adapter, inputs: Mapping[str, Any], packing: Packing | None = None) -> None:
        self.adapter, self.packing = adapter, packing or Packing(adapter.model)
        with torch.no_grad():
            self.encoded: Encoded = adapter.encode(on_device(inputs, adapter.device))
        if self.encoded.input_ids.shape[0] != 1 or len(self.encoded.videos) != 1:
            raise UnsupportedCallError("rollouts need one prompt with one video at a time")

    @property
    def num_tokens(self) -> int:
        """N, the tokens of the video."""
        return self.encoded.videos[0].features.grid.num_tokens

    def video(self, needs: frozenset[Need] = frozenset()) -> VideoTokens:
        """Return the video as a policy reads it."""
        with torch.no_grad():
            return self.adapter.video_tokens(self.encoded, 0, needs)

    def prefill(self, selections: Sequence[Selection], span: int = 1) -> tuple[Tensor, Tensor]:
        """Run the LLM under each selection, with gradients if they are enabled.

        Returns
        -------
        logits : Tensor, (G, span, V)
            Of the last `span` columns.
        labels : Tensor, (G, L), int64
            Empty where the prompt has none.
        """
        inputs = self.build(selections).inputs
        labels = inputs.pop("labels", torch.empty(0))  # with them the model would compute a loss over every position
        return self.adapter.model(**inputs, logits_to_keep=span, use_cache=False).logits, labels

    def build(self, selections: Sequence[Selection]) -> Plan:
        """Return the LLM's inputs under each selection, one row each."""
        return self.adapter.build(self.encoded, [[selection] for selection in selections], rows=[0] * len(selections))

    @torch.no_grad()
    def option_logits(self, kept: Tensor | Sequence[Selection], option_ids: Tensor) -> Tensor:
        """Return the next-token logits (G, options) of options (options,) under each keep-mask (G, N) or selection."""
        return torch.cat(self._packed(kept, lambda pack: self.prefill(pack)[0][:, -1, option_ids]))

    @torch.no_grad()
    def blind_logits(self, option_ids: Tensor) -> Tensor:
        """Return the next-token logits (options,) of options (options,) int64 after the prompt without its video.

        The prompt loses everything from the video's first token to its last, time stamps of frames included, and
        the markers of its ends where the model's configuration names them.
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
        logits: Tensor = self.adapter.model(
            input_ids=words,
            attention_mask=torch.ones_like(words),
            position_ids=self.adapter.pack_positions(positions),
            logits_to_keep=1,
            use_cache=False,
        ).logits
        return logits[0, -1, option_ids]

    @torch.no_grad()
    def generate(self, kept: Tensor | Sequence[Selection], max_new_tokens: int) -> Tensor:
        """Return greedy answers (G, E) int64 under each keep-mask (G, N) or selection, padded on the right."""
        settings = self.adapter.model.generation_config
        pad = settings.pad_token_id if settings.pad_token_id is not None else 0

        def work(pack: Sequence[Selection]) -> Tensor:
            inputs = self.build(pack).inputs
            inputs.pop("labels", None)
            answers = {"max_new_tokens": max_new_tokens, "do_sample": False, "pad_token_id": pad}
            out: Tensor = self.adapter.model.generate(**inputs, **answers)
            return out[:, inputs["input_ids"].shape[1] :]

        parts = self._packed(kept, work, cache=True)
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
        if not bool((self.labels[:, 1:] != -100).any()):
            raise UnsupportedCallError("the caption is empty: labels are -100 on every token that could be predicted")
        span = label_span(self.labels)

        def work(pack: Sequence[Selection]) -> Tensor:
            logits, labels = self.prefill(pack, span)
            return caption_ce(logits, labels[:, -span:])

        return torch.cat(self._packed(kept, work, positions=span))

    @property
    def labels(self) -> Tensor:
        """Labels (1, L) of the prompt without padding."""
        labels: Tensor = self.encoded.rest["labels"]
        return labels[:, self.encoded.attention_mask[0]]

    def _packed(
        self,
        kept: Tensor | Sequence[Selection],
        work: Callable[[Sequence[Selection]], Tensor],
        positions: int = 1,
        cache: bool = False,
    ) -> list[Tensor]:
        """Return the results of `work` on the selections or keep-masks, one tensor a prefill."""
        selections = [Selection(mask_to_indices(mask)) for mask in kept] if isinstance(kept, Tensor) else list(kept)
        text = int(self.encoded.attention_mask.sum()) - self.num_tokens
        length = text + max(selection.num_kept for selection in selections)
        return self.packing.run(selections, work, length, positions, cache)
