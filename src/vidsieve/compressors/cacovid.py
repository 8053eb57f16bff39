"""CaCoVID: a question-aware policy that keeps the tokens which contribute to right answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, Literal, Self, get_args

import msgspec
import torch
from torch import Generator, Tensor, nn

from vidsieve.compressors._decoder import BlockShape, DecoderBlock, RMSNorm
from vidsieve.compressors._question import QuestionScorer, ScorerSettings
from vidsieve.compressors.base import TrainedCompressor, within
from vidsieve.errors import PolicyError, UnknownNameError
from vidsieve.policies import Policy, PolicyConfig, head, mlp, network_of
from vidsieve.selection import (
    allocate_frames,
    even_counts,
    evenly_spaced,
    indices_to_mask,
    mask_to_indices,
    top_indices,
    top_indices_per_frame,
)
from vidsieve.types import Need, Prompt, Selection, TokenGrid, Tokens, VideoTokens

Body = Literal["layer", "attention", "local", "question"]
Allocation = Literal["frame_avg", "frame_ada", "frame_ada_st", "global"]


class CaCoVIDNetwork(msgspec.Struct, forbid_unknown_fields=True):
    """The arguments of a `CaCoVIDPolicy`."""

    body: str
    shape: BlockShape
    causal: bool = False
    depth: Annotated[int, msgspec.Meta(ge=1, le=256)] = 1
    scorer: ScorerSettings = msgspec.field(default_factory=ScorerSettings)


class CaCoVIDPolicy(Policy):
    """Body over the prompt, then a token head and a frame head (Eq. 1-3).

    Bodies: ``"layer"`` is a decoder layer (or several) that starts as the LLM's first with full attention,
    bidirectional over the whole prompt (causal where ``causal`` is set, as the release is in effect);
    ``"attention"`` leaves out its SwiGLU; ``"local"`` attends within frames and to the text; ``"question"`` scores each
    token against the words of the question (`QuestionScorer`).
    """

    method: ClassVar[str] = "cacovid"

    def __init__(self, config: PolicyConfig) -> None:
        super().__init__(config)
        network = network_of(config, CaCoVIDNetwork)
        if network.body not in get_args(Body):
            raise UnknownNameError("policy body", network.body, get_args(Body))
        if unknown := config.network["shape"].keys() - BlockShape.__dataclass_fields__.keys():
            raise PolicyError(f"a decoder block has no {min(unknown):.80}")
        self.body, self.causal, shape = network.body, network.causal, network.shape
        width = shape.hidden_size
        if width != config.hidden_size:
            raise PolicyError(f"the policy's hidden_size {config.hidden_size} is not that of its shape, {width}")
        if self.body == "question":
            self.scorer = QuestionScorer(shape, **msgspec.structs.asdict(network.scorer))
            return
        blocks = (DecoderBlock(shape, feed_forward=self.body != "attention") for _ in range(network.depth))
        self.layers = nn.ModuleList(blocks)
        self.layernorm = RMSNorm(width, shape.rms_norm_eps)
        sizes = [width, *(width // 2**i for i in range(1, 5)), 2]
        self.token_compress, self.frame_compress = mlp(sizes), mlp(sizes)

    def forward(self, video: VideoTokens) -> tuple[Tensor, Tensor]:
        """Return token logits (N, 2) and frame logits (T, 2) float32; column 0 = drop, 1 = keep.

        Raises
        ------
        PolicyError
            If the video comes without its prompt, or in another width.
        """
        if video.prompt is None:
            raise PolicyError("a CaCoVID policy reads the question: hand over VideoTokens with a prompt")
        self.check_width(video)
        dtype = next(self.parameters()).dtype
        prompt = replace(video.prompt, embeds=video.prompt.embeds.to(dtype))
        if self.body == "question":
            tokens, frames = self.scorer(replace(video, embeds=video.embeds.to(dtype)), prompt)
            return tokens.float(), frames.float()
        mask = _local_mask(prompt, video.grid) if self.body == "local" else None
        hidden = prompt.embeds
        for layer in self.layers:
            hidden = layer(hidden, prompt.positions, mask, self.causal)
        hidden = hidden[prompt.video_mask]
        frame_features = hidden.reshape(video.grid.frames, video.grid.per_frame, -1).mean(1)
        tokens = head(self.token_compress, self.layernorm(hidden))
        return tokens.float(), head(self.frame_compress, self.layernorm(frame_features)).float()

    @classmethod
    def of_shape(
        cls,
        shape: BlockShape,
        family: str,
        *,
        variant: str = "ours",
        layers: Sequence[dict[str, Tensor]] | None = None,
        seed: int = 0,
        base_model: str = "",
        body: Body | None = None,
        **network: Any,
    ) -> Self:
        """Return an untrained policy; `layers` are the states of the LLM's first decoder layers (paper's start).

        Their number is the policy's depth, 1 without them.

        Raises
        ------
        PolicyError
            If there are several for the ``"question"`` body, which has one, or if they lack a part of its block.
        """
        depth = len(layers) if layers is not None else 1
        if depth > 1 and (body or variant) in ("question", "ours"):
            raise PolicyError(f"the question path has one layer, not {depth}: choose another body")
        body = body or ("question" if variant == "ours" else "layer")
        shape_dict = {key: getattr(shape, key) for key in shape.__dataclass_fields__}
        network = {"body": body, "causal": variant == "official", "shape": shape_dict, "depth": depth} | network
        policy = cls.start(shape.hidden_size, family, variant=variant, seed=seed, base_model=base_model, **network)
        for number, weights in enumerate(layers or ()):
            target: nn.Module | None = policy.scorer.first_look if body == "question" else policy.layers[number]
            if target is None or not weights:
                continue
            _take_over(target, weights)
        return policy


def _take_over(block: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Load a layer of an LLM into a block of the policy.

    Raises
    ------
    PolicyError
        If the layer has a part of the block not at all, or in another shape.
    """
    own = block.state_dict()
    for name, value in own.items():
        found = tuple(weights[name].shape) if name in weights else "not there"
        if found != tuple(value.shape):
            raise PolicyError(
                f"a policy cannot start from this LLM's layer, whose {name} is {found} where the policy's block has "
                f"{tuple(value.shape)}: choose body 'question', which takes over no such layer, or, where only mlp is "
                "another (experts), body 'attention'"
            )
    block.load_state_dict({name: weights[name] for name in own})


def _local_mask(prompt: Prompt, grid: TokenGrid) -> Tensor:
    """Return (L, L) bool: a video token sees its own frame and the text, text sees everything."""
    frame = torch.full_like(prompt.video_mask, -1, dtype=torch.int64)
    frame[prompt.video_mask] = torch.arange(grid.num_tokens, device=frame.device) // grid.per_frame
    text = frame < 0
    return (frame[:, None] == frame[None]) | text[None] | text[:, None]


@dataclass(frozen=True)
class CaCoVID(TrainedCompressor):
    """Keep the tokens of the highest learned contribution, the budget shared out among frames.

    Parameters
    ----------
    allocation : str, optional
        ``"frame_avg"`` (FrameAvg: the same number for every frame), ``"frame_ada"`` (FrameAda: in proportion
        to the frame scores), ``"frame_ada_st"`` (FrameAda+ST: a part of the budget spread uniformly over what
        is left), ``"global"`` (the highest scores of the whole video). Default: the paper's ``"frame_ada_st"``;
        ``"global"`` in variant ``"ours"``.
    contribution : float
        Share of the budget chosen by scores under ``"frame_ada_st"``.
    frame_cap : float
        Variant ``"official"``: most a frame may give, as a multiple of R·H·W (the release's scripts use 1.5).

    Variants: ``"paper"`` shares by softmax(Ŝ_f) with largest remainders. ``"official"`` reproduces the release at
    inference, its roundings and counts in floating point; ties go to the lower index. ``"ours"`` and ``"paper"`` keep
    exactly ⌊R·N⌋ tokens. ``docs/methods/cacovid.md`` lists the differences.

    References
    ----------
    CaCoVID, AAAI 2026 (arXiv 2602.01649), Eq. 1-4, Tables 3-5; LivingFutureLab/CaCoVID @ 384752da.
    """

    name: ClassVar[str] = "cacovid"
    paper: ClassVar[str] = "CaCoVID, AAAI 2026"
    needs: ClassVar[frozenset[Need]] = frozenset({Need.QUESTION})
    variants: ClassVar[tuple[str, ...]] = ("ours", "paper", "official")
    policy_class: ClassVar[type[Policy]] = CaCoVIDPolicy
    allocation: Allocation | None = None
    contribution: float = within(0.5, "[0, 1]")
    frame_cap: float = within(1.5, "(0, inf)")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.allocation is None:
            object.__setattr__(self, "allocation", "global" if self.variant == "ours" else "frame_ada_st")
        if self.allocation not in get_args(Allocation):
            raise UnknownNameError("allocation", self.allocation, get_args(Allocation))

    @classmethod
    def untrained(cls, hidden_size: int, **fields: Any) -> Self:
        """Return the compressor with random weights, for contract checks and timing."""
        shape = BlockShape.of_width(hidden_size)
        policy = CaCoVIDPolicy.of_shape(shape, "none", variant=fields.get("variant", "ours"))
        return cls(policy=policy.eval(), **fields)

    def budget(self, video: VideoTokens) -> int:
        """Return K: ⌊R·N⌋, taken in floating point under ``"official"`` (0.29 of 100 is 28 there)."""
        if self.variant == "official" and not isinstance(self.retention, Tokens):
            return max(1, int(self.retention * video.num_tokens))
        return super().budget(video)

    def _select(self, video: VideoTokens, budget: int, generator: Generator) -> Selection:
        policy = self.trained_policy()
        with policy.serving(video.embeds):
            token_logits, frame_logits = policy(video)
        scores, frames = token_logits[:, 1] - token_logits[:, 0], frame_logits[:, 1] - frame_logits[:, 0]
        if self.variant == "official" and self.allocation == "frame_ada_st" and not isinstance(self.retention, Tokens):
            indices = official_selection(
                scores, frames, video.grid, self.retention, self.contribution, self.frame_cap * self.retention
            )[0]
        else:
            indices = self._indices(scores, frames, video.grid, budget)
        return Selection(indices, scores=scores, frame_scores=frames)

    def _indices(self, scores: Tensor, frames: Tensor, grid: TokenGrid, budget: int) -> Tensor:
        if self.allocation == "global":
            return top_indices(scores, budget)
        if self.allocation == "frame_avg":
            return top_indices_per_frame(scores, grid, even_counts(budget, grid.frames))
        spread = 0 if self.allocation == "frame_ada" else budget - max(1, round(self.contribution * budget))
        counts = allocate_frames(frames.softmax(0), budget - spread, cap=grid.per_frame)
        return fill_evenly(top_indices_per_frame(scores, grid, counts), grid.num_tokens, spread)


def fill_evenly(chosen: Tensor, num_tokens: int, count: int) -> Tensor:
    """Return `chosen` and `count` tokens spread evenly, in raster order, over those not chosen, sorted."""
    left = mask_to_indices(~indices_to_mask(chosen, num_tokens))
    spread = left[evenly_spaced(left.shape[0], count).to(left.device)] if count else left[:0]
    return torch.cat([chosen, spread]).sort().values


def official_frame_counts(frames: Tensor, total: int, per_frame: int, ratio: float, share: float, cap: float) -> Tensor:
    """Return the release's contribution budget per frame (T,) int64.

    Scores are scaled to ±3, their softmax is clipped to [1/2T, cap/(T·ratio)] and renormalised, counts are
    rounded half to even and clipped to [1, ⌊share·cap·H·W⌋]; what is then missing goes to the frame with the
    fewest, what is too much comes off the one with the most (first on ties), past both bounds.

    Parameters
    ----------
    frames : Tensor, (T,), floating
    total : int, ⌊share·ratio·N⌋
    per_frame : int, H·W
    ratio, share, cap : float, the release's topk, imp_ratio and max_sample_ratio_for_each_frame
    """
    count = frames.shape[0]
    scaled = frames.float()
    largest = scaled.abs().max()
    # All-zero scores give NaN in the release; here they are equal.
    scaled = scaled / largest * 3 if float(largest) > 0 else scaled
    probability = scaled.softmax(0).clamp(min=1 / count / 2, max=cap / count / ratio)
    probability = probability / probability.sum()
    wanted = round(share * ratio * per_frame * count)
    counts = (probability * wanted).round().clamp(min=1).clamp(max=int(share * per_frame * cap)).long()
    while int(counts.sum()) > total:
        counts[counts.argmax()] -= 1
    while int(counts.sum()) < total:
        counts[counts.argmin()] += 1
    return counts


def official_selection(
    token_scores: Tensor, frame_scores: Tensor, grid: TokenGrid, ratio: float, share: float, cap: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the release's inference selection (mode "token"): all kept, those kept by score, counts per frame.

    Parameters
    ----------
    token_scores : Tensor, (N,), and frame_scores : Tensor, (T,); logit of keep minus logit of drop
    ratio, share, cap : float, the release's topk, imp_ratio and max_sample_ratio_for_each_frame

    Returns
    -------
    tuple of Tensor, (K,), (K_1,) and (T,), int64
    """
    budget = max(1, int(ratio * grid.num_tokens))  # The release keeps nothing where R·N < 1.
    by_score = int(share * ratio * grid.num_tokens) if share < 1 else budget
    counts = official_frame_counts(frame_scores, by_score, grid.per_frame, ratio, share, cap)
    # The release orders by a softmax so flat that differences below about 1e-4 tie.
    flat = (token_scores.float() * 0.001).reshape(grid.frames, grid.per_frame).softmax(1).flatten()
    chosen = top_indices_per_frame(flat, grid, counts)
    return fill_evenly(chosen, grid.num_tokens, budget - by_score if share < 1 else 0), chosen, counts
