"""Cases of sparsevlm.npz: scores and kept tokens of one step, clusters, and whole prompts of both versions."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from replays import Archive, Case, gap, groups, judged, same_indices
from replays.decoder import passed, recorded_llama
from vidsieve.compressors._clustering import Distances, centres, peak_scores
from vidsieve.compressors.sparsevlm import SparseVLM, cluster_means, relevant_words
from vidsieve.testing.views import GivenView
from vidsieve.types import TokenGrid

_LAYERS = (3, 7, 16)
_DEPTH, _HIDDEN, _HEADS, _INNER = 17, 64, 16, 32
"""The recorded model."""


def cases(archive: Archive) -> Iterator[Case]:
    """Yield every recorded case."""
    model: Any = None
    for case in groups(archive, 2):
        if case.startswith("post/"):
            yield _step(archive, case)
        elif case.startswith("merge/"):
            yield _clusters(archive, case)
    for case in groups(archive, 3):
        parts = case.split("/")
        if len(parts) == 3 and parts[1] in ("v1", "v2"):
            model = model or recorded_llama(archive, "model/w/", _HIDDEN, _INNER, _DEPTH, _HEADS, _HEADS)
            yield _prompt(archive, case, parts[2], int(parts[1][1]), model)


def _step(archive: Archive, case: str) -> Case:
    rows = torch.from_numpy(archive[f"{case}/attn_rows_raters"])
    start, count = (int(n) for n in archive[f"{case}/pre_img"])
    budget = int(archive[f"{case}/budget"])
    method = SparseVLM(variant="official", kept=(budget,) * 3)
    layer = int(archive[f"{case}/layer_idx"]) + 1
    words = torch.ones(rows.shape[1], 4)  # all alike: every one is relevant
    tensors = {"video": torch.ones(count, 4), "text": words, "hidden": torch.zeros(count, 4)}
    given = {("text", layer - 1): rows[..., start : start + count]}
    view = GivenView(layer, _DEPTH, TokenGrid(1, 1, count), torch.arange(count), rows=given, tensors=tensors)
    scores = method.scores(view)
    kept = method.step(view, budget).order[:budget]
    compared = {
        "scores": gap(scores, archive[f"{case}/score"]),
        "kept": same_indices(kept, archive[f"{case}/kept"]),
    }
    return judged("sparsevlm", case, compared)


def _clusters(archive: Archive, case: str) -> Case:
    tokens, count = torch.from_numpy(archive[f"{case}/x"]), int(archive[f"{case}/K"])
    distance = Distances.of(tokens)
    chosen = centres(peak_scores(distance, count), count)
    made, wanted = cluster_means(tokens, distance.nearest(chosen), count), archive[f"{case}/out"]
    if gap(made, wanted) <= 1e-4:
        return judged("sparsevlm", case, {"clusters": gap(made, wanted)})
    # Equal tokens: which of them is a centre is rounding's to say, and so is the order of clusters.
    ours, theirs = (torch.tensor(sorted(torch.as_tensor(rows).tolist())) for rows in (made, wanted))
    return judged("sparsevlm", case, {"clusters in any order": gap(ours, theirs)}, "ties: sets compared")


def _prompt(archive: Archive, case: str, name: str, version: int, model: Any) -> Case:
    start, count, _ = (int(n) for n in archive[f"model/{name}/pre_img_post"])
    where = f"{case}/sparse_list" if f"{case}/sparse_list" in archive else f"model/{name}/sparse_list"
    method = SparseVLM(variant="official", version=version, layers=_LAYERS, kept=tuple(int(n) for n in archive[where]))
    embeds = torch.from_numpy(archive[f"model/{name}/inputs_embeds"])
    done = passed(model, embeds, start, count, method)
    raters = relevant_words(embeds[start : start + count], embeds[start + count :]).nonzero().flatten()
    compared = {"relevant words": same_indices(raters, archive[f"{case}/raters_rel_to_text"])}
    lengths, before = done.lengths(), torch.arange(start, start + count)
    compared["cache lengths"] = same_indices(lengths, archive[f"{case}/seq_len_per_layer"])
    for number, layer in enumerate(_LAYERS):
        kept = done.kept[layer]
        visual = kept[(kept >= start) & (kept < start + count)]
        wanted = torch.from_numpy(archive[f"{case}/stage{number}_kept_rel"]).long()
        compared[f"kept {number}"] = same_indices(visual[: len(wanted)], before[wanted])
        compared[f"tokens in {number}"] = abs(len(before) - float(archive[f"{case}/stage{number}_v_token_num_in"]))
        before = visual
    compared["positions"] = same_indices(done.positions[_LAYERS[-1]], archive[f"{case}/last_layer_positions"])
    tail = torch.from_numpy(archive[f"{case}/last_hidden_state_tail"])
    last, note = done.last[-len(tail) :], ""
    if tail.ndim == 1:  # rows are recorded by their mean square alone, which the final norm makes one
        last, note = last.square().mean(1), "hidden states: mean squares only"
    compared["hidden states"] = gap(last, tail)
    return judged("sparsevlm", case, compared, note)
