"""AutoGaze's network: video to patches of several scales, frame by frame, a few patches at a time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import msgspec
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vidsieve.compressors._decoder import BlockShape, DecoderBlock, RMSNorm, rotate
from vidsieve.errors import PolicyError
from vidsieve.policies import Size

Cache = list[tuple[Tensor, Tensor]]
"""Turned keys and values (B, heads, L, head_dim) of every layer."""


@dataclass(frozen=True)
class Llama3Rope:
    """Llama 3's scaling of rotary frequencies: waves longer than a share of the trained length are slowed down."""

    factor: Annotated[float, msgspec.Meta(ge=1)] = 8.0
    original_max_position_embeddings: Size = 8192
    low_freq_factor: Annotated[float, msgspec.Meta(gt=0)] = 1.0
    high_freq_factor: Annotated[float, msgspec.Meta(gt=0)] = 4.0

    def scaled(self, frequencies: Tensor) -> Tensor:
        """Return the frequencies (f,) scaled."""
        turns = self.original_max_position_embeddings * frequencies / (2 * math.pi)
        smooth = ((turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)).clamp(0, 1)
        return frequencies * (smooth + (1 - smooth) / self.factor)


@dataclass(frozen=True)
class GazeShape:
    """Sizes of the network.

    Parameters
    ----------
    scales : tuple of int
        Sides of the scales in pixels, ascending.
    tokens : int
        Patches of a frame, over all scales.
    image : int
        Side to which frames are resized.
    patch : int
        Side of a patch of the network's own input.
    block : BlockShape
        A layer of its decoder.
    layers : int
    at_once : int
        Patches that one step of the decoder gives.
    depth : int
        Convolutions over time and space.
    rope : Llama3Rope or None
    """

    scales: tuple[int, ...]
    tokens: int
    image: int
    patch: int
    block: BlockShape
    layers: int
    at_once: int
    depth: int = 1
    rope: Llama3Rope | None = None

    def __post_init__(self) -> None:
        ascending = list(self.scales) == sorted(self.scales) and self.scales[0] > 0
        if not ascending or sum(side * side for side in self.sides) != self.tokens:
            raise PolicyError(f"scales {self.scales!s:.80} do not share {self.tokens} patches of a frame as squares")

    @property
    def sides(self) -> tuple[int, ...]:
        """Patches in a row of each scale."""
        area = sum(scale * scale for scale in self.scales)
        return tuple(round((scale * scale / area * self.tokens) ** 0.5) for scale in self.scales)

    @property
    def frequencies(self) -> Tensor:
        """Rotary frequencies (head_dim / 2,) float32."""
        steps = torch.arange(self.block.head_dim // 2, dtype=torch.float32)
        plain = self.block.rope_theta ** (-steps * 2 / self.block.head_dim)
        return plain if self.rope is None else self.rope.scaled(plain)


class _Causal(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv3d = nn.Conv3d(width, width, 3, padding=(0, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        convolved: Tensor = self.conv3d(F.pad(x, (0, 0, 0, 0, 2, 0)))
        return convolved.relu()


class _Stem(nn.Module):
    """Features (B, T, n, D) of frames (B, T, 3, side, side); a frame sees the two before it through each block."""

    def __init__(self, shape: GazeShape) -> None:
        super().__init__()
        width, size = shape.block.hidden_size, (1, shape.patch, shape.patch)
        self.temporal_conv = nn.Conv3d(3, width, size, stride=size)
        self.norm = nn.LayerNorm(width)
        self.blocks = nn.ModuleList(_Causal(width) for _ in range(shape.depth))
        self.out_proj = nn.Conv3d(width, width, 1)

    def forward(self, video: Tensor) -> Tensor:
        x = self.temporal_conv(video.transpose(1, 2))
        x = self.norm(x.movedim(1, -1)).movedim(-1, 1)
        for block in self.blocks:
            x = block(x)
        features: Tensor = self.out_proj(x)
        return features.movedim(1, -1).flatten(2, 3)


class _Places(nn.Module):
    def __init__(self, count: int, width: int) -> None:
        super().__init__()
        self.pos_embed = nn.Parameter(torch.randn(count, width))


class _Llama(nn.Module):
    def __init__(self, shape: GazeShape) -> None:
        super().__init__()
        width = shape.block.hidden_size
        self.embed_tokens = nn.Embedding(shape.tokens + 1, width)
        self.layers = nn.ModuleList(DecoderBlock(shape.block) for _ in range(shape.layers))
        self.norm = RMSNorm(width, shape.block.rms_norm_eps)


class _Decoder(nn.Module):
    def __init__(self, shape: GazeShape) -> None:
        super().__init__()
        self.model = _Llama(shape)
        self.lm_head = nn.Linear(shape.block.hidden_size, shape.at_once * (shape.tokens + 1), bias=False)
        self.task_loss_prediction_head = nn.Linear(shape.block.hidden_size, shape.at_once, bias=False)


class GazeNetwork(nn.Module):
    """The gazing network; parameters are named as in the release, below its ``gazing_model``.

    B videos of T frames; n features of a frame, width D, V patches of a frame and an end token, K patches a step.
    """

    def __init__(self, shape: GazeShape) -> None:
        super().__init__()
        self.shape = shape
        self.vision_model = _Stem(shape)
        self.connector = _Places((shape.image // shape.patch) ** 2, shape.block.hidden_size)
        self.gaze_decoder = _Decoder(shape)

    def features(self, video: Tensor) -> Tensor:
        """Return the features (B, T, n, D) of a video (B, T, 3, H, W), resized without antialiasing."""
        frames = F.interpolate(video.flatten(0, 1), size=(self.shape.image,) * 2, mode="bicubic", align_corners=False)
        seen: Tensor = self.vision_model(frames.reshape(*video.shape[:3], *frames.shape[2:]))
        return seen + self.connector.pos_embed

    def generate(
        self, video: Tensor, limit: int, requirement: float | None = None, running: bool = False
    ) -> list[Tensor]:
        """Return the patches (B, n_t) int64 of each frame in order of gaze, greedily; the end token is padding.

        A frame ends at `limit` patches, or with the step that gives one of predicted loss ≤ `requirement`: it becomes
        padding, unless it is the frame's first, and others of its step stay.

        Parameters
        ----------
        video : Tensor, (B, T, 3, H, W), floating
        limit : int
            From 1 to V.
        running : bool
            Number patches that are fed back as training does. The release gives them the places of the frame's last
            features; only a frame's last step, fed back with the next frame, has its own place.
        """
        features, end, embed = self.features(video), self.shape.tokens, self.gaze_decoder.model.embed_tokens
        cache: Cache = []
        seen = torch.ones(len(video), 0, dtype=torch.bool, device=video.device)
        step, frames = seen.long(), []
        for t in range(video.shape[1]):
            seen = torch.cat([seen, seen.new_ones(features[:, t].shape[:2])], 1)
            fed = torch.cat([embed(step), features[:, t]], 1)
            places = (seen.cumsum(1) - 1)[:, -fed.shape[1] :]
            state = self._decode(fed, places, seen, cache)[:, -1:]
            chosen, alive, inside = seen[:, :0].long(), seen.new_ones(len(video)), seen
            while True:
                step = self._step(state, chosen, limit)
                met = torch.zeros_like(step, dtype=torch.bool)
                if requirement is not None:
                    met = self.gaze_decoder.task_loss_prediction_head(state)[:, 0, : step.shape[1]] <= requirement
                    met[:, : int(not chosen.shape[1])] = False
                step = step.masked_fill(met | ~alive[:, None], end)
                before, chosen = chosen.shape[1], torch.cat([chosen, step], 1)
                alive = alive & ~met.any(1)
                if chosen.shape[1] >= limit or not bool(alive.any()):
                    break
                inside = torch.cat([inside, inside.new_ones(step.shape)], 1)
                own = places[:, -step.shape[1] :]
                if running:
                    own = places[:, -1:] + 1 + torch.arange(before, chosen.shape[1], device=own.device)
                state = self._decode(embed(step), own, inside, cache)[:, -1:]
            seen = torch.cat([seen, chosen != end], 1)
            frames.append(chosen)
        return frames

    def likelihood(self, video: Tensor, frames: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Return the probability (B, n) of each patch that was gazed at, and the loss predicted after it, (B, n).

        One pass over the whole video, differentiable, with places numbered as they run. Probabilities are among all
        patches and the end token, those that cannot be chosen again included, as in the release.

        Parameters
        ----------
        video : Tensor, (B, T, 3, H, W), floating
        frames : sequence of Tensor, (B, n_t), int64
            As `generate` returns them; what padding gets means nothing.
        """
        features, at_once, end = self.features(video), self.shape.at_once, self.shape.tokens
        parts, masks, places, numbers, start = [], [], [], [], 0
        for t, tokens in enumerate(frames):
            number = torch.arange(tokens.shape[1], device=video.device)
            parts += [features[:, t], self.gaze_decoder.model.embed_tokens(tokens)]
            masks += [torch.ones_like(features[:, t, :, 0], dtype=torch.bool), tokens != end]
            places.append(number + start + features.shape[2])
            numbers.append(number)
            start += features.shape[2] + len(number)
        seen, place, number = torch.cat(masks, 1), torch.cat(places), torch.cat(numbers)
        states = self._decode(torch.cat(parts, 1), seen.cumsum(1) - 1, seen, [])
        logits = self._logits(states)[:, place - number % at_once - 1, number % at_once]
        gazed = torch.cat(list(frames), 1)
        probability = logits.softmax(-1).gather(2, gazed[..., None])[..., 0]
        head = (number + 1) % at_once
        return probability, self.gaze_decoder.task_loss_prediction_head(states)[:, place - head, head]

    def _step(self, state: Tensor, chosen: Tensor, limit: int) -> Tensor:
        """Return the next patches (B, k) int64 after a state (B, 1, D), one of each head in turn, none of `chosen`."""
        scores = self._logits(state)[:, 0]
        taken = torch.ones_like(scores[:, 0], dtype=torch.bool)
        taken[:, :-1] = False  # the end token never comes
        taken = taken.scatter(1, chosen, True)
        picks = [chosen[:, :0]]
        for head in range(min(self.shape.at_once, limit - chosen.shape[1])):
            picks.append(scores[:, head].masked_fill(taken, -torch.inf).argmax(-1, keepdim=True))
            taken = taken.scatter(1, picks[-1], True)
        return torch.cat(picks, 1)

    def _logits(self, states: Tensor) -> Tensor:
        """Return the logits (B, L, K, V + 1) float32 of states (B, L, D)."""
        logits: Tensor = self.gaze_decoder.lm_head(states).unflatten(-1, (self.shape.at_once, -1))
        return logits.float()

    def _decode(self, x: Tensor, places: Tensor, seen: Tensor, cache: Cache) -> Tensor:
        """Return the states (B, L, D) of new embeddings (B, L, D); their keys and values are added to `cache`.

        `places` (B, L) are rotary positions; `seen` (B, L') bool the tokens so far, new ones included, that may be
        attended to from their place on.
        """
        block, total = self.shape.block, seen.shape[1]
        order = torch.arange(total, device=x.device)
        mask = (order <= order[total - x.shape[1] :, None]) & seen[:, None, None]
        angles = places[:, None, :, None] * self.shape.frequencies.to(x.device)
        turn = (angles.cos().repeat(1, 1, 1, 2), angles.sin().repeat(1, 1, 1, 2))
        layer: Any
        for number, layer in enumerate(self.gaze_decoder.model.layers):
            attention, normed = layer.self_attn, layer.input_layernorm(x)
            projected = (attention.q_proj(normed), attention.k_proj(normed), attention.v_proj(normed))
            q, k, v = (part.unflatten(-1, (-1, block.head_dim)).transpose(1, 2) for part in projected)
            k = rotate(k, *turn)
            if number < len(cache):
                k, v = torch.cat([cache[number][0], k], 2), torch.cat([cache[number][1], v], 2)
            cache[number : number + 1] = [(k, v)]
            mixed = F.scaled_dot_product_attention(
                rotate(q, *turn), k, v, attn_mask=mask, enable_gqa=block.num_heads > block.num_kv_heads
            )
            x = x + attention.o_proj(mixed.transpose(1, 2).flatten(2))
            x = x + layer.mlp(layer.post_attention_layernorm(x))
        states: Tensor = self.gaze_decoder.model.norm(x)
        return states
