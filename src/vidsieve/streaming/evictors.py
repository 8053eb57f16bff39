"""What decides which tokens of a stream stay: a score for each, known when its frame comes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from vidsieve.adapters.adapter import Adapter
from vidsieve.adapters.encoded import VideoFeatures
from vidsieve.compressors.base import Compressor, ScoreCompressor
from vidsieve.compressors.calibrated import Calibrated
from vidsieve.errors import StreamError
from vidsieve.types import ENCODER_NEEDS, READS_QUESTION, Stage, Tokens, VideoTokens

_GOLDEN = 0.6180339887498949


def _random(frame: int, count: int, seed: int) -> Tensor:
    return torch.from_numpy(np.random.default_rng((seed, frame)).random(count, dtype=np.float32))


def _uniform(frame: int, count: int, seed: int) -> Tensor:
    return torch.full((count,), frame * _GOLDEN % 1.0)


def _recent(frame: int, count: int, seed: int) -> Tensor:
    return torch.full((count,), float(frame))


BASELINES: Mapping[str, Callable[[int, int, int], Tensor]] = {"random": _random, "uniform": _uniform, "recent": _recent}
"""Scores (n,) of a frame's n tokens by its number and a seed: what stays is a random sample of all tokens, whole frames
that are spread evenly over the stream (multiples of the golden ratio), or the last frames."""


def scores_of(
    compressor: ScoreCompressor | str, frame: VideoFeatures, number: int, last: Tensor | None, seed: int
) -> Tensor:
    """Return the scores (n,) float32 of the n tokens of one frame.

    Parameters
    ----------
    compressor : ScoreCompressor, or one of the `BASELINES`
    frame : VideoFeatures
    number : int
        Its number in the stream.
    last : Tensor or None, (n, D)
        The frame before.
    seed : int

    Raises
    ------
    StreamError
        If scores are missing, or not finite.
    """
    count, device = frame.grid.num_tokens, frame.embeds.device
    if isinstance(compressor, str):
        return BASELINES[compressor](number, count, seed).to(device)
    embeds = frame.embeds if last is None else torch.cat([last, frame.embeds])
    grid = replace(frame.grid, frames=1 if last is None else 2)
    video = VideoTokens(embeds, grid, torch.zeros(1, len(embeds), dtype=torch.int64, device=device))
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        scores = compressor.score(video).float()
    if scores.shape != (len(embeds),) or not bool(torch.isfinite(scores).all()):
        raise StreamError(f"{compressor.name} gave no finite score for each of {len(embeds)} tokens")
    return scores[-count:]


def check_evictor(adapter: Adapter, compressor: ScoreCompressor | str) -> None:
    """Refuse a compressor that cannot score a frame when it comes."""
    if isinstance(compressor, str) and compressor in BASELINES:
        return
    if not isinstance(compressor, Compressor):
        raise StreamError(
            f"{compressor!r} is no baseline: give one of {', '.join(BASELINES)}, or a method by vidsieve.load"
        )
    name = compressor.name
    if name in BASELINES:
        raise StreamError(f"{name} chooses in a whole video: for the baseline of streams give its name, {name!r}")
    if READS_QUESTION & compressor.needs:
        other = (
            f"use its variant 'blind' (on the command line {name}:blind)"
            if "blind" in compressor.variants
            else "use one that does not, as score, to evict, and this one as the reader"
        )
        raise StreamError(f"{name} reads the question, which is not known when tokens are evicted: {other}")
    if isinstance(compressor, Calibrated):
        raise StreamError(f"{name} is calibrated, and a stream evicts to a number of tokens: load it with a retention")
    if not isinstance(compressor, ScoreCompressor) or compressor.acts is not Stage.PRE_LLM:
        raise StreamError(
            f"{name} gives no score that a frame alone tells of its tokens: evict by one that does, as score or "
            f"frame_difference, and use {name} as the reader"
        )
    if not compressor.local:
        raise StreamError(
            f"{name} scores a token by the whole video (local is False), which is not known when tokens are evicted: "
            "use score, sieve's variant 'blind' or frame_difference"
        )
    if compressor.front is not None:
        raise StreamError(f"{compressor.front.name} acts {compressor.front.stage.value}: leave it out of a stream")
    if isinstance(compressor.retention, Tokens):
        raise StreamError(f"{name} scores for a retention, and a stream has no number of tokens: give it a fraction")
    adapter.check(compressor)


def check_reader(adapter: Adapter, reader: Compressor) -> None:
    """Refuse a reader that needs more than the tokens in memory and the question."""
    adapter.check(reader)
    if ENCODER_NEEDS & reader.needs or reader.front is not None:
        raise StreamError(f"{reader.title} needs the vision encoder, whose work is done when a question is asked")
