"""Contribution of every token to an answer, measured, and the LLM's attention to it (CaCoVID, Fig. 1)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Generator

from vidsieve.adapters.adapter import Adapter
from vidsieve.errors import EvaluationError
from vidsieve.training.controls import attention_rows
from vidsieve.training.rollouts import Rollouts
from vidsieve.types import TokenGrid

RIVALS = 8
"""Words that compete with the answer: those the model finds likeliest with all tokens."""


@dataclass(frozen=True)
class Contributions:
    """Contributions of one video's tokens to one answer.

    Parameters
    ----------
    grid : TokenGrid
    answer : int
        The word that all tokens lead to.
    contribution : (N,) float64
        Mean log-odds of the answer among subsets with a token, less that among those without it.
    error : (N,) float64
        Its standard error.
    attention : (N,) float64
        Of the last prompt token, mean over heads and over all layers but the last.
    subsets : int
    share : float
        Of all tokens, in each subset.
    """

    grid: TokenGrid
    answer: int
    contribution: NDArray[np.float64]
    error: NDArray[np.float64]
    attention: NDArray[np.float64]
    subsets: int
    share: float

    @property
    def sure(self) -> NDArray[np.bool_]:
        """True for tokens (N,) that contribute more than 3.5 standard errors: by chance one in four thousand."""
        sure: NDArray[np.bool_] = self.contribution > 3.5 * self.error
        return sure


@torch.no_grad()
def contributions(
    adapter: Adapter,
    inputs: Mapping[str, Any],
    *,
    subsets: int = 512,
    share: float = 0.25,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Contributions:
    """Measure what each video token of one prompt contributes to the model's own first word.

    Parameters
    ----------
    inputs : of one prompt with one video
    subsets : random subsets of the tokens that the model is run on
    share : of all tokens, in each of them

    Raises
    ------
    EvaluationError
        If subsets or share leave nothing to compare.
    """
    rollouts = Rollouts(adapter, inputs)
    span = rollouts.encoded.videos[0]
    count = span.features.grid.num_tokens
    size = round(share * count)
    if subsets < 2 or not 0 < size < count:
        raise EvaluationError(
            f"{subsets} subsets of {size} of {count} tokens: give two or more, of a part of the tokens"
        )
    everything = torch.ones(1, count, dtype=torch.bool)
    words = torch.arange(adapter.model.get_input_embeddings().weight.shape[0])
    likeliest = rollouts.option_logits(everything, words)[0].float().topk(RIVALS).indices.cpu()
    draw, masks = Generator().manual_seed(seed), torch.zeros(subsets, count, dtype=torch.bool)
    for mask in masks:
        mask[torch.randperm(count, generator=draw)[:size]] = True
    odds = []
    for start in range(0, subsets, 32):
        logits = rollouts.option_logits(masks[start : start + 32], likeliest).double().cpu()
        odds.append(logits[:, 0] - logits[:, 1:].logsumexp(1))
        if progress:
            progress(min(start + 32, subsets), subsets)
    mean, error = effects(masks.numpy(), torch.cat(odds).numpy())
    attention = attention_received(rollouts)
    return Contributions(span.features.grid, int(likeliest[0]), mean, error, attention, subsets, share)


def effects(masks: NDArray[np.bool_], values: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return of every token the mean value of the subsets with it less that of those without, and its standard error.

    Parameters
    ----------
    masks : (M, N)
    values : (M,)
    """
    means, errors, seen = [], [], np.ones(masks.shape[1], bool)
    for chosen in (masks, ~masks):
        count = chosen.sum(0)
        seen &= count > 0
        mean = values @ chosen / np.maximum(count, 1)
        means.append(mean)
        errors.append(np.maximum((values**2) @ chosen / np.maximum(count, 1) - mean**2, 0) / np.maximum(count, 1))
    return np.where(seen, means[0] - means[1], 0.0), np.where(seen, np.sqrt(errors[0] + errors[1]), np.inf)


def attention_received(rollouts: Rollouts) -> NDArray[np.float64]:
    """Return the attention (N,) of the last prompt token to the tokens of a prompt's one video, mean over layers."""
    last = rollouts.encoded.attention_mask[0].nonzero().flatten()[-1:]
    layers = attention_rows(rollouts, last, range(len(rollouts.adapter.decoder_layers) - 1))  # each (H, 1, N)
    return torch.stack([weights.mean((0, 1)).cpu() for weights in layers]).mean(0).double().numpy()
