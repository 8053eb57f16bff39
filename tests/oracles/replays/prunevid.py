"""Cases of prunevid.npz: whole videos with their part inside the LLM, and refined labels."""

from __future__ import annotations

import json
from collections.abc import Iterator

import torch
from torch import Tensor

from replays import Archive, Case, gap, groups, judged, noise_pieces, noisy, same_indices
from vidsieve.compressors.prunevid import (
    clustered,
    frame_labels,
    official_choice,
    official_count,
    refined,
    runs_of,
    split,
)


def cases(archive: Archive) -> Iterator[Case]:
    """Yield every recorded case."""
    for case, keys in groups(archive, 1).items():
        if f"{case}/features" in keys:
            yield _video(archive, case)
        elif f"{case}/inp" in keys:
            made = [refined(row.tolist()) for row in archive[f"{case}/inp"]]
            lengths = [[stop - start for start, stop in runs_of(row)] for row in made]
            compared = {"refined": same_indices(made, archive[f"{case}/out"])}
            if f"{case}/segs" in archive:
                compared["segments"] = 0.0 if lengths == json.loads(str(archive[f"{case}/segs"])) else float("inf")
            yield judged("prunevid", case, compared)
        else:
            yield Case("prunevid", case, "-", float("nan"), "no such method yet", "unknown kind of case")


def _video(archive: Archive, case: str) -> Case:
    def of(key: str) -> Tensor:
        return torch.from_numpy(archive[f"{case}/{key}"])

    frames = of("x")
    noise = iter(noise_pieces(archive, case))
    with noisy(noise):
        labels = frame_labels(frames.mean(1), int(len(frames) * float(of("temporal_segment_ratio"))))
    steady = refined(labels)
    spans = runs_of(steady)
    parts = split(frames, spans, float(of("tau")))
    counts = [official_count(len(part.places), float(of("cluster_ratio"))) for part in parts]
    with noisy(noise):
        made = [clustered(part, count) for part, count in zip(parts, counts, strict=True)]
    static, dynamic = [0] * len(spans), [0] * len(spans)
    for part, count in zip(parts, counts, strict=True):
        frame = int(part.places[0]) // frames.shape[1]
        segment = next(i for i, (start, stop) in enumerate(spans) if start <= frame < stop)
        (static if part.length else dynamic)[segment] += count
    numbers = torch.repeat_interleave(torch.arange(len(parts)), torch.tensor(counts))
    kept = official_choice(of("text2img_attn").amax((0, 1)), numbers, float(of("alpha")))
    compared = {
        "clusters of frames": same_indices(labels, of("frame_clusters_raw")),
        "refined": same_indices(steady, of("frame_clusters_refined")),
        "segments": same_indices([stop - start for start, stop in spans], of("window_sizes")),
        "static": same_indices(static, of("static_sizes")),
        "dynamic": same_indices(dynamic, of("dynamic_sizes")),
        "features": gap(torch.cat([tokens for _, tokens in made]), of("features")),
        "kept inside": same_indices(kept, of("llm_keep_idx_unsorted")),
        "kept, sorted": same_indices(kept.sort().values, of("llm_keep_idx")),
    }
    return judged("prunevid", case, compared)
