"""The explicit question path of CaCoVID's variant "ours": every video token against every word of the question."""

from __future__ import annotations

import math
from typing import Literal, get_args

import msgspec
import torch
from torch import Tensor, nn

from vidsieve.compressors._decoder import Attention, BlockShape, RMSNorm, rotary
from vidsieve.errors import UnknownNameError
from vidsieve.policies import Size, head, in_full, mlp
from vidsieve.types import Prompt, VideoTokens

Match = Literal["sum", "softmax", "cross_attention", "mean"]


class ScorerSettings(msgspec.Struct, forbid_unknown_fields=True):
    """The arguments of a `QuestionScorer`."""

    match: str = "sum"
    match_width: Size = 128
    width: Size = 64
    first_look: bool = False
    budget: bool = False


class FirstLook(nn.Module):
    """The LLM's own first look at the question: queries and keys of a layer, kept as they are.

    The layer is the first with full attention, so layer 0 in most models.
    """

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
    """Token and frame logits from the words of the question, the token, and its change against the frame before.

    A token's score is the sum over the question's words w of (Q·norm(w))·(K·norm(x)) / √m, so that two words name one
    thing that neither names alone, plus a small network on [x; x − x of the frame before]. Q, and the last layer of the
    network, start at zero: the policy starts without knowledge. A frame's score is the largest of its tokens'.

    With `budget`, the network also knows the fraction of tokens that will be kept, and if there is a question at all;
    without a question, words add nothing.

    With `first_look`, the strongest `FirstLook` of a token is added to its score, times a learned weight.

    `match` changes how words and tokens meet: "softmax" weighs words by a softmax over them, "cross_attention" hands
    the words so weighed to the network, and "mean" compares the token with the mean of the words.
    """

    def __init__(
        self,
        shape: BlockShape,
        match: str = "sum",
        match_width: int = 128,
        width: int = 64,
        first_look: bool = False,
        budget: bool = False,
    ) -> None:
        super().__init__()
        if match not in get_args(Match):
            raise UnknownNameError("match", match, get_args(Match))
        size = shape.hidden_size
        self.match, self.match_width = match, match_width
        self.norm_token, self.norm_word = RMSNorm(size, shape.rms_norm_eps), RMSNorm(size, shape.rms_norm_eps)
        self.key, self.query = (nn.Linear(size, match_width, bias=False) for _ in range(2))
        nn.init.orthogonal_(self.key.weight)
        self.content, self.change = nn.Linear(size, width), nn.Linear(size, width)
        self.head = mlp([2 * width, width, 1])
        for parameter in self.head[-1].parameters():
            nn.init.zeros_(parameter)
        self.budget = nn.Linear(2, 2 * width) if budget else None
        if match == "cross_attention":
            self.words = nn.Linear(match_width, 2 * width, bias=False)
            nn.init.orthogonal_(self.query.weight)
        else:
            nn.init.zeros_(self.query.weight)
        self.first_look = FirstLook(shape) if first_look else None
        if first_look:
            self.trust = nn.Parameter(torch.tensor(0.25))

    def forward(
        self, video: VideoTokens, prompt: Prompt | None, retention: float | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return token logits (N, 2) and frame logits (T, 2); `retention` is read where the scorer has a `budget`."""
        tokens, grid = self.norm_token(video.embeds), video.grid
        frames = tokens.reshape(grid.frames, grid.per_frame, -1)
        change = torch.cat([frames[:1], frames[1:] - frames[:-1]]).flatten(0, 1)
        seen = torch.cat([self.content(tokens), self.change(change)], 1)  # (N, 2·width)
        if self.budget is not None and retention is not None:
            known = torch.tensor([math.log(retention) / 2 + 1, float(prompt is not None)]).to(seen)
            seen = seen + self.budget(known)
        scores = torch.zeros(len(tokens), device=tokens.device)
        if prompt is not None:
            match, words = self._match(tokens, prompt.embeds[prompt.question_mask])
            scores, seen = scores + match.float(), seen + words
        scores = scores + head(self.head, seen)[:, 0].float()
        if self.first_look is not None and prompt is not None:
            look = self.first_look(video, prompt).clamp(-8, 8).amax((0, 1))  # (N,)
            scores = scores + self.trust * look
        best = scores.reshape(grid.frames, -1).amax(1)
        return torch.stack([-scores, scores], 1) / 2, torch.stack([-best, best], 1) / 2

    def _match(self, tokens: Tensor, words: Tensor) -> tuple[Tensor, Tensor]:
        """Return the match (N,) of tokens (N, D) with the question's words (W, D), and what the network gets of it."""
        words = self.norm_word(words.mean(0, keepdim=True) if self.match == "mean" else words)
        keys, queries = in_full(self.key, tokens), in_full(self.query, words)  # (N, m), (W, m)
        scale = math.sqrt(self.match_width)
        if self.match in ("sum", "mean"):
            return keys @ queries.sum(0) / scale, tokens.new_zeros(())
        logits = keys @ queries.T / scale  # (N, W)
        weight = logits.softmax(1)
        if self.match == "cross_attention":
            return tokens.new_zeros(len(tokens)), self.words(weight @ queries)
        return (weight * logits).sum(1), tokens.new_zeros(())
