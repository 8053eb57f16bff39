"""Training prompts: questions and captions with the model's inputs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from vidsieve.training.data.rows import Kind


@dataclass(frozen=True)
class Caption:
    """A video with its caption.

    Parameters
    ----------
    inputs : mapping
        Processor outputs of prompt and caption, ``labels`` on the caption only.
    key : str
        Different for each row of the data, the same in every pass; empty where there is none.
    """

    inputs: Mapping[str, Any]
    key: str = ""


@dataclass(frozen=True)
class Choice:
    """A question about one video, with options or without.

    Parameters
    ----------
    inputs : mapping
        Processor outputs of one prompt, ending where the answer begins.
    option_ids : Tensor, (options,), int64
        The next token under each option: its letter, or its word. Empty for a question without options.
    answer : int
        The number of the right option; −1 without options.
    truth : str
        The right answer as text: letter or word of the right option, a number, …
    kind : str
        How a generated answer is judged.
    targets : Tensor, (tokens,), int64, optional
        Video tokens that the question is about, where they are known.
    caption : Caption, optional
        A caption of the same video, where it is wanted; its inputs may lack the video.
    """

    inputs: Mapping[str, Any]
    option_ids: Tensor
    answer: int
    truth: str = ""
    kind: Kind = "multiple choice"
    targets: Tensor | None = None
    caption: Caption | None = None
