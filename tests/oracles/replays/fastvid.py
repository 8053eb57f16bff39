"""Cases of fastvid.npz: whole sequences of the three releases, saliency of Qwen2.5-VL, and pooled signals."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from replays import Archive, Case, gap, groups, judged, noise_pieces, noisy, same_indices, with_newlines
from vidsieve.adapters.families.llava_video import averaged
from vidsieve.compressors._clustering import neighbours_alike
from vidsieve.compressors.fastvid import (
    FastVID,
    Form,
    cut,
    merged_segments,
    official_plan,
)

_FORMS: dict[str, Form] = {"ov": "llava_onevision", "vid": "llava_video", "qwen": "qwen2_5_vl"}


def cases(archive: Archive) -> Iterator[Case]:
    """Yield every recorded case."""
    for case, keys in groups(archive, 1).items():
        if f"{case}/keep_idx_seq" in keys:
            yield _sequence(archive, case)
        elif f"{case}/attn_pooled" in keys:
            yield _pooled(archive, case)
        elif f"{case}/grid_thw" in keys:
            yield _saliency(archive, case)
        else:
            yield Case("fastvid", case, "-", float("nan"), "no such method yet", "unknown kind of case")


def _sequence(archive: Archive, case: str) -> Case:
    def of(key: str) -> Tensor:
        return torch.from_numpy(archive[f"{case}/{key}"])

    settings: dict[str, Any] = json.loads(str(archive[f"{case}/cfg"]))
    form = _FORMS[case.split("_")[0]]
    method = FastVID(
        settings["retention_ratio"],
        "official",
        form=form,
        segments=settings["DySeg_c"],
        threshold=settings["DySeg_tau"],
        again=settings.get("DySeg_ignore", 0.95),
        context=settings["STPrune_d"],
        stride=settings["DTM_p"],
        anchor_weight=settings["DTM_beta"],
    )
    frames, saliency = of("x"), of("saliency")
    size = frames.shape[1]
    alike = neighbours_alike(of("frame_global"))
    spans = cut(alike, method.segments, method.threshold)
    plan = official_plan(method, spans, alike, size, int(size * settings["retention_ratio"]))
    noise = noise_pieces(archive, case)
    if form == "llava_onevision":  # one piece for every frame, used where there are anchors
        noise = [
            noise[start + i]
            for (start, _), shares in zip(spans, plan, strict=True)
            for i, (_, count) in enumerate(shares)
            if count
        ]
    with noisy(noise):
        kept, merged = merged_segments(frames, saliency, spans, plan, method.anchor_weight, form == "llava_onevision")
    before, after = of("text_before"), of("text_after")
    if f"{case}/newline" in archive:
        height, width = (int(n) for n in of("grid"))
        kept, merged = with_newlines(kept, merged, of("newline"), width)
        total = len(frames) * height * (width + 1)
    else:
        total = frames.shape[0] * size
    sequence = torch.cat(
        [
            torch.arange(len(before)),
            kept + len(before),
            torch.arange(len(after)) + len(before) + total,
        ]
    )
    compared = {
        "neighbours": gap(alike, of("adj_sim")),
        "segments": same_indices([stop - start for start, stop in spans], of("segment_sizes")),
        "kept": same_indices(sequence, of("keep_idx_seq")),
        "tokens": gap(torch.cat([before, merged, after]), of("out_seq")),
    }
    return judged("fastvid", case, compared)


def _pooled(archive: Archive, case: str) -> Case:
    values = {"attn_pooled": torch.from_numpy(archive[f"{case}/attn"]).transpose(1, 2)}
    values["feat_pooled"] = torch.from_numpy(archive[f"{case}/feat"])
    compared = {}
    for name, patches in values.items():
        side = round(patches.shape[1] ** 0.5)
        if case == "pool_vid":
            small = averaged(patches, side)
        else:
            planes = patches.reshape(len(patches), side, side, -1).permute(0, 3, 1, 2)
            small = F.interpolate(planes, [-(-side // 2)] * 2, mode="bilinear").flatten(2).transpose(1, 2)
        wanted = archive[f"{case}/{name}"]
        compared[name] = gap(small.reshape(wanted.shape), wanted)
    return judged("fastvid", case, compared)


def _saliency(archive: Archive, case: str) -> Case:
    query, key, cos, sin = (torch.from_numpy(archive[f"{case}/{name}"]) for name in ("q", "k", "cos", "sin"))
    frames, height, width = (int(n) for n in archive[f"{case}/grid_thw"])

    def rotated(x: Tensor) -> Tensor:
        first, second = x.chunk(2, -1)
        turned = x * cos[:, None] + torch.cat([-second, first], -1) * sin[:, None]
        return turned.reshape(frames, height * width, *x.shape[1:])

    found = saliency_of_queries(rotated(query), rotated(key), 4)
    return judged("fastvid", case, {"saliency": gap(found, archive[f"{case}/attn"])})


def saliency_of_queries(query: Tensor, key: Tensor, merge: int) -> Tensor:
    """Return the saliency (T, n) that the release for Qwen2.5-VL reads in the encoder's last block.

    A frame's mean query attends to the mean keys of the merge cells; softmax over the frame, mean over heads.

    Parameters
    ----------
    query, key : Tensor, (T, patches, H, d), after rotation, the patches of a cell behind each other
    merge : int
        Patches of a cell.
    """
    frames, patches, heads, width = key.shape
    cells = key.reshape(frames, patches // merge, merge, heads, width).mean(2)
    return torch.einsum("thd,tnhd->thn", query.mean(1), cells).mul(width**-0.5).softmax(-1).mean(1)
