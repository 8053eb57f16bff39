"""Cases of fastv.npz: kept positions from one attention row, and a whole Llama with its cache."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from replays import Archive, Case, gap, groups, judged, same_indices
from replays.decoder import passed, recorded_llama
from vidsieve.compressors.fastv import FastV
from vidsieve.testing.views import GivenView
from vidsieve.types import TokenGrid

_START, _TOKENS, _LAYER, _KEPT = 35, 576, 3, 0.5
"""Image block, layer and fraction kept of the recorded model run."""


def cases(archive: Archive) -> Iterator[Case]:
    """Yield ``sel/*`` and the model's run."""
    for case in groups(archive, 2):
        if case.startswith("sel/"):
            yield _selection(archive, case)
    if "model/cfg" in archive:
        yield _model(archive)


def _selection(archive: Archive, case: str) -> Case:
    """Compare what is kept of one prompt; all text stays, positions are the kept indices."""
    start, count = int(archive[f"{case}/sys_len"]), int(archive[f"{case}/img_len"])
    row = torch.from_numpy(archive[f"{case}/attn_last_row"])
    method = FastV(retention=1 - float(archive[f"{case}/r"]), variant="official")
    ((_, keep),) = method.stages(32, count)
    grid = TokenGrid(1, 1, count)
    rows = {("last", 1): row[:, None, start : start + count]}
    chosen = method.step(GivenView(2, 32, grid, torch.arange(count), rows=rows), keep).indices
    length = int(archive[f"{case}/seq_len"])
    ours = np.concatenate([np.arange(start), start + chosen.numpy(), np.arange(start + count, length)])
    wanted = archive[f"{case}/keep_indexs"]
    compared = {"number kept": abs(keep - float(archive[f"{case}/n_keep_img"]))}
    if same_indices(ours, wanted) == 0:
        positions = same_indices(ours, archive[f"{case}/position_ids"])
        return judged("fastv", case, compared | {"kept": 0.0, "positions": positions})
    # Equal scores: the release keeps any of them. What it keeps must score as much as what we keep.
    score = row.mean(0).numpy()
    theirs = np.sort(score[[i for i in wanted if start <= i < start + count]])
    worst = gap(np.sort(score[start + chosen.numpy()]), theirs)
    return judged("fastv", case, compared | {"scores of the kept": worst}, "unstable ties: scores compared", 1e-7)


def _model(archive: Archive) -> Case:
    """Run the recorded Llama with our hooks: attention row, kept positions, hidden states, and our cache lengths."""
    hidden, inner, depth, heads, kv_heads = (int(v) for v in archive["model/cfg"])
    model = recorded_llama(archive, "model/w/", hidden, inner, depth, heads, kv_heads)
    embeds = torch.from_numpy(archive["model/inputs_embeds"])
    method = FastV(retention=_KEPT, layer=_LAYER, variant="official")
    done = passed(model, embeds, _START, _TOKENS, method)
    kept = done.kept[_LAYER]
    wanted = [int(n) for n in archive["model/kv_len_per_layer_sdpa_cache"]]
    wanted[_LAYER - 1] //= 2  # the release fills this layer's cache twice
    compared = {
        "kept positions": same_indices(kept, archive["model/keep_positions"]),
        f"input of layer {_LAYER}": gap(done.entered[_LAYER][kept], archive["model/layer3_input"]),
        "hidden states": gap(done.last, archive["model/last_hidden_state"]),
        "cache lengths": same_indices(done.lengths(), wanted),
    }
    return judged("fastv", "model", compared, "the release's doubled cache of layer 2 is not repeated")
