"""The explicit question path of CaCoVID's variant "ours": every video token against every word of the question."""

from __future__ import annotations

import math
from typing import Literal

import msgspec
import torch
from torch import Tensor, nn

from vidsieve.compressors._decoder import Attention, BlockShape, RMSNorm, rotary
from vidsieve.policies import Size, head, in_full, mlp
from vidsieve.types import Prompt, VideoTokens

Looks = Literal["all", "mean", "none"]


class ScorerSettings(msgspec.Struct, forbid_unknown_fields=True):
    """The arguments of a `QuestionScorer`."""

    heads: Size = 8
    head_width: Size = 32
    width: Size = 64
    trust: float = 0.25
    looks: Looks = "all"


class FirstLook(nn.Module):
    """The LLM's own first look at the question: queries and keys of its layer 0, kept as they are."""

    def __init__(self, shape: BlockShape) -> None:
        super().__init__()
        self.shape = shape
        self.self_attn = Attention(shape)
        del self.self_attn.v_proj, self.self_attn.o_proj
        self.input_layernorm = RMSNorm(shape.hidden_size, shape.rms_norm_eps)
        self.requires_grad_(False)

    def forward(self, video: VideoTokens, prompt: Prompt) -> Tensor:
        """Return log-attention (heads, words, N) from each question word to each video token, 0 = uniform."""
        question = prompt.question_mask
        words, tokens = self.input_layernorm(prompt.embeds[question]), self.input_layernorm(video.embeds)
        queries = self.self_attn.queries(words, rotary(prompt.positions[:, question], self.shape))
        keys = self.self_attn.keys(tokens, rotary(video.positions, self.shape))
        keys = keys.repeat_interleave(self.shape.num_heads // self.shape.num_kv_heads, 0)
        logits = queries @ keys.transpose(1, 2) / math.sqrt(self.shape.head_dim)
        return logits.float().log_softmax(-1) + math.log(tokens.shape[0])


class QuestionScorer(nn.Module):
    """Token and frame logits from three looks at the question.

    1. The first look of the LLM (frozen): per head, the strongest and the weighted mean log-attention that a
       token gets from the question's words, and the strongest of all heads.
    2. A learned match: the token's similarity to each word in `heads` small spaces, soft maximum and weighted
       sum over words. The sum lets two words name one thing that neither names alone.
    3. The token itself, its change against the frame before, and a summary of the question, in `width`
       dimensions.

    The weights of words are learned too. Token scores start in the order of the strongest first look, times `trust`.
    With `looks` "mean" the first look is the weighted mean alone, and the weights of words and heads must be learned;
    with "none" it is left out. In both cases the policy starts without knowledge.
    """

    def __init__(
        self,
        shape: BlockShape,
        heads: int = 8,
        head_width: int = 32,
        width: int = 64,
        trust: float = 0.25,
        looks: Looks = "all",
    ) -> None:
        super().__init__()
        self.heads, self.head_width = heads, head_width
        size = shape.hidden_size
        self.looks = looks
        self.first_look = FirstLook(shape) if looks != "none" else None
        self.norm_token, self.norm_word = RMSNorm(size, shape.rms_norm_eps), RMSNorm(size, shape.rms_norm_eps)
        self.key, self.query = nn.Linear(size, heads * head_width), nn.Linear(size, heads * head_width)
        self.content, self.change = nn.Linear(size, width), nn.Linear(size, width)
        self.weigh_words, self.summary = nn.Linear(size, 1), nn.Linear(size, width)
        count = {"all": 2 * shape.num_heads + 1, "mean": shape.num_heads, "none": 0}[looks]
        start = torch.zeros(count)
        if looks == "all":
            start[-1] = trust
        self.trust = nn.Parameter(start)
        self.token_head = mlp([count + 2 * heads + 3 * width, width, width // 2, 2])
        for parameter in self.token_head[-1].parameters():
            nn.init.zeros_(parameter)
        self.frame_head = mlp([width // 2, width // 2, 2])

    def forward(self, video: VideoTokens, prompt: Prompt) -> tuple[Tensor, Tensor]:
        """Return token logits (N, 2) and frame logits (T, 2)."""
        tokens = self.norm_token(video.embeds)
        words = self.norm_word(prompt.embeds[prompt.question_mask])
        weight = self.weigh_words(words).softmax(0)  # (words, 1)
        look = self._look(video, prompt, weight).to(tokens.dtype)  # (N, 2H + 1)
        keys = self.key(tokens).unflatten(1, (self.heads, -1))  # (N, h, e)
        queries = self.query(words).unflatten(1, (self.heads, -1))  # (words, h, e)
        similar = torch.einsum("nhe,whe->nhw", keys, queries) / math.sqrt(self.head_width)
        match = torch.cat([similar.logsumexp(2), similar @ weight[:, 0]], 1)  # (N, 2h)
        frames = tokens.reshape(video.grid.frames, video.grid.per_frame, -1)
        change = torch.cat([frames[:1], frames[1:] - frames[:-1]]).flatten(0, 1)
        summary = (weight * self.summary(words)).sum(0).expand(tokens.shape[0], -1)
        features = torch.cat([look, match, self.content(tokens), self.change(change), summary], 1)
        hidden = self.token_head[:-1](features)
        first = look @ self.trust
        logits = in_full(self.token_head[-1], hidden) + torch.stack([-first, first], 1) / 2
        pooled = hidden.reshape(video.grid.frames, video.grid.per_frame, -1).amax(1)
        return logits, head(self.frame_head, pooled)

    def _look(self, video: VideoTokens, prompt: Prompt, weight: Tensor) -> Tensor:
        """Return the features of the first look (N, 2H + 1), (N, H) or (N, 0); `weight` (words, 1) sums to 1."""
        if self.first_look is None:
            return video.embeds.new_zeros(video.num_tokens, 0)
        attention = self.first_look(video, prompt).clamp(-8, 8)  # (H, words, N)
        mean: Tensor = (attention * weight).sum(1)  # (H, N)
        if self.looks == "mean":
            return mean.T
        strongest = attention.amax(1)  # (H, N)
        return torch.cat([strongest, mean, strongest.amax(0, keepdim=True)]).T
