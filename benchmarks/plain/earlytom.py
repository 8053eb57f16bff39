"""EarlyTom: frames walked one by one inside the encoder, tokens chosen frame by frame; inside the LLM as HoliTom."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from plain.holitom import inside

__all__ = ["inside", "merge", "segments", "select"]


def alike(one: Tensor, other: Tensor) -> float:
    """Return the mean cosine of two frames (S, D) at the same places."""
    return float(F.cosine_similarity(one, other, dim=-1).mean())


def segments(frames: Tensor, threshold: float = 0.6, window: int = 8, newest: float = 0.9) -> list[tuple[int, int]]:
    """Return the first and last frame of each segment of frames (T, S, D)."""
    found, start, running = [], 0, 1.0
    for frame in range(1, len(frames)):
        running = newest * alike(frames[start], frames[frame]) + (1 - newest) * running
        if running < threshold or frame - start + 1 >= window:
            found.append((start, frame - 1))
            start, running = frame, 1.0
    return [*found, (start, len(frames) - 1)]


def merge(frames: Tensor, attention: Tensor, spans: list[tuple[int, int]]) -> tuple[Tensor, Tensor]:
    """Return the frames (T', S, D) that segments of (T, S, D) become, and their attention (T', S) of (T, S)."""
    out: list[tuple[Tensor, Tensor]] = []
    for first, last in spans:
        out.append((frames[first], attention[first]))
        middle = list(range(first + 1, last))
        bound = alike(frames[first], frames[last])
        near = [alike(frames[a], frames[a + 1]) for a in middle[:-1]]
        if len(middle) == 1:
            out.append((frames[middle[0]], attention[middle[0]]))
        place = 0
        while place < len(near):  # the last frame of the middle is reached as a partner alone
            own, after = near[place], near[place + 1] if place + 1 < len(near) else None
            a, b = middle[place], middle[place + 1]
            if own > bound and (after is None or own > after):
                share = 1.0 if after is None else own / (own + after)
                mixed = (share * rows[a] + (1 - share) * rows[b] for rows in (frames, attention))
                out.append(tuple(mixed))  # type: ignore[arg-type]
                place += 2
            else:
                out.append((frames[a], attention[a]))
                place += 1
        if last > first:
            out.append((frames[last], attention[last]))
    made, seen = zip(*out, strict=True)
    return torch.stack(made), torch.stack(seen)


def select(attention: Tensor, groups: list[tuple[int, int]], ratio: float, frames: int) -> Tensor:
    """Return kept raster indices, frame by frame, of the attention (T', n) of what is left of `frames`."""
    left, size = attention.shape
    share = min(ratio / (left / frames), 1.0)
    edge, inner = math.ceil(size * share), max(1, round(size * share))
    kept = []
    for first, last in groups:
        for frame in range(first, last + 1):
            row = attention[frame]
            if frame in (first, last):
                places = row.topk(edge).indices.sort().values
            else:
                runs = torch.arange(size).tensor_split(inner)
                places = torch.stack([run[row[run].argmax()] for run in runs])
            kept.append(places + frame * size)
    return torch.cat(kept)
