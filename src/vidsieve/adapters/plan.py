"""A batch of prompts as the LLM reads it under a method, and the one way to run it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from vidsieve.adapters.inside.hooks import InnerRun
from vidsieve.adapters.trace import VideoTrace
from vidsieve.types import Selection


@dataclass(frozen=True)
class Plan:
    """Inputs of the unmodified model, and the method that acts while it runs on them.

    ``with plan.acting(): model(**plan.inputs)`` is the same for methods before the LLM, inside it and while decoding.

    Parameters
    ----------
    inputs : dict
        Arguments for `model.generate` or `model.forward`.
    kept_positions : Tensor, (B', L'), int64
        The column of the unpruned prompt behind each column; −1 on padding.
    selections : tuple of Selection
        Of each video, the tokens that enter the LLM; empty for plans of `Adapter.build`.
    selected : tuple of VideoTrace
        Traces of the selections made before the LLM.
    run : LayerRun, DecodeRun or None
        The part of the method inside the LLM.
    """

    inputs: dict[str, Any]
    kept_positions: Tensor
    selections: tuple[Selection, ...] = ()
    selected: tuple[VideoTrace, ...] = ()
    run: InnerRun | None = None
    _acting: Callable[..., AbstractContextManager[None]] | None = None

    def acting(self, cache: Any = None) -> AbstractContextManager[None]:
        """Let the method act inside the LLM while a block runs the model, on `cache` if the call is given one."""
        return nullcontext() if self._acting is None else self._acting(self.run, cache)

    @property
    def traces(self) -> tuple[VideoTrace, ...]:
        """Traces of each video; of a method with a part inside the LLM after it has run."""
        return self.selected if self.run is None else tuple(self.run.traces())

    @property
    def prompt_tokens(self) -> list[int]:
        """Tokens of each prompt that enter the LLM, padding not counted."""
        counts: list[int] = (self.kept_positions >= 0).sum(1).tolist()
        return counts
