"""Cases of evs.npz: retention masks of whole videos, and vLLM's M-RoPE positions after pruning."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from replays import Archive, Case, gap, groups, judged, same_indices
from vidsieve.compressors.evs import dissimilarity, official_count
from vidsieve.selection import indices_to_mask, top_indices
from vidsieve.types import TokenGrid

_RATE, _SECONDS = 2.0, 1.0
"""Temporal positions a second, and seconds between frames, of the recorded positions."""


def cases(archive: Archive) -> Iterator[Case]:
    """Yield every recorded video, and every recorded prompt."""
    for case, keys in groups(archive, 1).items():
        if f"{case}/mask" in keys:
            yield _video(archive, case)
        elif f"{case}/mrope_media_kept" in keys:
            yield _prompt(archive, case)
        else:
            yield Case("evs", case, "-", float("nan"), "no such method yet", "unknown kind of case")


def _video(archive: Archive, case: str) -> Case:
    frames, height, width = (int(n) for n in archive[f"{case}/thw"])
    merge = int(archive[f"{case}/merge"])
    grid = TokenGrid(frames, height // merge, width // merge)
    tokens = torch.from_numpy(archive[f"{case}/x"]).reshape(frames, grid.per_frame, -1)
    scores = dissimilarity(tokens)
    count = official_count(grid, float(archive[f"{case}/q"]))
    kept = top_indices(scores.flatten(), count)
    compared = {
        "count": float(abs(count - int(archive[f"{case}/count"]))),
        "dissimilarity": gap(scores[1:], archive[f"{case}/dissim"]),
        "kept": same_indices(kept, archive[f"{case}/keep_idx"]),
        "mask": same_indices(indices_to_mask(kept, grid.num_tokens), archive[f"{case}/mask"]),
    }
    if f"{case}/mrope_media" in archive:
        positions = media_positions(grid, _RATE, _SECONDS)
        compared["positions"] = same_indices(positions, archive[f"{case}/mrope_media"])
        compared["kept positions"] = same_indices(positions[kept], archive[f"{case}/mrope_kept"])
    return judged("evs", case, compared)


def _prompt(archive: Archive, case: str) -> Case:
    ids: Tensor = torch.from_numpy(archive[f"{case}/input_ids"])
    media = [torch.from_numpy(archive[f"{case}/mrope_media_kept"])]
    positions, delta = recomputed_positions(ids, media, np.asarray(archive[f"{case}/token_ids"])[1:].tolist())
    compared = {
        "positions": same_indices(positions, archive[f"{case}/positions"]),
        "delta": float(abs(delta - int(archive[f"{case}/delta"]))),
    }
    return judged("evs", case, compared)


def media_positions(grid: TokenGrid, tokens_per_second: float, seconds_per_grid: float) -> Tensor:
    """Return (N, 4) int64: time, row and column of every token, and the width of the grid, as vLLM stores them."""
    moments = (torch.arange(grid.frames) * tokens_per_second * seconds_per_grid).long()
    axes = torch.meshgrid(moments, torch.arange(grid.height), torch.arange(grid.width), indexing="ij")
    return torch.stack([*axes, torch.full_like(axes[0], grid.width)], -1).reshape(-1, 4)


def recomputed_positions(input_ids: Tensor, media: Sequence[Tensor], media_ids: Sequence[int]) -> tuple[Tensor, int]:
    """Return the positions of a pruned prompt as vLLM numbers them, and what decoding adds to a token's index.

    A medium's tokens keep time, row and column, counted from one past the text before it. Text behind it goes on one
    grid width later, which in long videos lies before the last of its tokens.

    Parameters
    ----------
    input_ids : Tensor, (L,), int64
        With one placeholder for every kept token.
    media : sequence of Tensor, (K, 4), int64
        `media_positions` of the kept tokens of each video or image, in the order of the prompt.
    media_ids : sequence of int
        Ids of the placeholders.

    Returns
    -------
    positions : Tensor, (3, L), int64
    delta : int
        The largest position plus one, minus L.
    """
    is_media = torch.isin(input_ids, torch.tensor(list(media_ids), device=input_ids.device))
    parts: list[Tensor] = []
    cursor = following = 0
    places = is_media.nonzero().flatten()
    for kept in media:
        start, places = int(places[0]), places[len(kept) :]
        base = following + start - cursor
        parts += [_text(following, base), kept[:, :3].T + base]
        following, cursor = base + int(kept[-1, 3]), start + len(kept)
    parts.append(_text(following, following + len(input_ids) - cursor))
    positions = torch.cat([part.to(input_ids.device) for part in parts], 1)
    return positions, int(positions.max()) + 1 - len(input_ids)


def _text(start: int, stop: int) -> Tensor:
    return torch.arange(start, stop).expand(3, -1)
