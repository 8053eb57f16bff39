"""Two methods in a row under one budget: the first before the LLM, the second inside it or while decoding."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, Self

from torch import Generator, Tensor

from vidsieve.compressors.base import Compressor
from vidsieve.compressors.inside import (
    DecodeCompressor,
    DecodeView,
    InnerCompressor,
    LayerChoice,
    LayerCompressor,
    LayerView,
)
from vidsieve.errors import BudgetError, StageError
from vidsieve.types import Need, Selection, Stage, Tokens, VideoTokens


def Pipeline(first: Compressor, second: Compressor, retention: float | Tokens) -> Compressor:
    """Return a method that runs `first` before the LLM and `second` on the tokens it kept, under one total budget.

    Parameters
    ----------
    first : Compressor
        Acts before the LLM, at its own retention.
    second : Compressor
        Acts inside the LLM, with no part before it, or while decoding. Its retention (while decoding: its share of
        cached tokens that are read) is computed from the total.
    retention : float or Tokens
        Mean over layers of the tokens that they see; where `second` acts while decoding, of the tokens that its layers
        read at a step. A ratio or a count, like `first`'s.

    Raises
    ------
    StageError
        If one of them does not act where it must.
    BudgetError
        If the total is more than `first` keeps, or one is a ratio and the other a count.
    """
    if first.acts is not Stage.PRE_LLM:
        raise StageError(f"the first of two methods acts before the LLM, {first.name} acts {first.acts.value}")
    if isinstance(second, LayerCompressor) and second.acts is Stage.LAYER:
        if second.outer(28) is not None:
            raise StageError(f"{second.name} has a part before the LLM itself: attach it alone")
        return LayerPipeline(retention, first=first, second=second)
    if isinstance(second, DecodeCompressor) and second.acts is Stage.DECODE:
        return DecodePipeline(retention, first=first, second=second)
    raise StageError(
        f"the second of two methods acts inside the LLM or while decoding, {second.name} acts {second.acts.value}"
    )


def _left(first: Compressor, retention: float | Tokens) -> float:
    """Return the share of the tokens kept by `first` that a total allows."""
    whole = first.retention
    if isinstance(whole, Tokens) is not isinstance(retention, Tokens):
        raise BudgetError(f"give both budgets as ratios or both as Tokens, got {whole} and {retention}")
    shares = [Fraction(r.count) if isinstance(r, Tokens) else Fraction(repr(float(r))) for r in (retention, whole)]
    share = shares[0] / shares[1]
    if share > 1:
        raise BudgetError(f"the total of {retention} is more than {first.describe()} keeps: ask for {whole} at most")
    return float(share)


class _Delegating:
    """Properties that two methods in a row derive from each; a mixin before the base class of the second."""

    first: Compressor
    second: InnerCompressor

    @property
    def name(self) -> str:
        """Both names."""
        return f"{self.first.name}+{self.second.name}"

    @property
    def paper(self) -> str:
        """Both papers."""
        return f"{self.first.paper}; {self.second.paper}"

    @property
    def needs(self) -> frozenset[Need]:
        """Needs of both."""
        return self.first.needs | self.second.needs

    @property
    def lookback(self) -> int:
        """The second's."""
        return self.second.lookback

    @property
    def policy(self) -> Any:
        """The first's policy, if it is a trained one."""
        return getattr(self.first, "policy", None)


@dataclass(frozen=True)
class LayerPipeline(_Delegating, LayerCompressor):  # type: ignore[override]
    """A method before the LLM, then one that drops inside it; built by `Pipeline`."""

    first: Compressor = field(kw_only=True)
    second: LayerCompressor = field(kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "second", self.second.with_retention(_left(self.first, self.retention)))

    def outer(self, num_layers: int) -> Compressor:
        """Return the first method."""
        return self.first

    def fitted(self, cuts: tuple[int, ...] | None) -> Self:
        """Return the same with the second fitted."""
        method = super().fitted(cuts)
        object.__setattr__(method, "second", self.second.fitted(cuts))
        return method

    def stages(self, num_layers: int, num_tokens: int) -> tuple[tuple[int, int], ...]:
        """Return the second's stages for the tokens that the first leaves."""
        return self.second.stages(num_layers, num_tokens)

    def step(self, view: LayerView, keep: int) -> LayerChoice:
        """Return the second's choice."""
        return self.second.step(view, keep)


@dataclass(frozen=True)
class DecodePipeline(_Delegating, DecodeCompressor):  # type: ignore[override]
    """A method before the LLM, then one that reads fewer cached tokens while decoding; built by `Pipeline`."""

    first: Compressor = field(kw_only=True)
    second: DecodeCompressor = field(kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not hasattr(self.second, "dropped"):
            raise StageError(f"{self.second.name} has no share of cached tokens (a field `dropped`) to set")
        dropped = 1 - _left(self.first, self.retention)
        object.__setattr__(self, "second", dataclasses.replace(self.second, dropped=dropped))  # type: ignore[call-arg]

    @property
    def adaptive_budget(self) -> bool:
        """The first's."""
        return self.first.adaptive_budget

    def budget(self, video: VideoTokens) -> int:
        """Return the number that the first keeps; the total counts tokens that are read."""
        return self.first.budget(video)

    def _select(self, video: VideoTokens, budget: int, generator: Generator) -> Selection:
        return self.first.compress(video, generator=generator)

    def fitted(self, cuts: tuple[int, ...] | None) -> Self:
        """Return the same with the second fitted."""
        method = super().fitted(cuts)
        object.__setattr__(method, "second", self.second.fitted(cuts))
        return method

    def first_layer(self, num_layers: int) -> int:
        """Return the second's first layer."""
        return self.second.first_layer(num_layers)

    def read(self, view: DecodeView, before: DecodeView | None) -> Tensor | None:
        """Return the second's choice."""
        return self.second.read(view, before)
