"""The slow truth that pruning must equal: the whole prompt, dropped tokens hidden by a mask, positions unchanged."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from vidsieve.adapters.base import Adapter
from vidsieve.types import Selection


def masked_logits(
    adapter: Adapter, inputs: Mapping[str, Any], selections: Sequence[Selection], extra_ids: Tensor | None = None
) -> Tensor:
    """Return the logits (B, L + E, V) of a full forward without cache in which dropped tokens are masked out.

    Parameters
    ----------
    inputs : mapping
        Processor outputs of a batch, padding allowed.
    selections : one Selection per video, in placeholder order
        Merged tokens stand at their anchors.
    extra_ids : Tensor, optional, (B, E), int64
        Tokens after the prompt.
    """
    model = adapter.model
    encoded = adapter.encode(inputs)
    embeds = model.get_input_embeddings()(encoded.input_ids)
    visible = encoded.attention_mask.clone()
    for span, selection in zip(encoded.videos, selections, strict=True):
        tokens = span.features.embeds.clone()
        if selection.embeds is not None:
            tokens[selection.indices] = selection.embeds
        columns = torch.cat([span.columns, span.tail_columns])
        embeds[span.row, columns] = torch.cat([tokens, span.features.tail]).to(embeds)
        visible[span.row, span.columns] = False
        visible[span.row, span.columns[selection.indices]] = True
    positions = encoded.positions
    if extra_ids is not None and extra_ids.shape[1]:
        embeds = torch.cat([embeds, model.get_input_embeddings()(extra_ids)], 1)
        visible = torch.cat([visible, torch.ones_like(extra_ids, dtype=torch.bool)], 1)
        steps = torch.arange(1, extra_ids.shape[1] + 1, device=extra_ids.device)
        positions = torch.cat([positions, positions[..., -1:] + steps], -1)
    length = embeds.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=embeds.device).tril()
    # A hidden query may look at itself: its row is never read, but must not be empty.
    mask = (causal & visible[:, None, :]) | torch.eye(length, dtype=torch.bool, device=embeds.device)
    additive = torch.zeros(mask.shape, dtype=embeds.dtype, device=embeds.device)
    additive = additive.masked_fill(~mask, torch.finfo(embeds.dtype).min)[:, None]
    hidden = model.model.language_model(
        inputs_embeds=embeds, position_ids=adapter.pack_positions(positions), attention_mask=additive, use_cache=False
    ).last_hidden_state
    logits: Tensor = model.get_output_embeddings()(hidden)
    return logits


def masked_greedy(adapter: Adapter, inputs: Mapping[str, Any], selections: Sequence[Selection], steps: int) -> Tensor:
    """Return `steps` greedy tokens (B, steps) of the masked reference, recomputed from scratch at each step."""
    made = torch.empty(inputs["input_ids"].shape[0], 0, dtype=torch.int64, device=inputs["input_ids"].device)
    for _ in range(steps):
        made = torch.cat([made, masked_logits(adapter, inputs, selections, made)[:, -1].argmax(-1, keepdim=True)], 1)
    return made
