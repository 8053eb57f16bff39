"""Methods before and inside the vision encoder: which frames it encodes, and which it merges between its blocks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from vidsieve.types import Stage


class Front(ABC):
    """Base of what acts before the vision encoder's output; a `Compressor` hands its own over as `front`."""

    name: ClassVar[str]
    stage: ClassVar[Stage]


class FrameFront(Front):
    """Base of methods that decide from the pixels which frames go through the vision encoder.

    A frame is what the encoder sees by itself: one picture, or the pictures of one temporal step.
    """

    stage: ClassVar[Stage] = Stage.FRAME

    @abstractmethod
    def sources(self, frames: Tensor) -> Tensor:
        """Return for each frame the one whose tokens it takes, (T,) int64: itself where it is encoded.

        Parameters
        ----------
        frames : Tensor, (T, C, V), floating
            The V preprocessed pixel values of each of the C cells of a frame.
        """


@dataclass(frozen=True)
class EncoderView:
    """One video after a block of the vision encoder.

    Parameters
    ----------
    block, depth : int
        The block's number, from 0 on, and the number of blocks.
    hidden : Tensor, (F, S, d), floating
        The block's output for the frames that are left.
    frames : int
        T, the number of frames of the video.
    per_frame : int
        The number of LLM tokens that a frame becomes.
    layers : int
        The number of layers of the LLM.
    attention : Tensor or None, (F, S'), float32
        The attention that each of the S' patches receives in the block that `EncoderFront.listens` names.
    """

    block: int
    depth: int
    hidden: Tensor
    frames: int
    per_frame: int
    layers: int
    attention: Tensor | None = None


@dataclass(frozen=True)
class Merged:
    """The frames that go on after a block.

    Parameters
    ----------
    hidden : Tensor, (F', S, d)
        Hidden states of F' ≤ F frames.
    frames : Tensor, (F',), int64
        The number among the F of the frame that each stands for, sorted, unique.
    attention : Tensor or None, (F', S'), float32
        What becomes `EncoderOutputs.attention`, after the last merging; None: what the encoder's last block gives.
    segments : Tensor or None, (F',), int64
        What becomes `EncoderOutputs.segments`, with `attention`.
    """

    hidden: Tensor
    frames: Tensor
    attention: Tensor | None = None
    segments: Tensor | None = None


class EncoderFront(Front):
    """Base of methods that merge whole frames between blocks of the vision encoder.

    Budgets count the tokens of all frames, not of those that are left.
    """

    stage: ClassVar[Stage] = Stage.ENCODER

    def listens(self, depth: int) -> int | None:
        """Return the block of `depth` whose attention `step` reads, and hands on; None: it reads none."""
        return None

    @abstractmethod
    def step(self, view: EncoderView) -> Merged | None:
        """Return the frames that go on after a block; None: all of them, as they are.

        It is called for one video after each block but the last that the projector reads.
        """
