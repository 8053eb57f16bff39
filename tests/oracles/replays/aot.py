"""Cases of aot.npz: anchors and their pooled masks, merging within frames, merging along clips."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from replays import Archive, Case, gap, groups, judged, same_indices
from vidsieve.compressors.aot import anchors, merged_along, merged_within
from vidsieve.selection import mask_to_indices
from vidsieve.types import TokenGrid


def cases(archive: Archive) -> Iterator[Case]:
    """Yield every recorded case."""
    for case, keys in groups(archive, 1).items():
        if f"{case}/deep" in keys:
            yield _anchors(archive, case)
        elif f"{case}/out_kept" in keys:
            yield _within(archive, case)
        elif f"{case}/segments" in keys:
            yield _along(archive, case)
        else:
            yield Case("aot", case, "-", float("nan"), "no such method yet", "unknown kind of case")


def _anchors(archive: Archive, case: str) -> Case:
    shallow, deep = (torch.from_numpy(archive[f"{case}/{key}"]) for key in ("shallow", "deep"))
    side = round(shallow.shape[1] ** 0.5)
    count, share = int(archive[f"{case}/visual_token_num"]), float(archive[f"{case}/global_ratio"])
    grid = TokenGrid(len(deep), side, side)
    chosen = anchors(shallow, deep, grid, count, share, lossy=True)
    mask = torch.zeros_like(deep, dtype=torch.bool).scatter(1, chosen, True)
    both = torch.cat([torch.from_numpy(archive[f"{case}/{key}"]) for key in ("local_idx", "global_idx")], 1)
    compared = {
        "anchors": same_indices(chosen, both.sort(1).values),
        "mask": same_indices(mask, archive[f"{case}/mask"]),
    }
    return judged("aot", case, compared)


def _within(archive: Archive, case: str) -> Case:
    frames, mask = (torch.from_numpy(archive[f"{case}/{key}"]) for key in ("x", "mask"))
    side = round(frames.shape[1] ** 0.5)
    places = mask.nonzero()[:, 1].reshape(len(frames), -1)
    merged = merged_within(frames, places, TokenGrid(len(frames), side, side), official=True)
    return judged("aot", case, {"merged anchors": gap(merged, archive[f"{case}/out_kept"])})


def _along(archive: Archive, case: str) -> Case:
    frames, mask = (torch.from_numpy(archive[f"{case}/{key}"]) for key in ("x", "mask"))
    keep, scaling = float(archive[f"{case}/keep_ratio"]), float(archive[f"{case}/scaling"])
    kept, rows = torch.zeros_like(mask), []
    for start, count in archive[f"{case}/segments"].tolist():
        clip = [frames[t][mask[t]] for t in range(start, start + count)]
        anchor, stays = merged_along(clip, keep, scaling)
        kept[start] = mask[start]
        for t, own in enumerate(stays, start + 1):
            kept[t, mask_to_indices(mask[t])[own]] = True
        rows += [clip[0], *(tokens[own] for tokens, own in zip(clip[1:], stays, strict=True))]
        rows += [anchor] if count > 1 else []
    compared = {
        "kept": same_indices(kept, archive[f"{case}/kept"]),
        "tokens": gap(torch.cat(rows), archive[f"{case}/out"]),
    }
    return judged("aot", case, compared)
