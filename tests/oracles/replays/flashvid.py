"""Cases of flashvid.npz: whole videos, and the choice inside the LLM."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from replays import Archive, Case, gap, groups, judged, noise_pieces, noisy, same_indices
from vidsieve.compressors._clustering import frame_means, neighbours_alike
from vidsieve.compressors.flashvid import (
    FlashVID,
    Form,
    cut,
    distinct_picks,
    merged_segments,
    merged_trees,
    official_share,
    relevances,
)
from vidsieve.testing.views import GivenView
from vidsieve.types import TokenGrid

_FORMS: dict[str, Form] = {"attn_div": "v1", "attn_div_v2": "v2"}


def cases(archive: Archive) -> Iterator[Case]:
    """Yield every recorded case."""
    for case, keys in groups(archive, 1).items():
        if f"{case}/out_idx" in keys:
            yield _video(archive, case)
        elif f"{case}/attn_last_row" in keys:
            yield _inner(archive, case)
        else:
            yield Case("flashvid", case, "-", float("nan"), "no such method yet", "unknown kind of case")


def method_of(settings: dict[str, Any]) -> FlashVID:
    """Return the method with a release's settings; without its segments or their least number there are no cuts."""
    segmented = settings["do_segment"]
    return FlashVID(
        settings["retention_ratio"],
        "official",
        form=_FORMS[settings["token_selection_method"]],
        alpha=settings["alpha"],
        threshold=settings["temporal_threshold"],
        segments=settings["min_segment_num"] if segmented and settings["complementary_segment"] else 1,
        segment_threshold=settings["segment_threshold"] if segmented else -2.0,
        expansion=settings["expansion"],
        inner=False,
    )


def _video(archive: Archive, case: str) -> Case:
    def of(key: str) -> Tensor:
        return torch.from_numpy(archive[f"{case}/{key}"])

    method = method_of(json.loads(str(archive[f"{case}/cfg"])))
    frames, attention = of("x"), of("attn")
    count, size = frames.shape[:2]
    spans = cut(neighbours_alike(frames.mean(1)), method.segments, method.segment_threshold, release=True)
    share = official_share(size, float(method.budget_ratio(count * size)), method.expansion, method.alpha)
    relevance = relevances(frames, frame_means(frames), spans) if method.form == "v2" else None
    picks = distinct_picks(frames, attention * 1e6, relevance, share[0], again=method.form == "v2", exact=True)
    with noisy(noise_pieces(archive, case)):
        kept, tokens = merged_segments(frames, picks, spans, [share] * count, method.threshold, release=True)
    compared = {
        "segments": same_indices([stop - start for start, stop in spans], of("segment_lengths")),
        "shares": same_indices(share, [int(of("num_adts")), int(of("num_sttm"))]),
        "picks": same_indices(picks.sort().values, of("adts")),
        "kept": same_indices(kept.sort().values, of("out_idx")),
        "tokens": gap(*(_rows(*pair) for pair in ((kept, tokens), (of("out_idx"), of("out"))))),
    }
    if f"{case}/tstm_segs" in archive:
        left = []
        for start, stop in spans:
            if stop - start > 1:
                free = torch.ones(stop - start, size, dtype=torch.bool).scatter(1, picks[start:stop], False)
                least = sum(share) * (stop - start)
                places, _ = merged_trees(frames[start:stop], free, method.threshold, least, release=True)
                left.append(places + start * size)
        found = torch.cat(left)
        long = [t for start, stop in spans for t in range(start, stop) if stop - start > 1]
        compared |= {
            "roots of trees": same_indices(found % size, of("tstm_idx")),
            "roots a frame": same_indices(torch.bincount(found // size, minlength=count)[long], of("tstm_counts")),
        }
    return judged("flashvid", case, compared)


def _rows(indices: Tensor, tokens: Tensor) -> Tensor:
    """Return tokens (K, D) by index; those of one index by their first number, as their order is undefined."""
    order = np.lexsort((tokens[:, 0].numpy(), indices.numpy()))
    return tokens[order.tolist()]


def _inner(archive: Archive, case: str) -> Case:
    rows = torch.from_numpy(archive[f"{case}/attn_last_row"])
    start, count = int(archive[f"{case}/start"]), int(archive[f"{case}/length"])
    method = FlashVID(variant="official", inner_kept=float(archive[f"{case}/r"]))
    ((layer, keep),) = method.stages(28, count)
    given = {("last", layer - 1): rows[:, None, start : start + count]}
    chosen = method.step(GivenView(layer, 28, TokenGrid(1, 1, count), torch.arange(count), rows=given), keep).indices
    kept = torch.cat([torch.arange(start), chosen + start, torch.arange(start + count, rows.shape[1])])
    compared = {
        "count": abs(keep - int(archive[f"{case}/new_length"])),
        "kept": same_indices(kept, archive[f"{case}/keep_idx"]),
        "positions": same_indices(kept, archive[f"{case}/position_ids"]),
    }
    return judged("flashvid", case, compared)
