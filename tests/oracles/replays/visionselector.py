"""Cases of visionselector.npz: scores, what is kept, the soft top-k with its backward, and the constraint's loss."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from replays import Archive, Case, gap, groups, judged, same_indices
from vidsieve.compressors.visionselector import VisionSelector, VisionSelectorPolicy
from vidsieve.training.controls import constraint_loss, shift_to_sum, soft_top_k
from vidsieve.types import TokenGrid, VideoTokens


def cases(archive: Archive) -> Iterator[Case]:
    """Yield every recorded video."""
    for case, keys in groups(archive, 1).items():
        yield _video(archive, case, {key.split("/")[1] for key in keys})


def _video(archive: Archive, case: str, keys: set[str]) -> Case:
    def of(key: str) -> torch.Tensor:
        return torch.from_numpy(archive[f"{case}/{key}"])

    frames = of("x")
    height, width = (int(n) for n in of("grid"))
    tokens, grid, budget = frames.flatten(0, 1), TokenGrid(len(frames), height, width), float(of("budget"))
    policy = VisionSelectorPolicy.start(tokens.shape[1], "none")
    weights = {"query.weight": "wq", "query.bias": "bq", "key.weight": "wk", "key.bias": "bk"}
    policy.load_state_dict({name: of(key) for name, key in weights.items()})
    video = VideoTokens(tokens, grid, torch.arange(len(tokens))[None])
    kept = VisionSelector(budget, "official", policy=policy.eval()).compress(video).indices
    scores, wanted, count = policy(video).detach(), of("keep_idx").long(), int(of("k"))
    ties = len(tokens.unique(dim=0)) < len(tokens)  # which of equal tokens the release keeps is open
    same = gap(of("scores")[kept].sort().values, of("scores")[wanted].sort().values)
    compared = {
        "scores": gap(scores, of("scores")),
        "count": same_indices(len(kept), count),
        "kept": same if ties else same_indices(kept, wanted),
    }
    if "soft" in keys:
        given = of("scores").clone().requires_grad_()
        mask = soft_top_k(given, count)
        (through,) = torch.autograd.grad(mask, given, of("grad_in"))
        loss = constraint_loss(soft_top_k(given, count), given, count)
        (pull,) = torch.autograd.grad(loss, given)
        compared |= {
            "soft": gap(mask.detach(), of("soft")),
            "shift": gap(shift_to_sum(of("scores"), count), of("shift")),
            "backward": gap(through, of("grad_scores")),
            "constraint": gap(loss.detach(), of("constraint_loss")),
            "constraint's gradient": gap(pull, of("grad_constraint")),
        }
    return judged("visionselector", case, compared)
