"""Cases of vcast.npz: curvature, shares, the frames' counts, scores, and what is kept."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from replays import Archive, Case, gap, groups, judged, same_indices
from vidsieve.compressors.vcast import VCast, curvature, official_counts, prominence
from vidsieve.types import TokenGrid, VideoTokens


def cases(archive: Archive) -> Iterator[Case]:
    """Yield every recorded video."""
    for case in groups(archive, 1):
        yield _video(archive, case)


def _video(archive: Archive, case: str) -> Case:
    def of(key: str) -> torch.Tensor:
        return torch.from_numpy(archive[f"{case}/{key}"])

    frames = of("x")
    height, width = (int(n) for n in of("grid"))
    grid = TokenGrid(len(frames), height, width)
    ratio, least, total = float(of("ratio")), int(of("min_k")), int(of("total_budget"))
    centres = F.normalize(frames.mean(1), dim=-1)
    scores = prominence(frames, centres)
    counts = official_counts(of("weights"), total, grid, least)
    tokens = frames.flatten(0, 1)
    video = VideoTokens(tokens, grid, torch.arange(len(tokens))[None])
    kept = VCast(ratio, "official", least=least).compress(video).indices
    wanted = of("keep_idx").long()
    # Where tokens are equal, which of them the release keeps is open.
    ties = bool((frames.flatten(0, 1).unique(dim=0).shape[0]) < len(tokens))
    same = gap(scores.flatten()[kept].sort().values, of("score").flatten()[wanted].sort().values)
    return judged(
        "vcast",
        case,
        {
            "curvature": gap(curvature(centres), of("curvature")),
            "shares": gap((curvature(centres) / 0.7).softmax(0), of("weights")),
            "counts": same_indices(counts, of("k")),
            "scores": gap(scores, of("score")),
            "kept": same if ties else same_indices(kept, wanted),
        },
    )
