"""The tensors that adapters hand to compressors and get back: one video at a time, no batch axis.

Letters used in shapes: N video tokens in LLM width D on a grid T×H×W; L prompt length; K tokens kept;
P position rows (1, or 3 for temporal, height and width).
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor

from vidsieve.errors import SelectionError, UnsupportedCallError
from vidsieve.retention import Tokens as Tokens


class Stage(Enum):
    """Where a method acts."""

    FRAME = "before the vision encoder"
    ENCODER = "inside the vision encoder"
    PRE_LLM = "before the LLM"
    LAYER = "inside LLM layers"
    DECODE = "while decoding"


class Need(Enum):
    """A signal beyond the video tokens that a method needs from the adapter."""

    QUESTION = "the prompt's embeddings and the mask of its question"
    ENCODER_ATTENTION = "attention inside the vision encoder"
    ENCODER_KEYS = "attention keys of the vision encoder"
    LAYER_ATTENTION = "attention inside an LLM layer"


ENCODER_NEEDS = frozenset({Need.ENCODER_ATTENTION, Need.ENCODER_KEYS})
"""Signals that are recorded while the vision encoder runs."""

READS_QUESTION = frozenset({Need.QUESTION, Need.LAYER_ATTENTION})
"""Needs that depend on the question."""


@dataclass(frozen=True)
class TokenGrid:
    """A video's token grid: `frames` × `height` × `width`, counted in LLM tokens, raster order.

    Where the model itself prunes videos, `places` are the raster indices of the tokens that it left, ascending; its
    frames then have unequal numbers of tokens. None: every token is there.
    """

    frames: int
    height: int
    width: int
    places: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if min(self.frames, self.height, self.width) < 1:
            raise SelectionError(f"a token grid needs positive sides, got {self}")
        if self.places == ():
            raise SelectionError(f"the model's own pruning left no token of a video of {self}")

    @property
    def whole(self) -> TokenGrid:
        """The grid with every token."""
        return TokenGrid(self.frames, self.height, self.width)

    @property
    def per_frame(self) -> int:
        """Tokens in one frame.

        Raises
        ------
        UnsupportedCallError
            If frames have unequal numbers.
        """
        if self.places is not None:
            raise UnsupportedCallError(
                f"the model's own pruning left {len(self.places)} tokens of a video of {self.whole}, and the method "
                "reads whole frames: switch that pruning off in the processor (use_token_compression=False), or choose "
                "a method that reads single tokens, as divprune"
            )
        return self.height * self.width

    @property
    def num_tokens(self) -> int:
        """Tokens in all frames."""
        return self.frames * self.per_frame if self.places is None else len(self.places)

    def __str__(self) -> str:
        left = "" if self.places is None else f", {len(self.places)} of them left by the model"
        return f"{self.frames}×{self.height}×{self.width}{left}"


@dataclass(frozen=True)
class Prompt:
    """The prompt around one video, padding removed.

    Parameters
    ----------
    embeds : Tensor, (L, D), floating
        Input embeddings of the whole prompt, video features in place.
    positions : Tensor, (P, L), int64
        Position ids as the LLM gets them.
    video_mask : Tensor, (L,), bool
        True on the N tokens of this video's grid (a newline token is not part of the grid).
    question_mask : Tensor, (L,), bool
        True on the question: the text of the last user turn, options included, without template tokens and words
        between a video's frames.
    """

    embeds: Tensor
    positions: Tensor
    video_mask: Tensor
    question_mask: Tensor

    def __post_init__(self) -> None:
        length = self.embeds.shape[0]
        if self.embeds.ndim != 2 or self.positions.ndim != 2 or self.positions.shape[1] != length:
            raise SelectionError(
                f"a prompt needs embeds (L, D) and positions (P, L), got {tuple(self.embeds.shape)} "
                f"and {tuple(self.positions.shape)}"
            )
        for name in ("video_mask", "question_mask"):
            mask = getattr(self, name)
            if mask.shape != (length,) or mask.dtype != torch.bool:
                raise SelectionError(f"{name} must be ({length},) bool, got {tuple(mask.shape)} {mask.dtype}")


@dataclass(frozen=True)
class EncoderOutputs:
    """Signals of the vision encoder, pooled to the LLM grid exactly as the features are.

    Parameters
    ----------
    attention : Tensor or None, (N,), float32
        Attention each video token receives in the encoder.
    keys : Tensor or None, (N, D_k), floating
        Attention keys of each video token.
    segments : Tensor or None, (T,), int64
        Number of each frame's segment, rising from 0, where a method merged frames inside the encoder.
    """

    attention: Tensor | None = None
    keys: Tensor | None = None
    segments: Tensor | None = None


@dataclass(frozen=True)
class VideoTokens:
    """One video as the LLM would read it.

    Parameters
    ----------
    embeds : Tensor, (N, D), floating
        Video tokens after projector and pooling, in raster order (frame, row, column).
    grid : TokenGrid
        With ``grid.num_tokens == N``.
    positions : Tensor, (P, N), int64
        Position ids of the tokens in the unpruned prompt; float32 in families whose times are fractions.
    prompt : Prompt or None
        Given to methods that need `Need.QUESTION`.
    encoder : EncoderOutputs or None
        Given to methods that need signals of the vision encoder.
    whole : TokenGrid or None
        Where the encoder merged frames: the video's grid with all of them, whose tokens budgets count.

    Raises
    ------
    SelectionError
        If the shapes or dtypes disagree, or a token has a value that is no finite number.
    """

    embeds: Tensor
    grid: TokenGrid
    positions: Tensor
    prompt: Prompt | None = None
    encoder: EncoderOutputs | None = None
    whole: TokenGrid | None = None

    def __post_init__(self) -> None:
        if self.embeds.ndim != 2 or not self.embeds.is_floating_point():
            raise SelectionError(f"embeds must be (N, D) floating, got {tuple(self.embeds.shape)} {self.embeds.dtype}")
        if self.embeds.shape[0] != self.grid.num_tokens:
            raise SelectionError(f"{self.embeds.shape[0]} tokens do not fill a grid of {self.grid}")
        if self.positions.ndim != 2 or self.positions.shape[1] != self.embeds.shape[0]:
            raise SelectionError(f"positions must be (P, N), got {tuple(self.positions.shape)}")
        if self.positions.dtype not in (torch.int64, torch.float32):
            raise SelectionError(f"positions must be int64 or float32, got {self.positions.dtype}")
        # Two numbers say it in a tenth of the time that a mask takes; NaN spreads to them.
        if not bool(torch.stack(torch.aminmax(self.embeds.detach())).isfinite().all()):
            row = int((~self.embeds.isfinite()).any(1).nonzero()[0])
            place = row if self.grid.places is None else self.grid.places[row]
            frame = place // self.grid.whole.per_frame
            raise SelectionError(
                f"token {row} of the video, in frame {frame} of {self.grid.frames}, has values that are no finite "
                "numbers: load the model in bfloat16 or float32 if its vision encoder overflows in float16"
            )

    @property
    def num_tokens(self) -> int:
        """N."""
        return self.grid.num_tokens

    @property
    def counted_tokens(self) -> int:
        """The number of tokens that a retention is a fraction of: N, and those of frames that the encoder merged."""
        return (self.whole or self.grid).num_tokens


@dataclass(frozen=True)
class Selection:
    """The tokens that a compressor keeps of one video.

    Parameters
    ----------
    indices : Tensor, (K,), int64
        Kept tokens as raster indices, or as numbers among `TokenGrid.places`, sorted, unique.
    embeds : Tensor or None, (K, D)
        Given by methods that merge: the merged tokens, each at the index of its anchor.
    scores : Tensor or None, (N,), float32
        Higher = keep.
    frame_scores : Tensor or None, (T,), float32
        Higher = more of the budget.
    groups : Tensor or None, (K,), int64
        Number of the method's own group that each kept token belongs to, for its part inside the LLM.

    Raises
    ------
    SelectionError
        If `indices` is not sorted, unique int64, or `embeds` does not match it.
    """

    indices: Tensor
    embeds: Tensor | None = None
    scores: Tensor | None = None
    frame_scores: Tensor | None = None
    groups: Tensor | None = None

    def __post_init__(self) -> None:
        check_indices(self.indices, self.embeds)

    @property
    def num_kept(self) -> int:
        """K."""
        return int(self.indices.shape[0])


def check_indices(indices: Tensor, rows: Tensor | None) -> None:
    """Raise SelectionError unless `indices` (K,) are sorted, unique int64 and `rows`, if given, are (K, D)."""
    if indices.ndim != 1 or indices.dtype != torch.int64:
        raise SelectionError(f"indices must be (K,) int64, got {tuple(indices.shape)} {indices.dtype}")
    if indices.numel() == 0:
        raise SelectionError("a selection keeps at least one token")
    if not bool((indices[1:] > indices[:-1]).all()):
        raise SelectionError("indices must be sorted and unique")
    if int(indices[0]) < 0:
        raise SelectionError(f"indices must not be negative, got {int(indices[0])}")
    if rows is not None and (rows.ndim != 2 or rows.shape[0] != indices.shape[0]):
        raise SelectionError(f"{indices.shape[0]} indices need embeds (K, D), got {tuple(rows.shape)}")
