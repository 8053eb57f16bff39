"""What answers a group of rows: every prompt encoded and pruned by itself, then one call of the LLM for all of them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Generator, Tensor
from torch.nn.functional import pad

from vidsieve.adapters.encoded import Encoded, on_device
from vidsieve.adapters.pruning import adapter_for
from vidsieve.adapters.trace import VideoTrace
from vidsieve.answering import chat
from vidsieve.errors import PromptError, VidsieveError
from vidsieve.loading import load_model
from vidsieve.serving.batching.rows import BatchError, BatchRow, Outcome
from vidsieve.serving.batching.settings import BatchSettings, Frames, reason
from vidsieve.types import Selection
from vidsieve.video.reading import Video

Made = TypeVar("Made")


@dataclass(frozen=True)
class Ready:
    """A prompt that the LLM can read: its row, how many frames it shows, its video tokens, and what is kept of them."""

    row: BatchRow
    frames: int
    encoded: Encoded
    selected: tuple[list[Selection], list[VideoTrace]]

    @property
    def total(self) -> int:
        """Tokens of its video."""
        return sum(span.features.grid.num_tokens for span in self.encoded.videos)


class Answerer:
    """A model and a method that answer groups of rows.

    Raises
    ------
    ModelError, UnsupportedModelError, UnknownNameError, PolicyError
        If they cannot be had.
    StageError, NeedError, PolicyMismatchError
        If the model cannot serve the method.
    """

    def __init__(self, settings: BatchSettings) -> None:
        self.settings, self.method = settings, settings.compressor()
        model, self.processor = load_model(settings.model, settings.layout, device=settings.device)
        self.adapter = adapter_for(model)
        if self.method is not None:
            self.adapter.check(self.method)
        self.window = int(getattr(model.config.get_text_config(), "max_position_embeddings", 0) or 0)

    @torch.no_grad()
    def __call__(self, read: Iterable[tuple[BatchRow, Frames]]) -> list[Outcome]:
        """Return what becomes of each row of a group; a video is let go of when its prompt is encoded.

        Raises
        ------
        BatchError
            If the device is out of memory, or lost.
        """
        prompts = list(self._prompts(read))
        answers = iter(self._answers([made for _, made in prompts if isinstance(made, Ready)]))
        return [next(answers) if isinstance(made, Ready) else row.failed(made) for row, made in prompts]

    def _prompts(self, read: Iterable[tuple[BatchRow, Frames]]) -> Iterator[tuple[BatchRow, Ready | str]]:
        for row, video in read:
            yield row, self._prompt(row, video)

    def _prompt(self, row: BatchRow, video: Frames) -> Ready | str:
        return video if isinstance(video, str) else _tried(lambda: self._ready(row, video))

    def _ready(self, row: BatchRow, video: Video) -> Ready:
        device, method = self.adapter.device, self.method
        inputs = on_device(chat(self.processor, video, row.prompt), device)
        encoded = self.adapter.encode(inputs, needs=frozenset() if method is None else method.needs)
        reach = int(encoded.positions.max()) + 1 + self.settings.max_new_tokens
        if 0 < self.window < reach:
            raise PromptError(
                f"prompt and answer reach position {reach}, and the model knows {self.window}: take fewer frames"
            )
        selected = self.adapter.select(encoded, method, self._drawing(row))
        return Ready(row, len(video.pixels), encoded, selected)

    def _drawing(self, row: BatchRow) -> Generator:
        """Return a row's own generator: what is drawn for it does not depend on the rows before."""
        drawn = hashlib.blake2b(f"{self.settings.seed} {row.line}".encode(), digest_size=4).digest()
        return Generator().manual_seed(int.from_bytes(drawn, "little"))

    def _answers(self, ready: Sequence[Ready]) -> list[Outcome]:
        if not ready:
            return []
        said = _tried(lambda: self._said(ready))
        if isinstance(said, list):
            return said
        if len(ready) == 1:
            return [ready[0].row.failed(said)]
        return [outcome for one in ready for outcome in self._answers([one])]  # one of them is to blame

    def _said(self, ready: Sequence[Ready]) -> list[Outcome]:
        encoded = stacked([one.encoded for one in ready])
        selected = [s for one in ready for s in one.selected[0]], [t for one in ready for t in one.selected[1]]
        plan = self.adapter.plan(encoded, self.method, selected=selected)
        with plan.acting():
            out = self.adapter.model.generate(
                **plan.inputs, max_new_tokens=self.settings.max_new_tokens, do_sample=False
            )
        traces = plan.traces
        kept = [trace.kept for trace in traces] if traces else [s.num_kept for s in plan.selections]
        texts = self.processor.batch_decode(out[:, plan.kept_positions.shape[1] :], skip_special_tokens=True)
        read = plan.prompt_tokens
        return [
            one.row.answered(text.strip(), kept=left, total=one.total, prompt_tokens=tokens, frames=one.frames)
            for one, text, left, tokens in zip(ready, texts, kept, read, strict=True)
        ]


def stacked(prompts: Sequence[Encoded]) -> Encoded:
    """Return prompts (1, L) that were encoded one by one as one batch (B, L), padded on the left.

    Raises
    ------
    PromptError
        If a prompt comes with further arguments, of which nothing tells how they go together.
    """
    if len(prompts) == 1:
        return prompts[0]
    further = sorted({name for prompt in prompts for name in prompt.rest})
    if further:
        raise PromptError(f"prompts with {', '.join(further)} are answered one by one")
    length = max(prompt.input_ids.shape[1] for prompt in prompts)
    videos, images = [], []
    for row, prompt in enumerate(prompts):
        shift = length - prompt.input_ids.shape[1]
        videos += [
            replace(
                span,
                row=row,
                columns=span.columns + shift,
                tail_columns=span.tail_columns + shift,
                surplus_columns=span.surplus_columns + shift,
            )
            for span in prompt.videos
        ]
        images += [replace(image, row=row, columns=image.columns + shift) for image in prompt.images]

    def joined(parts: Iterable[Tensor], dim: int) -> Tensor:
        return torch.cat([pad(part, (length - part.shape[-1], 0)) for part in parts], dim)

    return Encoded(
        joined((p.input_ids for p in prompts), 0),
        joined((p.attention_mask for p in prompts), 0),
        joined((p.positions for p in prompts), 1),
        tuple(videos),
        {},
        tuple(images),
    )


def _tried(work: Callable[[], Made]) -> Made | str:
    """Return what some work gives, or why it failed for its rows alone.

    Raises
    ------
    BatchError
        If others would fail alike: the device is out of memory, or lost.
    """
    try:
        return work()
    except MemoryError as error:
        raise BatchError(_OUT_OF_MEMORY) from error
    except (VidsieveError, ValueError, RuntimeError) as error:
        said = reason(error)
        if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in said:
            raise BatchError(_OUT_OF_MEMORY) from error
        if isinstance(error, _LOST) or "CUDA error" in said or "device-side assert" in said:
            raise BatchError(f"the device failed ({said[:200]}): what was answered is in the journal") from error
        return said


# Newer than the oldest torch that is supported.
_LOST: tuple[type[BaseException], ...] = tuple(filter(None, [getattr(torch, "AcceleratorError", None)]))
_OUT_OF_MEMORY = (
    "out of memory: what was answered is in the journal; another output with fewer --frames, a smaller --batch or a "
    "lower --retention takes less"
)
