"""The decoder block of policies: one layer of a Qwen2-like LLM, over one prompt, with any mask."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import msgspec
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vidsieve.errors import PolicyError
from vidsieve.policies import Size


@dataclass(frozen=True)
class BlockShape:
    """Sizes of a decoder block, as an LLM's configuration states them.

    `rope_sections` are the numbers of rotary frequencies that read the time, height and width row of the
    positions (M-RoPE); empty for 1-D positions. `rope_interleaved`: the sections take turns (time, height, width,
    time, …) instead of following each other. `rope_width` is the number of a head's first numbers that are turned, 0
    without rotary positions, None for all; `rope_still` the number of their last frequencies that are 0. `query_gate`:
    the LLM's projection to queries gives each head a gate after its query; blocks of ours have none.
    """

    hidden_size: Size
    num_heads: Size
    num_kv_heads: Size
    head_dim: Annotated[int, msgspec.Meta(ge=2, le=2**20, multiple_of=2)]
    intermediate_size: Size
    rms_norm_eps: Annotated[float, msgspec.Meta(ge=0)] = 1e-6
    rope_theta: Annotated[float, msgspec.Meta(gt=0)] = 10000.0
    rope_sections: tuple[Annotated[int, msgspec.Meta(ge=0)], ...] = ()
    qkv_bias: bool = True
    qk_norm: bool = False
    rope_interleaved: bool = False
    rope_width: Annotated[int, msgspec.Meta(ge=0, multiple_of=2)] | None = None
    rope_still: Annotated[int, msgspec.Meta(ge=0)] = 0
    query_gate: bool = False

    @property
    def turned(self) -> int:
        """Number of a head's first numbers that are turned."""
        return self.head_dim if self.rope_width is None else self.rope_width

    def __post_init__(self) -> None:
        object.__setattr__(self, "rope_sections", tuple(self.rope_sections))
        if self.num_heads % self.num_kv_heads:
            raise PolicyError(f"{self.num_heads} query heads cannot share {self.num_kv_heads} key heads")
        if self.rope_sections and sum(self.rope_sections) * 2 != self.turned:
            raise PolicyError(
                f"rope sections {self.rope_sections} do not add up to half of the {self.turned} numbers of a head that "
                "are turned"
            )

    @classmethod
    def of_width(cls, hidden_size: int) -> BlockShape:
        """Return the shape of a small block of this width, for policies that take over no layer of an LLM."""
        return cls(hidden_size, 2, 1, hidden_size // 2, 2 * hidden_size)


@dataclass(frozen=True)
class LayerState:
    """One decoder layer of an LLM, as a policy can take it over: its shape and its weights by name."""

    shape: BlockShape
    weights: dict[str, Tensor]


class RMSNorm(nn.Module):
    """x / rms(x) · weight, the mean taken in float32."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Return the normalised (…, width)."""
        wide = x.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.to(x.dtype)


def rotary(positions: Tensor, shape: BlockShape) -> tuple[Tensor, Tensor]:
    """Return cosines and sines (L, w) float32 of rotary positions (P, L) int64, w numbers of a head being turned.

    With sections, frequency f reads the row of its section: the first ones time, then height, then width; or, where
    they are interleaved, every third one height or width as long as its section lasts.

    Raises
    ------
    PolicyError
        If the number of position rows does not fit the sections.
    """
    half = shape.turned // 2
    steps = torch.arange(half, dtype=torch.float32, device=positions.device)
    frequencies = shape.rope_theta ** (-steps * 2 / shape.turned) * (steps < half - shape.rope_still)
    if positions.shape[0] != max(1, len(shape.rope_sections)):
        raise PolicyError(f"the block needs {max(1, len(shape.rope_sections))} position rows, got {positions.shape[0]}")
    if shape.rope_sections:
        counts = torch.tensor(shape.rope_sections, device=positions.device)
        row = torch.repeat_interleave(torch.arange(len(counts), device=positions.device), counts)
        if shape.rope_interleaved:
            row = torch.zeros_like(row)
            for axis in range(1, len(shape.rope_sections)):
                row[axis : 3 * shape.rope_sections[axis] : 3] = axis
    else:
        row = torch.zeros(half, dtype=torch.int64, device=positions.device)
    angles = positions[row].T.float() * frequencies  # (L, w / 2)
    angles = torch.cat([angles, angles], -1)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Return queries or keys (heads, L, head_dim) whose first w numbers are turned by cosines and sines (L, w)."""
    width = cosine.shape[-1]
    first, second, rest = x.tensor_split((width // 2, width), -1)
    turned = x[..., :width] * cosine.to(x.dtype) + torch.cat([-second, first], -1) * sine.to(x.dtype)
    return torch.cat([turned, rest], -1) if rest.shape[-1] else turned


class Attention(nn.Module):
    """Grouped-query attention with rotary positions; parameters are named as in transformers."""

    def __init__(self, shape: BlockShape) -> None:
        super().__init__()
        s = self.shape = shape
        self.q_proj = nn.Linear(s.hidden_size, s.num_heads * s.head_dim, bias=s.qkv_bias)
        self.k_proj = nn.Linear(s.hidden_size, s.num_kv_heads * s.head_dim, bias=s.qkv_bias)
        self.v_proj = nn.Linear(s.hidden_size, s.num_kv_heads * s.head_dim, bias=s.qkv_bias)
        self.o_proj = nn.Linear(s.num_heads * s.head_dim, s.hidden_size, bias=False)
        if s.qk_norm:
            self.q_norm, self.k_norm = RMSNorm(s.head_dim, s.rms_norm_eps), RMSNorm(s.head_dim, s.rms_norm_eps)

    def queries(self, x: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
        """Return turned queries (heads, L, head_dim) of x (L, D)."""
        q = self.q_proj(x).unflatten(-1, (self.shape.num_heads, -1)).transpose(0, 1)
        return rotate(self.q_norm(q) if self.shape.qk_norm else q, *turn)

    def keys(self, x: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
        """Return turned keys (kv heads, L, head_dim) of x (L, D)."""
        k = self.k_proj(x).unflatten(-1, (self.shape.num_kv_heads, -1)).transpose(0, 1)
        return rotate(self.k_norm(k) if self.shape.qk_norm else k, *turn)

    def forward(self, x: Tensor, turn: tuple[Tensor, Tensor], mask: Tensor | None, causal: bool) -> Tensor:
        """Return (L, D); `mask` (L, L) bool, True = attend, or None for everything (before it, if causal)."""
        v = self.v_proj(x).unflatten(-1, (self.shape.num_kv_heads, -1)).transpose(0, 1)
        q, k, groups = self.queries(x, turn), self.keys(x, turn), self.shape.num_heads // self.shape.num_kv_heads
        grouped = groups > 1
        if grouped and q.is_cuda and q.dtype == torch.float32:
            # No fused kernel has grouped heads in float32, and the plain one holds all of (heads, L, L) at once.
            k, v, grouped = k.repeat_interleave(groups, 0), v.repeat_interleave(groups, 0), False
        out = F.scaled_dot_product_attention(
            q[None], k[None], v[None], attn_mask=mask, is_causal=causal, enable_gqa=grouped
        )
        mixed: Tensor = self.o_proj(out[0].transpose(0, 1).flatten(1))
        return mixed


class GatedMLP(nn.Module):
    """SwiGLU feed-forward."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, inner, bias=False)
        self.up_proj = nn.Linear(width, inner, bias=False)
        self.down_proj = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return (…, width)."""
        out: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class DecoderBlock(nn.Module):
    """Pre-norm attention and (optionally) SwiGLU, each with its residual.

    Equal to layer 0 of a Qwen2 or Qwen2.5-VL language model when its weights are loaded: the state-dict
    names are the same.
    """

    def __init__(self, shape: BlockShape, feed_forward: bool = True) -> None:
        super().__init__()
        self.shape = shape
        self.self_attn = Attention(shape)
        self.input_layernorm = RMSNorm(shape.hidden_size, shape.rms_norm_eps)
        if feed_forward:
            self.post_attention_layernorm = RMSNorm(shape.hidden_size, shape.rms_norm_eps)
            self.mlp = GatedMLP(shape.hidden_size, shape.intermediate_size)

    def forward(self, x: Tensor, positions: Tensor, mask: Tensor | None = None, causal: bool = False) -> Tensor:
        """Return hidden states (L, D) of a prompt (L, D) at `positions` (P, L)."""
        turn = rotary(positions, self.shape)
        x = x + self.self_attn(self.input_layernorm(x), turn, mask, causal)
        return x + self.mlp(self.post_attention_layernorm(x)) if hasattr(self, "mlp") else x
