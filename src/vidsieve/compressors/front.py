"""Methods before and inside the vision encoder: which frames it encodes, and which it merges between its blocks."""

from __future__ import annotations

from abc import ABC, abstractmethod
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


class EncoderFront(Front):
    """Base of methods that merge whole frames between blocks of the vision encoder.

    Budgets count the tokens of all frames, not of those that are left.
    """

    stage: ClassVar[Stage] = Stage.ENCODER

    @abstractmethod
    def step(self, block: int, depth: int, hidden: Tensor) -> tuple[Tensor, Tensor] | None:
        """Return the frames that go on after a block; None: all of them, as they are.

        It is called for one video after each block but the last that the projector reads.

        Parameters
        ----------
        block, depth : int
            The block's number, from 0 on, and the number of blocks.
        hidden : Tensor, (F, S, d), floating
            The block's output for the frames that are left.

        Returns
        -------
        Tensor, (F', S, d)
            Hidden states of F' ≤ F frames.
        Tensor, (F',), int64
            The number among the F of the frame that each stands for, sorted, unique.
        """
