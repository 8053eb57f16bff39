"""Cases of dycoke.npz: tokens kept of whole videos, and what consecutive steps of decoding read."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from replays import Archive, Case, gap, groups, judged, same_indices
from vidsieve.compressors.dycoke import DyCoke, official_tokens, similarities
from vidsieve.compressors.inside import DecodeView
from vidsieve.types import TokenGrid


def cases(archive: Archive) -> Iterator[Case]:
    """Yield every case."""
    for case in groups(archive, 1):
        yield _decoding(archive, case) if case.startswith("kv") else _merging(archive, case)


def _merging(archive: Archive, case: str) -> Case:
    """Compare the kept tokens and their order."""
    frames = torch.from_numpy(archive[f"{case}/x"])
    grid, embeds = TokenGrid(len(frames), 1, frames.shape[1]), frames.flatten(0, 1)
    ours = official_tokens(grid, embeds, 1 - float(archive[f"{case}/k"]))
    theirs = torch.from_numpy(archive[f"{case}/keep_idx"])
    order = ours.argsort(), theirs.argsort()
    compared = {
        "kept": same_indices(ours[order[0]], theirs[order[1]]),
        # Rounding may swap two tokens of almost the same similarity.
        "similarity in order": gap(*(similarities(frames).flatten()[some] for some in (ours, theirs))),
        "output": gap(embeds[ours][order[0]], torch.from_numpy(archive[f"{case}/out"])[order[1]]),
    }
    return judged("dycoke", case, compared)


def _decoding(archive: Archive, case: str) -> Case:
    """Compare what each step reads of the cache: all text, and the chosen video tokens."""
    start, length, prompt = (int(archive[f"{case}/{name}"]) for name in ("start", "length", "L0"))
    method = DyCoke(variant="official", dropped=float(archive[f"{case}/p"]))
    before, compared = None, {"read": 0.0, "cosine": 0.0}
    for step in range(int(archive[f"{case}/steps"])):
        attention = torch.from_numpy(archive[f"{case}/attn_{step}"])[:, 0]
        # The release's block is one short of the video: the token behind it is always read.
        view = DecodeView(
            3, TokenGrid(1, 1, length + 1), torch.arange(length + 1), attention[:, start : start + length + 1]
        )
        read = method.read(view, before)
        total = attention.shape[1]
        if read is None:
            ours = np.arange(0)  # the release notes nothing where all is read
        else:
            outside = np.concatenate([np.arange(start), np.arange(start + length + 1, total)])
            ours = np.sort(np.concatenate([outside, start + read.numpy()]))
        wanted = np.sort(archive[f"{case}/keep_{step}"])
        compared["read"] = max(compared["read"], same_indices(ours, wanted))
        if before is not None:
            now, earlier = (some.attention[:, :length].mean(0) for some in (view, before))
            cosine = float(torch.nn.functional.cosine_similarity(now, earlier, dim=0))
            compared["cosine"] = max(compared["cosine"], gap(cosine, float(archive[f"{case}/cos_{step}"])))
        before = view
    return judged("dycoke", case, compared, f"{prompt} tokens in the prompt")
