"""What every method is: a frozen dataclass whose fields are its configuration."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Generator, Tensor

from vidsieve.errors import BudgetError, NeedError, SelectionError, StageError, UnknownNameError
from vidsieve.retention import check_retention
from vidsieve.selection import kept_tokens, top_indices
from vidsieve.types import DecodeView, LayerView, Need, Selection, Stage, TokenGrid, Tokens, VideoTokens


@dataclass(frozen=True)
class Compressor(ABC):
    """Base of every method that keeps some of a video's tokens.

    A method sets the class attributes, adds its own fields, and writes `_select` (or, for a
    `ScoreCompressor`, `score`). Instances hold configuration only: nothing is remembered between calls.

    Parameters
    ----------
    retention : float or Tokens
        Fraction of the video tokens kept, 0 < R ≤ 1, or an exact count.
    variant : str
        ``"ours"`` (exact budget, stable ties), ``"paper"`` or ``"official"``, where they exist.

    Raises
    ------
    RetentionError
        If `retention` is not in (0, 1].
    UnknownNameError
        If the method has no such variant.
    """

    name: ClassVar[str]
    paper: ClassVar[str]
    stage: ClassVar[Stage] = Stage.PRE_LLM
    needs: ClassVar[frozenset[Need]] = frozenset()
    trained: ClassVar[bool] = False
    variants: ClassVar[tuple[str, ...]] = ("ours",)
    expected_failures: ClassVar[dict[str, str]] = {}
    """Contract checks that the method cannot pass, with the reason; they appear as xfail."""

    retention: float | Tokens = 0.25
    variant: str = "ours"

    def __post_init__(self) -> None:
        object.__setattr__(self, "retention", check_retention(self.retention))
        if self.variant not in self.variants:
            raise UnknownNameError(f"variant of {self.name}", self.variant, self.variants)

    @property
    def outcome(self) -> bool:
        """Whether K follows from what a video shows, as in some releases, and not from the retention alone."""
        return False

    def budget(self, video: VideoTokens) -> int:
        """Return K, the number of tokens kept of `video`."""
        return self.compress(video).num_kept if self.outcome else kept_tokens(self.retention, video.num_tokens)

    def budget_ratio(self, num_tokens: int) -> float:
        """Return the nominal retention: the fraction asked for, or a token count over `num_tokens`."""
        return self.retention.count / num_tokens if isinstance(self.retention, Tokens) else self.retention

    def compress(self, video: VideoTokens, *, generator: Generator | None = None) -> Selection:
        """Return what is kept of one video; at full budget that is every token, untouched.

        Parameters
        ----------
        video : VideoTokens
            Never changed.
        generator : torch.Generator, optional
            Source of randomness for methods that draw; seed 0 when absent, so that calls repeat.

        Raises
        ------
        NeedError
            If the method needs a signal that `video` does not carry.
        """
        self._check_needs(video)
        whole = self.outcome and self.retention == 1.0
        budget = video.num_tokens if whole else 0 if self.outcome else self.budget(video)
        if budget >= video.num_tokens:
            return Selection(torch.arange(video.num_tokens, device=video.embeds.device))
        return self._select(video, budget, generator or torch.Generator().manual_seed(0))

    def _check_needs(self, video: VideoTokens) -> None:
        if Need.QUESTION in self.needs and video.prompt is None:
            raise NeedError(f"{self.name} reads the question: hand over VideoTokens with a prompt")
        signals = video.encoder
        for need, name in ((Need.ENCODER_ATTENTION, "attention"), (Need.ENCODER_KEYS, "keys")):
            if need in self.needs and getattr(signals, name, None) is None:
                raise NeedError(f"{self.name} needs {need.value}: hand over VideoTokens with encoder.{name}")

    @property
    def acts(self) -> Stage:
        """Where this instance acts: its class's stage, unless a part of it is switched off."""
        return self.stage

    @property
    def idle(self) -> bool:
        """Whether this instance changes nothing."""
        return self.retention == 1.0

    def outer(self, num_layers: int) -> Compressor | None:
        """Return the part that acts before an LLM of `num_layers` layers, at its own budget; None: there is none."""
        return self

    @property
    def part(self) -> str:
        """Which parts run of a method that has one before the LLM and one inside it (a field `inner`); else empty."""
        inner = getattr(self, "inner", None)
        return "" if inner is None else "both parts" if inner else "outer part"

    @abstractmethod
    def _select(self, video: VideoTokens, budget: int, generator: Generator) -> Selection:
        """Return a selection of exactly `budget` < N tokens; of as many as follow where K is an `outcome`."""

    def with_retention(self, retention: float | Tokens) -> Compressor:
        """Return the same method at another budget."""
        return dataclasses.replace(self, retention=retention)

    def describe(self) -> str:
        """Return the method's name, variant and budget, as traces and tables print them; a part that runs alone."""
        rate = str(self.retention) if isinstance(self.retention, Tokens) else f"{self.retention:g}"
        part = "outer part, " if self.part == "outer part" else ""
        return f"{self.name} ({part}variant {self.variant}, retention {rate})"


@dataclass(frozen=True)
class ScoreCompressor(Compressor):
    """Base of methods that score every token and keep the highest over the whole video."""

    @abstractmethod
    def score(self, video: VideoTokens) -> Tensor:
        """Return the scores (N,) floating of a video's tokens; higher = keep."""

    def _select(self, video: VideoTokens, budget: int, generator: Generator) -> Selection:
        with torch.no_grad():
            scores = self.score(video).float()
        if scores.shape != (video.num_tokens,):
            raise SelectionError(f"{self.name}.score must return ({video.num_tokens},), got {tuple(scores.shape)}")
        return Selection(top_indices(scores, budget), scores=scores)


@dataclass(frozen=True)
class LayerCompressor(Compressor):
    """Base of methods that drop video tokens inside the LLM, before some of its layers.

    A method writes `stages` and `choose`; the adapter runs them in hooks while the model prefills. One with a part
    before the LLM gives it as `outer`; one that merges what it drops sets `merges` and writes `merge`.
    """

    stage: ClassVar[Stage] = Stage.LAYER
    needs: ClassVar[frozenset[Need]] = frozenset({Need.LAYER_ATTENTION})
    own_layer: ClassVar[bool] = False
    """Whether attention is what a stage's own layer would compute, and not that of the layer before."""
    merges: ClassVar[bool] = False
    """Whether dropped tokens go into kept ones."""
    adaptive: ClassVar[bool] = False
    """Whether how many tokens a stage leaves follows from what it sees, within the same budget."""
    reads_text: ClassVar[bool] = False
    """Whether it reads the attention of every text token behind the video, and not of the last one alone."""
    reads_before: ClassVar[bool] = False
    """Whether it reads what entered the layer before a stage, and what enters the stage's layer."""
    prepares: ClassVar[bool] = False
    """Whether it looks at the input embeddings of video and text once, in `prepare`."""

    @property
    def reads_bias(self) -> bool:
        """Whether it reads `LayerView.rope_bias`."""
        return False

    @property
    def reorders(self) -> bool:
        """Whether what stays goes on in the order in which `choose` lists it."""
        return False

    def prepare(self, video: Tensor, text: Tensor) -> Tensor:
        """Return what views are told, from input embeddings of a video (n, D) and of the text behind it (Q, D)."""
        raise NotImplementedError(f"{self.name} prepares nothing")

    @property
    def renumbers(self) -> bool:
        """Whether positions are counted anew after every stage, as some releases do; of models with one row of them."""
        return False

    def outer(self, num_layers: int) -> Compressor | None:
        """Return None: subclasses with a part before the LLM return it."""
        return None

    @abstractmethod
    def stages(self, num_layers: int, num_tokens: int) -> tuple[tuple[int, int], ...]:
        """Return (layer, tokens alive from it on) in the order of layers, for a video that enters with `num_tokens`.

        The layers do not depend on `num_tokens`.

        Raises
        ------
        BudgetError
            If the retention cannot be reached.
        """

    @abstractmethod
    def choose(self, view: LayerView, keep: int) -> Tensor:
        """Return which of the tokens in `view` stay: `keep` sorted positions (keep,) int64 among the n alive.

        As many as follow from the view in variants of which `outcome` holds.
        """

    def settled(self, history: Sequence[int], num_layers: int, grid: TokenGrid) -> bool:
        """Return whether no later stage drops anything, from what each layer so far has seen of a video."""
        return False

    def merge(self, view: LayerView, chosen: Tensor) -> Tensor:
        """Return the hidden states (keep, D) of the tokens that stay, from those of all that were alive in `view`."""
        raise NotImplementedError(f"{self.name} merges nothing")

    def _select(self, video: VideoTokens, budget: int, generator: Generator) -> Selection:
        raise StageError(f"{self.name} acts inside the LLM: attach it to a model")


@dataclass(frozen=True)
class DecodeCompressor(Compressor):
    """Base of methods that let some layers read fewer video tokens of the cache at every step of decoding.

    What goes into the cache is chosen before the LLM as by any other method (`_select`); a method adds `first_layer`
    and `read`, which the adapter runs in hooks at every step that adds one token.
    """

    stage: ClassVar[Stage] = Stage.DECODE
    needs: ClassVar[frozenset[Need]] = frozenset({Need.LAYER_ATTENTION})

    @property
    def idle(self) -> bool:
        """Whether this instance changes nothing: all tokens are cached, and all are read."""
        return self.retention == 1.0 and self.acts is not Stage.DECODE

    @abstractmethod
    def first_layer(self, num_layers: int) -> int:
        """Return the first of `num_layers` layers that reads fewer tokens, at least 1.

        Raises
        ------
        BudgetError
            If there is no such layer.
        """

    @abstractmethod
    def read(self, view: DecodeView, before: DecodeView | None) -> Tensor | None:
        """Return which of the n cached tokens are read in this step: sorted positions (m,) int64, or None for all.

        `before` is the step before this one, with what was read then.
        """


def layer_of(layer: int, num_layers: int) -> int:
    """Return a layer that a model of `num_layers` has, with another before it.

    Raises
    ------
    BudgetError
        If it has not.
    """
    if layer >= num_layers:
        raise BudgetError(f"layer {layer} is not among the model's {num_layers}: choose 1 to {num_layers - 1}")
    return layer


def check_cosine(name: str, value: object) -> None:
    """Refuse what is no cosine.

    Raises
    ------
    BudgetError
    """
    if not isinstance(value, int | float) or not -1 <= value <= 1:
        raise BudgetError(f"{name} is a cosine in [-1, 1], got {value!r}")


def check_switch(name: str, value: object) -> None:
    """Refuse what is neither True nor False.

    Raises
    ------
    BudgetError
    """
    if not isinstance(value, bool):
        raise BudgetError(f"{name} is True or False, got {value!r}")


def received_attention(video: VideoTokens, name: str) -> Tensor:
    """Return the attention (N,) that a video's tokens receive in the vision encoder, on their device.

    Raises
    ------
    NeedError
        If `video` does not carry it.
    """
    if video.encoder is None or video.encoder.attention is None:
        raise NeedError(f"{name} reads the vision encoder's attention: hand over VideoTokens that have it")
    return video.encoder.attention.to(video.embeds.device)


def check_layer(layer: object) -> None:
    """Refuse what is no number of a layer with another before it.

    Raises
    ------
    BudgetError
    """
    if not isinstance(layer, int) or isinstance(layer, bool) or layer < 1:
        raise BudgetError(f"layer must be a whole number from 1 on, the first that has one before it; got {layer!r}")
