"""The last step of pruning: kept columns, kept features, original positions, rows padded on the left."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vidsieve.adapters.encoded import Encoded, Pruned
from vidsieve.errors import UnsupportedCallError
from vidsieve.types import Selection

if TYPE_CHECKING:
    from vidsieve.adapters.adapter import Adapter


@dataclass(frozen=True)
class _Piece:
    """Features (K, D) at columns (K,) of one prompt, and their deep features."""

    columns: Tensor
    embeds: Tensor
    deep: tuple[Tensor, ...]


def rebuild(
    adapter: Adapter, encoded: Encoded, selections: Sequence[Sequence[Selection]], rows: Sequence[int]
) -> Pruned:
    """Return the inputs that hold just the selected tokens; arguments as `Adapter.build` has them."""
    kept_columns: list[Tensor] = []
    features: dict[str, list[_Piece]] = {"video": [], "image": []}
    for row, chosen in zip(rows, selections, strict=True):
        keep = encoded.attention_mask[row].clone()
        pieces: dict[str, list[_Piece]] = {"video": [], "image": []}
        for number, selection in zip(encoded.of_row(row), chosen, strict=True):
            span = encoded.videos[number]
            video, columns = span.features, span.columns[selection.indices.to(span.columns.device)]
            keep[span.columns] = False
            keep[columns] = True
            newlines = video.kept_tail(selection.indices.to(span.columns.device))
            keep[span.tail_columns] = newlines
            merged = selection.embeds
            # A merged token's deep features are its anchor's: methods merge what the LLM reads first.
            deep = tuple(layer[selection.indices] for layer in video.deep)
            embeds = video.embeds[selection.indices] if merged is None else merged
            tail = video.tail[newlines.to(video.tail.device)].to(embeds)
            blank = tuple(layer.new_zeros(tail.shape) for layer in video.deep)
            pieces[adapter.modality] += [
                _Piece(columns, embeds, deep),
                _Piece(span.tail_columns[newlines], tail, blank),
            ]
        pieces["image"] += [_Piece(i.columns, i.embeds, i.deep) for i in encoded.images if i.row == row]
        for modality, some in pieces.items():
            if some:
                features[modality].append(_in_order(some))
        kept_columns.append(keep.nonzero().flatten())
    kept = padded(kept_columns)
    index = torch.as_tensor(list(rows), device=kept.device)[:, None]
    real, columns = kept >= 0, kept.clamp(min=0)
    positions = encoded.positions[:, index, columns].masked_fill(~real, 0)
    if adapter.convention == "compact":
        positions = (real.long().cumsum(1) - 1).clamp(min=0)[None]
    inputs: dict[str, Any] = dict(encoded.rest) | {
        "input_ids": encoded.input_ids[index, columns].masked_fill(~real, _pad_id(adapter)),
        "attention_mask": real.to(torch.int64),
        "position_ids": adapter.pack_positions(positions),
        "mm_encoder_outputs": {
            modality: adapter.encoder_outputs(
                [piece.embeds for piece in some],
                [[piece.deep[i] for piece in some] for i in range(len(some[0].deep))],
                modality,
            )
            for modality, some in features.items()
            if some
        },
    }
    labels = encoded.rest.get("labels")
    if labels is not None:
        if labels.shape != encoded.input_ids.shape:
            raise UnsupportedCallError(
                f"labels must be {tuple(encoded.input_ids.shape)} as input_ids, got {tuple(labels.shape)}"
            )
        # A row's first token has nothing before it; padding, which is on the left now, must not predict it.
        first = real & (real.long().cumsum(1) == 1)
        inputs["labels"] = labels[index, columns].masked_fill(~real | first, -100)
    return Pruned(inputs, kept)


def _in_order(pieces: list[_Piece]) -> _Piece:
    """Return the features of one prompt and modality in the order of their placeholders."""
    columns = torch.cat([piece.columns for piece in pieces])
    order = columns.argsort()
    embeds = torch.cat([piece.embeds for piece in pieces])
    deep = tuple(torch.cat(layers)[order.to(embeds.device)] for layers in zip(*(p.deep for p in pieces), strict=True))
    return _Piece(columns[order], embeds[order.to(embeds.device)], deep)


def padded(columns: list[Tensor]) -> Tensor:
    """Return lists of columns as one table (rows, longest), -1 on the left where a row is shorter."""
    length = max(len(line) for line in columns)
    table = torch.full((len(columns), length), -1, dtype=torch.int64, device=columns[0].device)
    for line, kept in zip(table, columns, strict=True):
        line[length - len(kept) :] = kept
    return table


def _pad_id(adapter: Adapter) -> int:
    pad = getattr(adapter.model.config.get_text_config(), "pad_token_id", None)
    return int(pad) if pad is not None else 0
