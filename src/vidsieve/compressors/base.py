"""The base of every method: a frozen dataclass whose fields are its configuration."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from torch import Generator, Tensor

from vidsieve.compressors.front import Front
from vidsieve.errors import BudgetError, NeedError, PolicyError, SelectionError, UnknownNameError
from vidsieve.policies import Policy
from vidsieve.retention import Calibration, check_retention
from vidsieve.selection import kept_tokens, least_retention, top_indices
from vidsieve.types import Need, Selection, Stage, Tokens, VideoTokens

if TYPE_CHECKING:
    from _typeshed import DataclassInstance


def within(default: Any, interval: str) -> Any:
    """Return a dataclass field of a method whose value must lie in an interval such as ``"[0, 1)"``.

    A field annotated as int takes whole numbers only; one annotated as optional takes None too.
    """
    return dataclasses.field(default=default, metadata={"within": interval})


@dataclass(frozen=True)
class Compressor(ABC):
    """Base of every method that keeps some of a video's tokens.

    A method sets the class attributes, adds its own fields (numbers with bounds by `within`), and writes `_select` or,
    for a `ScoreCompressor`, `score`. Instances hold configuration only; nothing is remembered between calls.

    Parameters
    ----------
    retention : float or Tokens
        Fraction of the video tokens kept, 0 < R ≤ 1, or an exact count.
    variant : str
        ``"ours"`` (exact budget, stable ties), ``"paper"`` or ``"official"``, those that exist.
    ahead : Front or None
        What acts before or inside the vision encoder, set by `Pipeline`; see `front`.

    Raises
    ------
    RetentionError
        If `retention` is not in (0, 1].
    UnknownNameError
        If the method has no such variant.
    BudgetError
        If another field lies outside its bounds.
    """

    name: ClassVar[str]
    paper: ClassVar[str]
    stage: ClassVar[Stage] = Stage.PRE_LLM
    needs: ClassVar[frozenset[Need]] = frozenset()
    trained: ClassVar[bool] = False
    variants: ClassVar[tuple[str, ...]] = ("ours",)
    adaptive_variants: ClassVar[tuple[str, ...]] = ()
    """Variants that, given a ratio, keep a number of tokens that depends on the video."""
    expected_failures: ClassVar[dict[str, str]] = {}
    """Contract checks that the method cannot pass, with the reason; they appear as xfail."""

    retention: float | Tokens = 0.25
    variant: str = "ours"
    ahead: Front | None = dataclasses.field(default=None, kw_only=True, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "retention", check_retention(self.retention))
        for item in dataclasses.fields(self):  # a list would leave the method without a hash
            if isinstance(value := getattr(self, item.name), list):
                object.__setattr__(self, item.name, tuple(value))
        if self.variant not in self.variants:
            raise UnknownNameError(f"variant of {self.name}", self.variant, self.variants)
        check_bounds(self)

    @property
    def adaptive_budget(self) -> bool:
        """True if the number of kept tokens depends on the video and not only on `retention`."""
        return self.variant in self.adaptive_variants and not isinstance(self.retention, Tokens)

    def budget(self, video: VideoTokens) -> int:
        """Return K, the number of tokens kept of `video`."""
        return self.compress(video).num_kept if self.adaptive_budget else self._allowed(video)

    def _allowed(self, video: VideoTokens) -> int:
        return min(video.num_tokens, kept_tokens(self.retention, video.counted_tokens))

    def budget_above(self, video: VideoTokens, floor: int, reason: str) -> int:
        """Return ⌊R·N⌋ of a method that must keep `floor` tokens.

        Raises
        ------
        BudgetError
            If it is less; the message has `reason` and the least retention.
        """
        budget, total = self._allowed(video), video.num_tokens
        if budget < floor:
            least = least_retention(floor, total)
            advice = f"a retention from {least:g} to 1" if least < 1 else "all of it"
            raise BudgetError(
                f"{self.describe()}: {reason}, {floor} of {total} tokens in a grid of {video.grid}; ask for {advice}"
            )
        return budget

    def budget_ratio(self, num_tokens: int) -> float:
        """Return the nominal retention: the given fraction, or the token count over `num_tokens`."""
        return self.retention.count / num_tokens if isinstance(self.retention, Tokens) else self.retention

    def compress(self, video: VideoTokens, *, generator: Generator | None = None) -> Selection:
        """Return the selection for one video; at full budget that is every token, untouched.

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
        whole = self.adaptive_budget and self.retention == 1.0
        budget = video.num_tokens if whole else 0 if self.adaptive_budget else self.budget(video)
        if budget >= video.num_tokens:
            return Selection(torch.arange(video.num_tokens, device=video.embeds.device))
        # Distances and ties are decided in the precision that a method is written for.
        with torch.autocast(video.embeds.device.type, enabled=False):
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
        """Where this instance acts: the class's stage, unless a part is switched off."""
        return self.stage

    @property
    def front(self) -> Front | None:
        """What acts before or inside the vision encoder; None for most methods."""
        return self.ahead

    @property
    def title(self) -> str:
        """The name, with that of the `front` before it."""
        return self.name if self.front is None else f"{self.front.name}+{self.name}"

    @property
    def idle(self) -> bool:
        """True if this instance changes nothing."""
        return self.retention == 1.0 and self.front is None

    def outer(self, num_layers: int) -> Compressor | None:
        """Return the part before an LLM of `num_layers` layers, at its own budget; None if there is none."""
        return self

    @property
    def part(self) -> str:
        """Label of the active parts ("both parts", "outer part"); empty for methods of one part (no field `inner`)."""
        inner = getattr(self, "inner", None)
        return "" if inner is None else "both parts" if inner else "outer part"

    @abstractmethod
    def _select(self, video: VideoTokens, budget: int, generator: Generator) -> Selection:
        """Return a selection of exactly `budget` < N tokens, or of any number where the budget is adaptive."""

    @property
    def budget_asked(self) -> float | Tokens | Calibration:
        """The budget as it was asked for: `retention`, or a calibration."""
        return self.retention

    def with_retention(self, retention: float | Tokens | Calibration) -> Compressor:
        """Return the same method at another budget."""
        if isinstance(retention, Calibration):
            from vidsieve.compressors.calibrated import calibrated  # which builds on this class

            return calibrated(self, retention)
        return dataclasses.replace(self, retention=retention)

    def describe(self) -> str:
        """Return name, variant and budget for traces and tables, and the part if one runs alone."""
        rate = f"{self.retention.count} tokens" if isinstance(self.retention, Tokens) else f"{self.retention:g}"
        part = "outer part, " if self.part == "outer part" else ""
        return f"{self.title} ({part}variant {self.variant}, retention {rate})"


@dataclass(frozen=True)
class TrainedCompressor(Compressor):
    """Base of methods with a trained policy, to be named before `ScoreCompressor`.

    Parameters
    ----------
    policy : Policy or None
        From `from_pretrained`; there is no sensible policy without training.
    """

    trained: ClassVar[bool] = True
    policy_class: ClassVar[type[Policy]]
    small: ClassVar[dict[str, Any]] = {}
    """Arguments of a small network, for contract checks and timing."""
    policy: Policy | None = None

    @classmethod
    def from_pretrained(cls, folder: str | Path, **fields: Any) -> Self:
        """Return the compressor with the policy in `folder`, in the variant it was trained as or a compatible one."""
        policy = cls.policy_class.from_pretrained(folder)
        return cls(policy=policy, **(fields | {"variant": policy.served_as(fields.get("variant"))}))

    @classmethod
    def untrained(cls, hidden_size: int, **fields: Any) -> Self:
        """Return the compressor with random weights, for contract checks and timing."""
        return cls(policy=cls.policy_class.start(hidden_size, "none", **cls.small).eval(), **fields)

    def trained_policy(self) -> Any:
        """Return the policy.

        Raises
        ------
        PolicyError
            If there is none.
        """
        if self.policy is None:
            load = f"vidsieve.load({self.name!r}, FOLDER)"
            raise PolicyError(f"{self.name} needs a trained policy: {load}, or `vidsieve train {self.name}`")
        return self.policy


@dataclass(frozen=True)
class ScoreCompressor(Compressor):
    """Base of methods that score every token and keep the highest over the whole video.

    `local` says that a token's score depends on its frame and the one before alone, which `Stream` needs.
    """

    local: ClassVar[bool] = False

    @abstractmethod
    def score(self, video: VideoTokens) -> Tensor:
        """Return the scores (N,) floating of a video's tokens; higher = keep."""

    def _select(self, video: VideoTokens, budget: int, generator: Generator) -> Selection:
        with torch.no_grad():
            scores = self.score(video)
        if not isinstance(scores, Tensor) or scores.shape != (video.num_tokens,):
            got = f"shape {tuple(scores.shape)}" if isinstance(scores, Tensor) else repr(scores)
            raise SelectionError(f"{self.name}.score must return a tensor ({video.num_tokens},), got {got:.80}")
        scores = scores.float()
        return Selection(top_indices(scores, budget), scores=scores)


def check_bounds(method: DataclassInstance) -> None:
    """Refuse a method whose fields lie outside the bounds that `within` gives them.

    Raises
    ------
    BudgetError
    """
    for field in dataclasses.fields(method):
        _check_bounds(field, getattr(method, field.name))


def _check_bounds(field: dataclasses.Field[Any], value: object) -> None:
    interval, kind = field.metadata.get("within"), str(field.type)
    if kind == "bool" and not isinstance(value, bool):
        raise BudgetError(f"{field.name} must be True or False, got {value!r}")
    if interval is None or (value is None and "None" in kind):
        return
    low, high = (float(end) for end in interval[1:-1].split(","))
    number = "a whole number" if "int" in kind else "a number"
    if isinstance(value, bool) or not isinstance(value, int if "int" in kind else int | float):
        inside = False
    else:
        inside = low < value < high or (value == low and interval[0] == "[") or (value == high and interval[-1] == "]")
    if not inside:
        bounds = f"in {interval}" if high < float("inf") else f"{'≥' if interval[0] == '[' else '>'} {low:g}"
        raise BudgetError(f"{field.name} must be {number} {bounds}, got {value!r}")


def encoder_attention(video: VideoTokens) -> Tensor:
    """Return the attention (N,) that a video's tokens receive in the vision encoder, on their device.

    Raises
    ------
    NeedError
        If `video` does not carry it.
    """
    if video.encoder is None or video.encoder.attention is None:
        raise NeedError("the method reads the vision encoder's attention: hand over VideoTokens that have it")
    return video.encoder.attention.to(video.embeds.device)
