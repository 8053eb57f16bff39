"""A batch whose videos are encoded and located."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from vidsieve.errors import PromptError
from vidsieve.types import EncoderOutputs, Selection, TokenGrid


def kept_newlines(indices: Tensor, count: int, grid: TokenGrid, per_row: bool) -> Tensor:
    """Return a mask (count,) bool of the newlines that stay with grid tokens `indices` (K,)."""
    keep = torch.full((count,), not per_row, dtype=torch.bool, device=indices.device)
    if per_row:
        keep[indices // grid.width] = True
    return keep


@dataclass(frozen=True)
class VideoFeatures:
    """One encoded video: grid tokens (N, D), and tokens outside the grid (E, D), the newlines.

    `deep` are further features of the grid tokens, (N, D) each, which the model adds inside its first layers;
    `encoder` holds signals of the vision encoder where a method needs them. Where `per_row` is set, one newline closes
    each row of the grid (E = T·H) and stays where its row keeps a token; otherwise newlines follow the whole video and
    always stay. `surplus` placeholders of the prompt stand for nothing: they are left out.

    Of a video whose frames were merged inside the encoder, `grid` counts those that are left; `frames` (T',) int64 are
    the frames of `whole`, the grid that the prompt has placeholders for, that they stand for. `encoded` is the number
    of frames that went through the encoder, where a method before it decided.
    """

    embeds: Tensor
    grid: TokenGrid
    tail: Tensor
    deep: tuple[Tensor, ...] = ()
    encoder: EncoderOutputs | None = None
    per_row: bool = False
    surplus: int = 0
    frames: Tensor | None = None
    whole: TokenGrid | None = None
    encoded: int | None = None

    def at_frames(self, frames: Tensor) -> VideoFeatures:
        """Return the video of `frames` (T',) int64, numbers among the T of this one, in their order.

        Newlines that follow the whole video are as they were.
        """

        def taken(rows: Tensor) -> Tensor:
            return rows.reshape(self.grid.frames, -1, rows.shape[-1])[frames.to(rows.device)].flatten(0, 1)

        signals = self.encoder
        if signals is not None:
            attention = None if signals.attention is None else taken(signals.attention[:, None])[:, 0]
            signals = EncoderOutputs(attention, None if signals.keys is None else taken(signals.keys))
        return replace(
            self,
            embeds=taken(self.embeds),
            grid=replace(self.grid, frames=len(frames)),
            tail=taken(self.tail) if self.per_row else self.tail,
            deep=tuple(map(taken, self.deep)),
            encoder=signals,
        )

    @property
    def prompted(self) -> TokenGrid:
        """The grid that the prompt has placeholders for."""
        return self.whole or self.grid

    def kept_tail(self, indices: Tensor) -> Tensor:
        """Return a mask (E,) bool of the tail tokens that stay with grid tokens `indices` (K,)."""
        return kept_newlines(indices, len(self.tail), self.grid, self.per_row)


@dataclass(frozen=True)
class VideoSpan:
    """Position of one video in a batch: its row and the columns of its grid tokens (N,), tail (E,) and surplus (S,)."""

    row: int
    columns: Tensor
    tail_columns: Tensor
    features: VideoFeatures
    surplus_columns: Tensor


@dataclass(frozen=True)
class ImageSpan:
    """Still images of one prompt, never pruned: row, columns (M,), features (M, D), deep features (M, D) each."""

    row: int
    columns: Tensor
    embeds: Tensor
    deep: tuple[Tensor, ...] = ()


@dataclass(frozen=True)
class Encoded:
    """A batch whose videos went through the vision encoder once.

    Parameters
    ----------
    input_ids, attention_mask : Tensor, (B, L), int64 and bool
    positions : Tensor, (rows, B, L), int64
        As the model takes them (1 row, or text, temporal, height and width).
    videos : tuple of VideoSpan
        In placeholder order.
    rest : dict
        Arguments of the call that have nothing to do with videos.
    images : tuple of ImageSpan
        At most one per prompt.
    """

    input_ids: Tensor
    attention_mask: Tensor
    positions: Tensor
    videos: tuple[VideoSpan, ...]
    rest: dict[str, Any] = field(default_factory=dict)
    images: tuple[ImageSpan, ...] = ()

    def of_row(self, row: int) -> list[int]:
        """Return the numbers of the videos in one prompt of the batch."""
        return [i for i, video in enumerate(self.videos) if video.row == row]

    def per_row(self, selections: Sequence[Selection]) -> list[list[Selection]]:
        """Return selections, one a video, by the prompts of the batch, as `Adapter.build` takes them."""
        return [[selections[i] for i in self.of_row(row)] for row in range(self.input_ids.shape[0])]

    def everything(self) -> list[Selection]:
        """Return for each video the selection that keeps all of its tokens."""
        return [Selection(torch.arange(v.features.grid.num_tokens, device=v.columns.device)) for v in self.videos]

    def with_signals(self, video: VideoFeatures) -> Encoded:
        """Return the batch with what the encoder told of one video, which all of its prompts are about."""
        told = (replace(v.features, encoder=video.encoder, encoded=video.encoded) for v in self.videos)
        videos = (replace(v, features=features) for v, features in zip(self.videos, told, strict=True))
        return replace(self, videos=tuple(videos))


def stacked(prompts: Sequence[Encoded]) -> Encoded:
    """Return prompts (1, L) that were encoded one by one as one batch (B, L), padded on the left.

    Raises
    ------
    PromptError
        If a prompt has further arguments, which nothing says how to join.
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
        for span in prompt.videos:
            columns = {name: getattr(span, name) + shift for name in ("columns", "tail_columns", "surplus_columns")}
            videos.append(replace(span, row=row, **columns))
        images += [replace(image, row=row, columns=image.columns + shift) for image in prompt.images]

    def joined(parts: Iterable[Tensor], dim: int) -> Tensor:
        return torch.cat([pad(part, (length - part.shape[-1], 0)) for part in parts], dim)

    return Encoded(
        joined((prompt.input_ids for prompt in prompts), 0),
        joined((prompt.attention_mask for prompt in prompts), 0),
        joined((prompt.positions for prompt in prompts), 1),
        tuple(videos),
        {},
        tuple(images),
    )


def on_device(inputs: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """Return a processor's outputs with their tensors on `device`; ready features stay where they are."""
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in inputs.items()}
