"""The slow truth for families whose layers do more than attend: fresh runs of the stock model on shortened prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from vidsieve.adapters.adapter import Adapter
from vidsieve.adapters.encoded import Encoded
from vidsieve.adapters.transformers_api import cache_kwargs, new_cache
from vidsieve.testing.checks import CheckFailure
from vidsieve.testing.staged import LayeredSelections, visible_tokens
from vidsieve.types import Selection


def shortened_logits(
    adapter: Adapter,
    inputs: Mapping[str, Any],
    selections: Sequence[Selection],
    extra_ids: Tensor | None,
    encoded: Encoded,
) -> Tensor:
    """Return the logits (B, L + E, V) of one fresh run of the stock model a prompt, 0 at columns that it does not read.

    A run has one prompt, no padding, no mask and a new cache: the ids that stay, at the positions of the whole prompt,
    with the video's features and the caller's further columns, such as ``mm_token_type_ids``, cut alike. Parameters are
    those of `reference_logits`.

    Raises
    ------
    CheckFailure
        For a method inside the LLM, which shortens no prompt.
    """
    if isinstance(selections, LayeredSelections):
        raise CheckFailure(f"{selections.compressor.name} acts inside the LLM: no shortened prompt equals its run")
    batch, length = encoded.input_ids.shape
    extra = encoded.input_ids[:, :0] if extra_ids is None else extra_ids
    columns_of = [seen.nonzero().flatten() for seen in visible_tokens(encoded, selections)]
    logits: Tensor | None = None
    for row, columns in enumerate(columns_of):
        rotary = encoded.positions[:, row, columns]
        if adapter.convention == "compact":
            rotary = torch.arange(len(columns), device=columns.device)[None]
        steps = torch.arange(1, extra.shape[1] + 1, device=columns.device)
        rotary = torch.cat([rotary, rotary[:, -1:] + steps], 1)
        call: dict[str, Any] = {
            "input_ids": torch.cat([encoded.input_ids[row, columns], extra[row]])[None],
            "position_ids": adapter.pack_positions(rotary[:, None]),
            "mm_encoder_outputs": _features(adapter, encoded, selections, row),
            # Without a cache transformers reads gaps in the positions as packed sequences.
            "use_cache": True,
            **cache_kwargs(adapter.model, new_cache(adapter.model)),
        }
        for name in adapter.column_keys:
            if inputs.get(name) is not None:
                call[name] = torch.cat([inputs[name][row, columns], torch.zeros_like(extra[row])])[None]
        one: Tensor = adapter.model(**call).logits[0]
        if logits is None:
            logits = one.new_zeros(batch, length + extra.shape[1], one.shape[-1])
        behind = torch.arange(length, length + extra.shape[1], device=columns.device)
        logits = logits.index_put((torch.tensor(row), torch.cat([columns, behind])), one)
    if logits is None:
        raise CheckFailure("there is no prompt to run")
    return logits


def _features(adapter: Adapter, encoded: Encoded, selections: Sequence[Selection], row: int) -> dict[str, Any]:
    """Return ``mm_encoder_outputs`` of one shortened prompt, in the order of its placeholders."""
    parts: dict[str, list[tuple[int, Tensor, tuple[Tensor, ...]]]] = {adapter.modality: [], "image": []}
    for span, selection in zip(encoded.videos, selections, strict=True):
        if span.row != row:
            continue
        video, indices = span.features, selection.indices
        embeds = video.embeds[indices] if selection.embeds is None else selection.embeds
        for number, index in enumerate(indices.tolist()):
            deep = tuple(layer[index] for layer in video.deep)
            parts[adapter.modality].append((int(span.columns[index]), embeds[number], deep))
        kept = video.kept_tail(indices)
        for number in kept.nonzero().flatten().tolist():
            blank = tuple(torch.zeros_like(layer[0]) for layer in video.deep)
            parts[adapter.modality].append((int(span.tail_columns[number]), video.tail[number].to(embeds), blank))
    for image in encoded.images:
        if image.row == row:
            for number, column in enumerate(image.columns.tolist()):
                deep = tuple(layer[number] for layer in image.deep)
                parts["image"].append((column, image.embeds[number], deep))
    outputs = {}
    for modality, some in parts.items():
        if some:
            some.sort(key=lambda part: part[0])
            layers = [[torch.stack(layer)] for layer in zip(*(deep for _, _, deep in some), strict=True)]
            outputs[modality] = adapter.encoder_outputs([torch.stack([e for _, e, _ in some])], layers, modality)
    return outputs
