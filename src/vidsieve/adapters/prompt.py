"""The prompt around a video, for methods that read the question."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from vidsieve.adapters.encoded import Encoded
from vidsieve.types import Prompt

if TYPE_CHECKING:
    from vidsieve.adapters.adapter import Adapter


def prompt_around(adapter: Adapter, encoded: Encoded, video: int) -> Prompt:
    """Return the whole prompt around one video of a batch, padding removed, on the video's device."""
    row, target = encoded.videos[video].row, encoded.videos[video].features.embeds.device
    table = adapter.model.get_input_embeddings()
    device = table.weight.device if table.weight.device.type != "meta" else target  # offloaded: it comes when called
    ids, real = encoded.input_ids[row].to(device), encoded.attention_mask[row].to(device)
    positions = encoded.positions[adapter.position_rows, row].to(device)
    embeds = table(ids)
    for image in encoded.images:
        if image.row == row:
            embeds = embeds.index_copy(0, image.columns.to(device), image.embeds.to(embeds))
    for number in encoded.of_row(row):
        span = encoded.videos[number]
        parts = torch.cat([span.features.embeds, span.features.tail]).to(embeds)
        embeds = embeds.index_copy(0, torch.cat([span.columns, span.tail_columns]).to(device), parts)
    video_mask = torch.zeros_like(real)
    video_mask[encoded.videos[video].columns.to(device)] = True
    question = torch.zeros_like(real)
    question[real] = adapter.template().question_mask(ids[real])
    # On the video's device: the model's parts may lie on several.
    whole = embeds[real], positions[:, real], video_mask[real], question[real]
    return Prompt(*(part.to(target) for part in whole))
