"""Cases of evs.npz: retention masks of whole videos, and vLLM's M-RoPE positions after pruning."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from replays import Archive, Case, gap, groups, judged, same_indices
from vidsieve.compressors.evs import dissimilarity, media_positions, official_count, recomputed_positions
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
