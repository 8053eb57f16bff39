"""Two methods in a row: one before the vision encoder's output, before the LLM, inside it or while decoding."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, ClassVar, Self

from torch import Generator, Tensor

from vidsieve.compressors.base import Compressor
from vidsieve.compressors.front import Front
from vidsieve.compressors.inside import (
    DecodeCompressor,
    DecodeView,
    InnerCompressor,
    LayerChoice,
    LayerCompressor,
    LayerView,
)
from vidsieve.errors import BudgetError, StageError, UnsupportedCallError
from vidsieve.retention import Calibration
from vidsieve.types import Need, Selection, Stage, Tokens, VideoTokens


def Pipeline(
    first: Compressor | Front, second: Compressor | None = None, retention: float | Tokens | None = None
) -> Compressor:
    """Return a method that runs `first` and then `second` on what it kept, under one total budget.

    Parameters
    ----------
    first : Compressor or Front
        Acts before the LLM, at its own retention; or, as `Reuse`, before or inside the vision encoder.
    second : Compressor, optional
        After a `Front` any method, at the total; None keeps all tokens. After a `Compressor` one that acts inside the
        LLM, with no part before it, or while decoding: its retention (while decoding: its share of cached tokens that
        are read) is computed from the total.
    retention : float or Tokens, optional
        Mean over layers of the tokens that they see; where `second` acts while decoding, of the tokens that its layers
        read at a step. A ratio or a count, like `first`'s. None: behind a `Front` the budget of `second`.

    Raises
    ------
    StageError
        If one of them does not act where it must, or there are two before the vision encoder's output.
    UnsupportedCallError
        If one of them is no method.
    BudgetError
        If the total is not given or more than `first` keeps, one is a ratio and the other a count, or one is
        calibrated.
    """
    for part in (first, second):
        if not isinstance(part, Compressor | Front | None):
            raise UnsupportedCallError(f"a pipeline is made of methods, got {part!r}: make one with vidsieve.load")
        if isinstance(part, Compressor) and isinstance(part.budget_asked, Calibration):
            raise BudgetError(
                f"the bound of a calibrated retention covers {part.name} alone, not a pipeline with it: attach it "
                "alone, or give a ratio"
            )
    if isinstance(second, Front):
        raise StageError(f"{second.name} acts {second.stage.value}: it comes first, Pipeline({second.name}, method)")
    if isinstance(first, Front):
        method = AllTokens() if second is None else second
        method = method if retention is None else method.with_retention(retention)
        if method.front is not None:
            raise StageError(f"{method.front.name} acts {method.front.stage.value} already: leave {first.name} out")
        return dataclasses.replace(method, ahead=first)
    if second is None:
        raise StageError(f"{first.name} acts alone: attach it without a pipeline")
    if retention is None:
        raise BudgetError(
            f"two methods share one budget: give the retention of {first.name} and {second.name} together"
        )
    if first.front is not None and second.front is not None:
        raise StageError(f"both methods bring one before the encoder's output: leave {second.front.name} out")
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


@dataclass(frozen=True)
class AllTokens(Compressor):
    """Every token: what a method before the vision encoder leaves if none follows it; built by `Pipeline`."""

    name: ClassVar[str] = "all"
    paper: ClassVar[str] = "baseline"

    retention: float | Tokens = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.retention != 1.0:
            raise BudgetError(
                f"{self.title} keeps every token: ask for a retention of 1 (--retention 1), or put a method behind it "
                f"({self.title}+METHOD)"
            )

    @property
    def title(self) -> str:
        """The name of what acts before it."""
        return self.name if self.front is None else self.front.name

    def _select(self, video: VideoTokens, budget: int, generator: Generator) -> Selection:
        raise BudgetError("every token is kept: there is nothing to select")


class _Delegating:
    """Properties that two methods in a row derive from each; a mixin before the base class of the second."""

    first: Compressor
    second: InnerCompressor
    ahead: Front | None

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
    def front(self) -> Front | None:
        """That of either."""
        return self.ahead or self.first.front or self.second.front

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
