"""Where video tokens are dropped: the columns of prompts that stay, and the features that stay with them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vidsieve.adapters.encoded import Encoded
from vidsieve.types import Selection


def kept_columns(encoded: Encoded, selections: Sequence[Sequence[Selection]], rows: Sequence[int]) -> Tensor:
    """Return the columns of the prompts that stay (rows, L') int64, −1 on the left where a row is shorter.

    Parameters
    ----------
    encoded : Encoded
    selections : per output row, one Selection for each video of its prompt
    rows : per output row, the prompt of the batch it comes from
    """
    kept = []
    for row, of_videos in zip(rows, selections, strict=True):
        keep = encoded.attention_mask[row].clone()
        for number, selection in zip(encoded.of_row(row), of_videos, strict=True):
            span = encoded.videos[number]
            indices = selection.indices.to(span.columns.device)
            keep[span.columns] = False
            keep[span.columns[indices]] = True
            keep[span.tail_columns] = span.features.kept_tail(indices)
        kept.append(keep.nonzero().flatten())
    return padded(kept)


@dataclass(frozen=True)
class Features:
    """Features (K, D) at columns (K,) of one prompt, and their deep features (K, D) per layer."""

    columns: Tensor
    embeds: Tensor
    deep: tuple[Tensor, ...]


def gathered(
    encoded: Encoded, selections: Sequence[Sequence[Selection]], rows: Sequence[int], modality: str
) -> dict[str, list[Features]]:
    """Return by modality the features that stay, one entry per output row, in the order of their placeholders.

    Parameters
    ----------
    encoded, selections, rows : as in `kept_columns`
    modality : str
        Kind of placeholder that videos have.
    """
    features: dict[str, list[Features]] = {"video": [], "image": []}
    for row, of_videos in zip(rows, selections, strict=True):
        parts: dict[str, list[Features]] = {"video": [], "image": []}
        for number, selection in zip(encoded.of_row(row), of_videos, strict=True):
            span = encoded.videos[number]
            video, indices = span.features, selection.indices.to(span.columns.device)
            newlines = video.kept_tail(indices)
            # A merged token's deep features are its anchor's: methods merge what the LLM reads first.
            deep = tuple(layer[selection.indices] for layer in video.deep)
            embeds = video.embeds[selection.indices] if selection.embeds is None else selection.embeds
            tail = video.tail[newlines.to(video.tail.device)].to(embeds)
            blank = tuple(layer.new_zeros(tail.shape) for layer in video.deep)
            parts[modality] += [
                Features(span.columns[indices], embeds, deep),
                Features(span.tail_columns[newlines], tail, blank),
            ]
        parts["image"] += [Features(i.columns, i.embeds, i.deep) for i in encoded.images if i.row == row]
        for name, some in parts.items():
            if some:
                features[name].append(_in_order(some))
    return features


def _in_order(parts: list[Features]) -> Features:
    """Return the features of one prompt and modality in the order of their placeholders."""
    columns = torch.cat([part.columns for part in parts])
    order = columns.argsort()
    embeds = torch.cat([part.embeds for part in parts])
    deep = tuple(torch.cat(layers)[order.to(embeds.device)] for layers in zip(*(p.deep for p in parts), strict=True))
    return Features(columns[order], embeds[order.to(embeds.device)], deep)


def padded(columns: list[Tensor]) -> Tensor:
    """Return lists of columns as one table (rows, longest), −1 on the left where a row is shorter."""
    length = max(len(line) for line in columns)
    table = torch.full((len(columns), length), -1, dtype=torch.int64, device=columns[0].device)
    for line, kept in zip(table, columns, strict=True):
        line[length - len(kept) :] = kept
    return table
