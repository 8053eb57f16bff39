"""What a training prompt is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Choice:
    """A multiple-choice prompt with one video.

    Parameters
    ----------
    inputs : mapping
        Processor outputs of one prompt, ending where the answer begins.
    option_ids : Tensor, (options,), int64
        The next token under each option: its letter, or its word.
    answer : int
        The number of the right option.
    """

    inputs: Mapping[str, Any]
    option_ids: Tensor
    answer: int


@dataclass(frozen=True)
class Caption:
    """A video with its caption: processor outputs of prompt and caption, ``labels`` on the caption only."""

    inputs: Mapping[str, Any]
