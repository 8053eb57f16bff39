"""Cases of vidcom2.npz: channels, likenesses, shares, what is kept, and vLLM's exact count."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from replays import Archive, Case, gap, groups, judged, same_indices
from vidsieve.compressors.vidcom2 import (
    corrected,
    frame_shares,
    kept_by_shares,
    likeness,
    low_variance_channels,
)
from vidsieve.selection import indices_to_mask
from vidsieve.types import TokenGrid


def cases(archive: Archive) -> Iterator[Case]:
    """Yield every recorded video."""
    for case in groups(archive, 1):
        yield _video(archive, case)


def _video(archive: Archive, case: str) -> Case:
    def of(key: str) -> torch.Tensor:
        return torch.from_numpy(archive[f"{case}/{key}"])

    frames, size = int(archive[f"{case}/T"]), int(archive[f"{case}/tpf"])
    ratio, side = float(archive[f"{case}/ratio"]), round(size**0.5)
    grid = TokenGrid(frames, side, side) if side * side == size else TokenGrid(frames, 1, size)
    tokens = of("x").reshape(frames, size, -1)
    to_video, to_frame = likeness(tokens)
    alike, shares = to_video + to_frame, frame_shares(to_video, ratio)
    kept = kept_by_shares(alike, shares, grid)
    handed_on = with_newlines(kept, grid) if "vid" in str(archive[f"{case}/model"]) else kept
    exact = corrected(alike, kept, max(frames, int(frames * size * (1 - (1 - ratio)))))
    return judged(
        "vidcom2",
        case,
        {
            "channels": same_indices(low_variance_channels(tokens), of("chan_idx_sorted")),
            "likeness": max(gap(to_video, of("vid_score")), gap(to_frame, of("frame_score"))),
            "shares": gap(shares, of("scales")),
            "counts": same_indices(torch.bincount(kept // size, minlength=frames), of("ks")),
            "kept": same_indices(handed_on, of("keep_idx")),
            "vLLM's mask": same_indices(indices_to_mask(exact, grid.num_tokens), of("vllm_mask")),
        },
    )


def with_newlines(chosen: Tensor, grid: TokenGrid) -> Tensor:
    """Return the tokens that the release hands on of a LLaVA-Video grid, by frame: the kept ones, then newlines.

    Indices (K + T·H,) int64 count tokens of the grid with a newline behind every row, T × H × (W + 1).
    """
    frame, place = chosen // grid.per_frame, chosen % grid.per_frame
    row, column = place // grid.width, place % grid.width
    width = grid.width + 1
    tokens = (frame * grid.height + row) * width + column
    newlines = torch.arange(grid.frames * grid.height, device=chosen.device) * width + grid.width
    owner = torch.cat([frame, torch.arange(len(newlines), device=chosen.device) // grid.height])
    return torch.cat([tokens, newlines])[owner.argsort(stable=True)]
