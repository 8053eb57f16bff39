"""Methods inside the LLM: their base classes, views of a video, and choices."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass
from typing import ClassVar, Literal, Self

import torch
from torch import Generator, Tensor

from vidsieve.compressors.base import Compressor
from vidsieve.errors import BudgetError, SelectionError, StageError
from vidsieve.types import Need, Selection, Stage, TokenGrid, Tokens, VideoTokens, check_indices

Rows = Literal["last", "text"]
"""Prompt tokens whose attention is read: the last one, or all text behind the video."""


@dataclass(frozen=True)
class LayerView(ABC):
    """One video before an LLM layer. Tensors beyond these fields are computed when they are first asked for.

    Parameters
    ----------
    layer, depth : int
        The layer that is about to run, and the number of layers.
    grid : TokenGrid
        Of the whole video.
    indices : Tensor, (n,), int64
        Raster indices of the tokens that are left, in the order in which they go through the LLM.
    history : tuple of int
        Number of the video's tokens that each earlier layer saw.
    groups : Tensor or None, (n,), int64
        `Selection.groups` of the tokens that are left.
    """

    layer: int
    depth: int
    grid: TokenGrid
    indices: Tensor
    history: tuple[int, ...] = ()
    groups: Tensor | None = None

    @abstractmethod
    def attention(self, rows: Rows, layer: int) -> Tensor:
        """Return the attention (H, Q, n) float32 from prompt tokens to the video's, softmax over the whole prompt.

        `layer` is the one about to run or the one before it. Q is 1 for the last prompt token.
        """

    @property
    @abstractmethod
    def hidden(self) -> Tensor:
        """Hidden states (n, D) that enter the layer. Gradients flow through them."""

    @property
    @abstractmethod
    def before(self) -> Tensor:
        """Hidden states (n, D) that entered the layer before."""

    @property
    @abstractmethod
    def video(self) -> Tensor:
        """Embeddings (N', D) of the video's tokens as they entered the LLM."""

    @property
    @abstractmethod
    def text(self) -> Tensor:
        """Embeddings (Q, D) of the text behind the video as it entered the LLM."""

    @property
    @abstractmethod
    def rope_bias(self) -> Tensor:
        """Scores (Q, n) float32 between a query and a key of ones, by rotary positions alone, for rows "text"."""


@dataclass(frozen=True)
class LayerChoice:
    """Tokens that a method inside the LLM keeps of one video.

    Parameters
    ----------
    indices : Tensor, (k,), int64
        Positions among the tokens of the view, sorted, unique.
    hidden : Tensor or None, (k, D)
        Their new hidden states, for methods that merge.
    order : Tensor or None, (k,), int64
        The same positions in the order in which the tokens go on, with positions counted anew along it (in LLMs with
        one row of positions), as some releases do. None: tokens keep their places and positions.

    Raises
    ------
    SelectionError
        If `indices` is not sorted, unique int64, or another part does not match it.
    """

    indices: Tensor
    hidden: Tensor | None = None
    order: Tensor | None = None

    def __post_init__(self) -> None:
        check_indices(self.indices, self.hidden)
        if self.order is not None and not torch.equal(self.order.sort().values, self.indices):
            raise SelectionError("order must list the same tokens as indices")


@dataclass(frozen=True)
class DecodeView:
    """One video in one step of decoding.

    Parameters
    ----------
    layer : int
        The first layer that reads fewer tokens.
    grid : TokenGrid
        Of the whole video.
    indices : Tensor, (n,), int64
        Raster indices of the tokens in the cache.
    attention : Tensor, (H, n), float32
        Attention from the newest token to them in the layer before, softmax over the whole cache.
    read : Tensor or None, (m,), int64
        For an earlier step: the positions among the n that were read. None: all.
    """

    layer: int
    grid: TokenGrid
    indices: Tensor
    attention: Tensor
    read: Tensor | None = None


@dataclass(frozen=True)
class InnerCompressor(Compressor):
    """Base of methods that read the attention of LLM layers."""

    needs: ClassVar[frozenset[Need]] = frozenset({Need.LAYER_ATTENTION})
    lookback: ClassVar[int] = 1
    """Distance from a layer from which on there are fewer tokens back to the one whose attention chooses them."""
    cuts: ClassVar[tuple[int, ...] | None] = None
    """The layers from which on there may be fewer tokens, of a method that is `fitted`; None: all but the first."""

    def fitted(self, cuts: tuple[int, ...] | None) -> Self:
        """Return the same method for an LLM with other layers than full attention, which allows fewer from `cuts` on.

        Layers that the user has not named are then the next of these. `dataclasses.replace` forgets them.
        """
        method = copy(self)
        object.__setattr__(method, "cuts", cuts)
        return method

    def placed(self, named: int | None, usual: int, num_layers: int) -> int:
        """Return the layer that the user has named, or else the method's `usual` one or the next that can be used.

        Raises
        ------
        BudgetError
            If a model of `num_layers` does not have it, or none can be used.
        """
        if named is None and self.cuts is not None:
            return usable_layer(usual, self.cuts)
        return layer_of(usual if named is None else named, num_layers)


@dataclass(frozen=True)
class LayerCompressor(InnerCompressor):
    """Base of methods that drop video tokens inside the LLM, before some of its layers.

    A method writes `stages` and `step`; the adapter runs `step` in hooks while the model prefills. A method with a part
    before the LLM returns it from `outer`.
    """

    stage: ClassVar[Stage] = Stage.LAYER

    def __post_init__(self) -> None:
        super().__post_init__()
        if getattr(self, "earliest", False) and isinstance(self.retention, Tokens):
            raise BudgetError(
                f"earliest moves the layers of {self.name} by the fraction that is kept, which is another for every "
                f"video if {self.retention.count} tokens are: give a retention from 0 to 1"
            )

    def outer(self, num_layers: int) -> Compressor | None:
        """Return None: methods with a part before the LLM return it instead."""
        return None

    @abstractmethod
    def stages(self, num_layers: int, num_tokens: int) -> tuple[tuple[int, int], ...]:
        """Return (layer, tokens left from it on) of every stage, by rising layer, for a video of `num_tokens`.

        The layers do not depend on `num_tokens`.

        Raises
        ------
        BudgetError
            If the retention cannot be reached.
        """

    @abstractmethod
    def step(self, view: LayerView, keep: int) -> LayerChoice:
        """Return the `keep` tokens of `view` that stay from its layer on.

        Methods whose count depends on the video keep another number, with the same mean over layers.
        """

    def _select(self, video: VideoTokens, budget: int, generator: Generator) -> Selection:
        raise StageError(f"{self.name} acts inside the LLM: attach it to a model")


@dataclass(frozen=True)
class DecodeCompressor(InnerCompressor):
    """Base of methods that let some layers read fewer video tokens of the cache at every step of decoding.

    The tokens in the cache are chosen before the LLM as by any other method (`_select`); a method adds `first_layer`
    and `read`, which the adapter runs in hooks at every step that adds one token.
    """

    stage: ClassVar[Stage] = Stage.DECODE

    @property
    def idle(self) -> bool:
        """True if this instance changes nothing: all tokens are cached, and all are read."""
        return super().idle and self.acts is not Stage.DECODE

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
        """Return the cached tokens that this step reads: sorted positions (m,) int64 among n, or None for all.

        `before` is the view of the previous step with the tokens that it read.
        """


def layer_of(layer: int, num_layers: int) -> int:
    """Return `layer` if a model of `num_layers` has it.

    Raises
    ------
    BudgetError
    """
    if layer >= num_layers:
        raise BudgetError(f"layer {layer} is not among the model's {num_layers}: choose 1 to {num_layers - 1}")
    return layer


def usable_layer(layer: int, cuts: Sequence[int], above: int = 0, *, early: bool = False) -> int:
    """Return the first of `cuts` at or after `layer` and after `above`.

    With `early`, the last one at or before `layer`; only where there is none, the first one.

    Raises
    ------
    BudgetError
        If there is none.
    """
    later = [cut for cut in cuts if cut > above]
    wanted = [cut for cut in later if cut <= layer][-1:] or later if early else [c for c in later if c >= layer]
    if not wanted:
        raise BudgetError(
            f"on this model there may be fewer tokens from {layers_in_words(cuts)} on, and none of these is left for "
            f"layer {max(layer, above + 1)}: name earlier ones, or fewer"
        )
    return wanted[0]


def layers_in_words(layers: Sequence[int], depth: int = 0) -> str:
    """Return "layer 4", "layers 4, 8, 12", or "layers from 4 on" for all to the last of `depth`."""
    if list(layers) == list(range(layers[0], depth)):
        return f"layers from {layers[0]} on"
    return f"layer{'s' * (len(layers) > 1)} {', '.join(map(str, layers))}"
