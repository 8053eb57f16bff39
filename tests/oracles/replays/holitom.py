"""Cases of holitom.npz: whole videos, windows alone, and the merge inside the LLM."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from replays import Archive, Case, gap, groups, judged, noise_pieces, noisy, same_indices, with_newlines
from vidsieve.compressors.holitom import HoliTom, adjusted, grouped, kept_of_groups, official_counts, windows
from vidsieve.testing.views import GivenView
from vidsieve.types import TokenGrid


def cases(archive: Archive) -> Iterator[Case]:
    """Yield every recorded case."""
    for case, keys in groups(archive, 1).items():
        if f"{case}/token_rows" in keys:
            yield _video(archive, case)
        elif f"{case}/hidden_in" in keys:
            yield _inner(archive, case)
        elif f"{case}/sim" in keys:
            found, reduced = windows(torch.from_numpy(archive[f"{case}/sim"]) > float(archive[f"{case}/tau"]), 1024)
            compared = {
                "windows": same_indices(found, archive[f"{case}/windows"]),
                "reduced": abs(reduced - float(archive[f"{case}/total_reduced"])),
            }
            yield judged("holitom", case, compared)
        else:
            yield Case("holitom", case, "-", float("nan"), "no such method yet", "unknown kind of case")


def _video(archive: Archive, case: str) -> Case:
    def of(key: str) -> Tensor:
        return torch.from_numpy(archive[f"{case}/{key}"])

    frames, attention = of("x"), of("attn").flatten()
    count, size = frames.shape[:2]
    alike = F.cosine_similarity(frames[:-1], frames[1:], dim=-1)
    same = alike > float(of("tau"))
    found, reduced = windows(same, int(of("max_window")))
    ratio = adjusted(float(of("ratio")), reduced, count * size)
    parts = grouped(frames, same, found)
    counts = official_counts(parts, ratio)
    with noisy(noise_pieces(archive, case)):
        kept, tokens = kept_of_groups(parts, counts, attention, int(of("K")), float(of("Beta")))
    rows = torch.cat(
        [
            torch.tensor([[_window(found, int(places[0]) // size), int(part.length == 0)]]).expand(len(places), 2)
            for part, places in zip(parts, torch.split(kept, counts), strict=True)
            if len(places)
        ]
    )
    rows = torch.cat([rows, torch.stack([kept // size, kept % size], 1)], 1)
    theirs = of("token_rows")
    if str(archive[f"{case}/newline_mode"]) == "grid":  # in raster order, a newline behind every row that is not empty
        width = int(of("grid")[1])
        order = kept.argsort()
        _, tokens = with_newlines(kept, tokens, of("newline"), width)
        rows, theirs = rows[order], theirs[(theirs[:, 2] * size + theirs[:, 3]).argsort()]
    compared = {
        "similarity": gap(alike, of("feature_sim")),
        "windows": same_indices(found, of("windows")),
        "reduced": abs(reduced - float(of("total_reduced"))),
        "ratio": abs(ratio - float(of("ratio_adjusted"))) if of("ratio_adjusted").is_floating_point() else 0.0,
        "kept": same_indices(rows, theirs),
        "tokens": gap(tokens, of("out")),
    }
    return judged("holitom", case, compared)


def _inner(archive: Archive, case: str) -> Case:
    hidden = torch.from_numpy(archive[f"{case}/hidden_in"])[0]
    row = torch.from_numpy(archive[f"{case}/attn_last_row_headmean"])
    start, count = int(archive[f"{case}/start"]), int(archive[f"{case}/length"])
    method = HoliTom(variant="official", inner_kept=1 - float(archive[f"{case}/r"]))
    ((_, keep),) = method.stages(28, count)
    video = slice(start, start + count)
    rows, tensors = {("last", 17): row[None, None, video]}, {"hidden": hidden[video]}
    choice = method.step(
        GivenView(18, 28, TokenGrid(1, 1, count), torch.arange(count), rows=rows, tensors=tensors), keep
    )
    chosen = choice.indices
    kept = torch.cat([torch.arange(start), chosen + start, torch.arange(start + count, len(hidden))])
    made = torch.cat([hidden[:start], choice.hidden, hidden[start + count :]])
    compared = {
        "kept": same_indices(kept, archive[f"{case}/keep_idx"]),
        "best": same_indices(chosen + start, sorted(archive[f"{case}/top_idx_unsorted"])),
        "hidden states": gap(made, archive[f"{case}/hidden_out"][0]),
        "positions": same_indices(kept, archive[f"{case}/position_ids"]),
    }
    return judged("holitom", case, compared)


def _window(found: list[tuple[int, int]], frame: int) -> int:
    return next(number for number, (first, last) in enumerate(found) if first <= frame <= last)
