"""Cases of pyramiddrop.npz: whole prompts through a recorded Llama, and one step of decoding."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from replays import Archive, Case, gap, groups, judged, same_indices
from replays.decoder import Passed, passed, recorded_llama
from vidsieve.adapters.decoder_layer import Decoder
from vidsieve.adapters.transformers_api import cache_kwargs
from vidsieve.compressors.pyramiddrop import PyramidDrop


def cases(archive: Archive) -> Iterator[Case]:
    """Yield every recorded prompt."""
    hidden, inner, depth, heads, kv_heads = (int(v) for v in archive["cfg"])
    model = recorded_llama(archive, "w/", hidden, inner, depth, heads, kv_heads)
    for case in groups(archive, 2):
        if case.startswith("fwd/"):
            yield _prompt(archive, case, model)
        elif not case.startswith(("w/", "cfg")):
            yield Case("pyramiddrop", case, "-", float("nan"), "no such method yet", "unknown kind of case")


def _prompt(archive: Archive, case: str, model: Any) -> Case:
    layers = tuple(int(n) for n in archive[f"{case}/layer_list"])
    shares = tuple(float(f) for f in archive[f"{case}/ratio_list"])
    method = PyramidDrop(0.5, "official", layers=layers, fractions=shares)
    embeds = torch.from_numpy(archive[f"{case}/inputs_embeds"])
    done = passed(model, embeds, int(archive[f"{case}/pre"]), int(archive[f"{case}/img"]), method)
    compared = {"cache lengths": same_indices(done.lengths(), archive[f"{case}/kv_len_per_layer"])}
    before = torch.arange(len(embeds))
    for number, layer in enumerate(layers):
        kept = done.kept[layer]
        # The release counts rows of the sequence that enters a stage, we columns of the prompt.
        rows = torch.searchsorted(before, kept)
        compared[f"kept {number}"] = same_indices(rows, archive[f"{case}/stage{number}_kept_rows"])
        compared[f"positions {number}"] = same_indices(
            done.positions[layer], archive[f"{case}/stage{number}_position_ids"]
        )
        if f"{case}/stage{number}_input_hidden" in archive:
            compared[f"entering {number}"] = gap(done.entered[layer], archive[f"{case}/stage{number}_input_hidden"])
        before = kept
    wanted = archive[f"{case}/last_hidden_state"]
    compared["hidden states"] = gap(done.last[-len(wanted) :], wanted)
    if f"{case}/decode_positions" in archive:
        compared["decoding positions"] = same_indices(
            _decoded(model, done, len(embeds)), archive[f"{case}/decode_positions"]
        )
    return judged("pyramiddrop", case, compared)


def _decoded(model: Any, done: Passed, length: int) -> list[int]:
    """Return the position of one more token in every layer."""
    found: list[int] = []
    handles = [
        layer.self_attn.register_forward_pre_hook(
            lambda module, args, kwargs: found.append(int(kwargs["position_ids"][0, 0])), with_kwargs=True
        )
        for layer in model.layers
    ]
    with torch.no_grad(), done.run.hooked(Decoder(model.layers, model.config, model.rotary_emb), done.cache):
        model(
            inputs_embeds=torch.zeros(1, 1, model.config.hidden_size),
            position_ids=torch.tensor([[length]]),
            **cache_kwargs(model, done.cache),
        )
    for handle in handles:
        handle.remove()
    return found
