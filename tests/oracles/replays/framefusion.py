"""Cases of framefusion.npz: repeated steps on a recorded sequence, the budget's rule, and chains."""

from __future__ import annotations

import json
from collections.abc import Iterator
from fractions import Fraction

import numpy as np
import torch
from torch import Tensor

from replays import Archive, Case, gap, groups, judged, same_indices
from vidsieve.compressors.framefusion import by_place, chain_heads, collapsed, excess, merged_step, similarity
from vidsieve.selection import top_indices
from vidsieve.types import TokenGrid

_DEPTH = 28
"""Layers of the release, whatever the model has."""


def cases(archive: Archive) -> Iterator[Case]:
    """Yield every recorded case."""
    for case, keys in groups(archive, 1).items():
        if f"{case}/n_calls" in keys:
            yield _calls(archive, case)
        elif f"{case}/inputs" in keys:
            made = []
            for recorded, cost, depth in json.loads(str(archive[f"{case}/inputs"])):
                made.append(float(_excess(recorded, cost, depth)))
            # The recorded output has room for whole numbers in some versions of the file.
            yield judged("framefusion", case, {"share to go": gap(made, archive[f"{case}/out"])})
        elif f"{case}/inp" in keys:
            ends = [_lengths(torch.from_numpy(row).bool()) for row in archive[f"{case}/inp"]]
            yield judged("framefusion", case, {"chains": same_indices(ends, archive[f"{case}/out"])})
        else:
            yield Case("framefusion", case, "-", float("nan"), "no such method yet", "unknown kind of case")


def _excess(sparsities: list[float], cost: float, depth: int) -> float:
    shares = np.cumprod([1 - s for s in sparsities]).tolist()
    return float(excess([Fraction(share) for share in shares], Fraction(cost), depth))


def _lengths(merged: Tensor) -> list[int]:
    """Return the length of every run at its last place, 0 elsewhere."""
    heads = chain_heads(merged)
    made = torch.where(merged, torch.arange(len(merged)) - heads, 0)
    last = merged & ~torch.cat([merged[1:], torch.zeros(1, dtype=torch.bool)])
    found: list[int] = torch.where(last, made, 0).tolist()
    return found


def _calls(archive: Archive, case: str) -> Case:
    def of(key: str) -> Tensor:
        return torch.from_numpy(archive[f"{case}/{key}"])

    tokens = of("x")
    frames, size = tokens.shape[:2]
    grid = TokenGrid(frames, 1, size)
    start, behind = len(of("text_before")), len(of("text_after"))
    cost, threshold, least = (float(of(key)) for key in ("cost", "sim_lower", "ratio_lower"))
    hidden = torch.cat([of("text_before"), tokens.flatten(0, 1), of("text_after")])
    alive = torch.arange(frames * size)
    recorded: list[float] = []
    done = False  # with merging
    compared = {}
    for call in range(int(of("n_calls"))):
        if call:
            hidden = hidden + torch.tanh(hidden @ of("layer_W")[call - 1])
        over, video = _excess(recorded, cost, _DEPTH), slice(start, start + len(alive))
        if done:
            attention = of(f"call{call}_attn").mean(0)[video]
            kept = top_indices(attention, round(len(alive) * (1 - over)))
            part = hidden[video][kept]
        else:
            alike = similarity(hidden[video], alive, grid)
            if not call:
                order = by_place(alive, grid)
                compared["similarity"] = gap(alike[order], of("sim_by_patch0"))
                compared["order"] = same_indices(order + start, of("token_index_by_patch0"))
            merged = merged_step(alike, threshold, over, int(over * len(alive)))
            enough = float((alike >= threshold).sum()) / len(alike) >= over
            kept = (~merged).nonzero().flatten()
            part = collapsed(hidden[video], merged, alive, grid)
            if not enough:
                recorded.append(float(merged.sum()) / len(alive))
            done = enough or recorded[-1] < least
        hidden = torch.cat([hidden[:start], part, hidden[start + len(alive) :]])
        alive = alive[kept]
        sequence = torch.cat(
            [
                torch.arange(start),
                alive + start,
                torch.arange(behind) + start + frames * size,
            ]
        )
        compared[f"kept {call}"] = same_indices(sequence, of(f"call{call}_kept"))
        if f"{case}/call{call}_hidden" in archive:
            compared[f"hidden {call}"] = gap(hidden, of(f"call{call}_hidden"))
    compared["merged shares"] = gap(recorded, of("sparsity_list"))
    return judged("framefusion", case, compared)
