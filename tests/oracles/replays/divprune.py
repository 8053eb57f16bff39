"""Cases of divprune.npz: picks in order, and kept positions of a whole sequence."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from replays import Archive, Case, groups, judged, same_indices
from vidsieve.compressors.divprune import diverse_picks

_START = 35
"""Where the release assumes the visual block to start."""


def cases(archive: Archive) -> Iterator[Case]:
    """Yield ``sel/*`` (pick order) and ``seq/*`` (kept positions)."""
    for case in groups(archive, 2):
        if case.startswith("sel/"):
            yield _picks(archive, case)
        elif case.startswith("seq/"):
            yield _sequence(archive, case)
        else:
            yield Case("divprune", case, "-", float("nan"), "no such method yet", "unknown kind of case")


def _picks(archive: Archive, case: str) -> Case:
    features = torch.from_numpy(archive[f"{case}/x"])
    wanted = archive[f"{case}/selected_in_order"]
    count = round(float(archive[f"{case}/ratio"]) * features.shape[0])
    ours = diverse_picks(features, count, repeat=True)[0]
    if same_indices(ours, wanted) == 0:
        return judged("divprune", case, {"pick order": 0.0})
    # Exact duplicates: the release's order follows rounding noise. Both must be greedy optima all the same.
    unit = torch.nn.functional.normalize(features.double(), dim=1)
    compared = {
        "size": float(abs(len(wanted) - count)),
        "their greedy optimality": _regret(unit, wanted.tolist()),
        "our greedy optimality": _regret(unit, ours.tolist()),
    }
    return judged("divprune", case, compared, "ties: scores compared", tolerance=2e-6)


def _regret(unit: Tensor, order: list[int]) -> float:
    """Return how far any pick falls short of the farthest token at its step, given the picks before it."""
    distance = 1 - unit @ unit.T
    lonely = distance.clone().fill_diagonal_(torch.inf).amin(1)
    worst = float(lonely.max() - lonely[order[0]])
    nearest = distance[order[0]].clone()
    nearest[order[0]] = 0
    for pick in order[1:]:
        worst = max(worst, float(nearest.max() - nearest[pick]))
        nearest = torch.minimum(nearest, distance[pick])
        nearest[pick] = 0
    return worst


def _sequence(archive: Archive, case: str) -> Case:
    embeds = torch.from_numpy(archive[f"{case}/embeds"])
    length, ratio = int(archive[f"{case}/img_len"]), float(archive[f"{case}/ratio"])
    block = embeds[_START : _START + length]
    picks = diverse_picks(block, round(ratio * length), repeat=True)[0].numpy() + _START
    kept = np.sort(np.concatenate([np.arange(_START), picks, np.arange(_START + length, len(embeds))]))
    return judged("divprune", case, {"kept positions": same_indices(kept, archive[f"{case}/keep_indexs"])})
