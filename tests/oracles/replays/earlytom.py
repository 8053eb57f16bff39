"""Cases of earlytom.npz: merging after one block, tokens of groups, and whole encoders under our hooks."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from transformers import SiglipVisionConfig
from transformers.models.siglip.modeling_siglip import SiglipEncoder

from replays import Archive, Case, gap, groups, judged, same_indices
from vidsieve.adapters.front import merging
from vidsieve.compressors.earlytom import (
    EarlyTom,
    FrameMerging,
    adjusted,
    between,
    likeness,
    merged,
    merges,
    official_counts,
    selected,
    spans_of,
)
from vidsieve.types import TokenGrid


def cases(archive: Archive) -> Iterator[Case]:
    """Yield every recorded case."""
    for case, keys in groups(archive, 1).items():
        if f"{case}/inputs_embeds" in keys:
            yield _tower(archive, case)
        elif f"{case}/keep_idx" in keys:
            yield _tokens(archive, case)
        elif f"{case}/out_attn" in keys:
            yield _block(archive, case)
        else:
            yield Case("earlytom", case, "-", float("nan"), "no such method yet", "unknown kind of case")


def _method(archive: Archive, case: str) -> EarlyTom:
    layers = archive.get(f"{case}/prune_layers")
    return EarlyTom(
        variant="official",
        layers=None if layers is None else tuple(layers.tolist()),
        threshold=float(archive[f"{case}/tau"]),
        window=int(archive[f"{case}/max_window"]),
        newest=float(archive[f"{case}/ema"]),
        mean=str(archive.get(f"{case}/mode", "mixing")) == "naive_mixing",
    )


def _block(archive: Archive, case: str) -> Case:
    frames, attention = (torch.from_numpy(archive[f"{case}/{name}"]) for name in ("x", "attn"))
    method, alike = _method(archive, case), likeness(frames)
    spans = method.segments(alike)
    parts = merges(alike, spans, True, method.mean)
    made = merged(frames, parts)
    groups_ = method.segments(likeness(made)) if archive[f"{case}/last"] else spans
    compared = {
        "frames": gap(made, archive[f"{case}/out"]),
        "attention": gap(merged(attention, parts), archive[f"{case}/out_attn"]),
        "groups": same_indices(groups_, archive[f"{case}/groups"]),
    }
    if len(frames) > 1:  # the release does not cut one frame
        compared["segments"] = same_indices(spans, archive[f"{case}/segments"])
    return judged("earlytom", case, compared)


def _tokens(archive: Archive, case: str) -> Case:
    attention = torch.from_numpy(archive[f"{case}/attn"])
    frames, size = attention.shape
    ratio = adjusted(float(archive[f"{case}/ratio"]), frames, int(archive[f"{case}/init_frames"]))
    middle = between([(int(first), int(last)) for first, last in archive[f"{case}/groups"]])
    kept = selected(attention.flatten(), TokenGrid(frames, 1, size), middle, official_counts(middle, size, ratio))
    compared = {
        "ratio": abs(ratio - float(archive[f"{case}/ratio_adjusted"])),
        "kept": same_indices(kept, archive[f"{case}/keep_idx"]),
    }
    return judged("earlytom", case, compared)


def _tower(archive: Archive, case: str) -> Case:
    embeds = torch.from_numpy(archive[f"{case}/inputs_embeds"])
    width, heads, inner, depth = archive[f"{case}/cfg"].tolist()
    config = SiglipVisionConfig(
        hidden_size=width,
        num_attention_heads=heads,
        intermediate_size=inner,
        num_hidden_layers=depth,
        layer_norm_eps=float(archive[f"{case}/layer_norm_eps"]),
        hidden_act=str(archive[f"{case}/act"]),
    )
    config._attn_implementation = "eager"
    encoder, start = SiglipEncoder(config).eval(), f"{case}/w/"
    weights = {key.removeprefix(start): torch.from_numpy(archive[key]) for key in archive if key.startswith(start)}
    encoder.load_state_dict(weights)
    rows: list[int] = []
    for layer in encoder.layers:
        layer.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    projector, method = nn.Identity(), _method(archive, case)
    # The projector stands for one more block: the release may merge after the last one too.
    options = {"config": config, "layers": 28, "per_frame": lambda patches: patches}
    blocks = [*encoder.layers, projector]
    last: list[Tensor] = []
    projector.register_forward_pre_hook(lambda module, args: last.append(args[0]))
    with torch.no_grad(), merging(FrameMerging(method), blocks, [projector], len(embeds), **options) as left:
        projector(encoder(inputs_embeds=embeds).last_hidden_state)
    assert left.attention is not None and left.segments is not None
    layers, after = archive[f"{case}/prune_layers"].tolist(), archive[f"{case}/frames_after"].tolist()
    seen = [len(embeds), *rows[1:], len(left.frames)]
    wanted = [
        ([len(embeds)] + [n for at, n in zip(layers, after, strict=True) if at < block])[-1]
        for block in range(depth + 1)
    ]
    compared = {
        "frames of every layer": same_indices(seen, wanted),
        "groups": same_indices(spans_of(left.segments), archive[f"{case}/groups"]),
        "hidden states": gap(last[0], archive[f"{case}/last_hidden"]),
        "attention": gap(left.attention, archive[f"{case}/attn_received"]),
    }
    return judged("earlytom", case, compared)
