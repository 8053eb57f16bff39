"""Finding encoded videos and images in a batch by their placeholders."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from vidsieve.adapters.encoded import ImageSpan, VideoFeatures, VideoSpan
from vidsieve.errors import PromptError


def check_count(placeholders: int, tokens: int, kind: str, count: int | None = None) -> None:
    """Refuse a batch whose placeholders are not as many as the tokens of its videos or images.

    Raises
    ------
    PromptError
    """
    if placeholders == tokens:
        return
    given = f"its {kind}s" if count is None else f"its {count} {kind}{'s' * (count != 1)}"
    text = f"the prompt has {placeholders} {kind} placeholders, {given} give {tokens} tokens: "
    if placeholders > tokens:
        raise PromptError(
            f"{text}use the processor that belongs to the model; if an answer of the model itself holds the "
            "placeholder, take it out of the conversation"
        )
    raise PromptError(f"{text}use the processor that belongs to the model, and do not truncate the prompt")


def find_videos(ids: Tensor, token_id: int, videos: list[VideoFeatures]) -> tuple[VideoSpan, ...]:
    """Return each video's place among the placeholders `token_id` of prompts (B, L).

    Raises
    ------
    PromptError
        If placeholders and features do not agree in number.
    """
    rows, columns = (ids == token_id).nonzero(as_tuple=True)
    tails = [v.prompted.frames * v.prompted.height if v.per_row else v.tail.shape[0] for v in videos]
    sizes = [v.prompted.num_tokens + tail + v.surplus for v, tail in zip(videos, tails, strict=True)]
    check_count(len(rows), sum(sizes), "video", len(videos))
    spans, start = [], 0
    for video, size in zip(videos, sizes, strict=True):
        row, where = rows[start : start + size], columns[start : start + size]
        if int(row[0]) != int(row[-1]):
            raise PromptError("a video's placeholders run from one prompt of the batch into the next")
        used = where[: size - video.surplus]
        split, width = video.prompted.num_tokens, video.grid.width
        tokens, tail = used[:split], used[split:]
        if video.per_row:
            lines = used.view(-1, width + 1)
            tokens, tail = lines[:, :width].flatten(), lines[:, width]
        surplus = where[len(used) :]
        if video.frames is not None:
            tokens, rest = of_frames(tokens, video)
            surplus = torch.cat([rest, surplus])
            if video.per_row:
                tail, rest = of_frames(tail, video)
                surplus = torch.cat([rest, surplus])
        spans.append(VideoSpan(int(row[0]), tokens, tail, video, surplus))
        start += size
    return tuple(spans)


def of_frames(columns: Tensor, video: VideoFeatures) -> tuple[Tensor, Tensor]:
    """Return those of columns (n,), equally many a frame of the prompt, of the frames that are left, and the others."""
    assert video.frames is not None
    table, left = columns.view(video.prompted.frames, -1), video.frames.to(columns.device)
    others = torch.ones(len(table), dtype=torch.bool, device=columns.device).index_fill(0, left, False)
    return table[left].flatten(), table[others].flatten()


def find_images(
    ids: Tensor, token_id: int, embeds: Tensor, deep: tuple[Tensor, ...] = (), kind: str = "image"
) -> tuple[ImageSpan, ...]:
    """Return each prompt's share of the features (M, D) of all images (or another `kind`) of a batch.

    Raises
    ------
    PromptError
        If placeholders and features do not agree in number.
    """
    rows, columns = (ids == token_id).nonzero(as_tuple=True)
    check_count(len(rows), len(embeds), kind)
    spans = []
    for row in sorted(set(rows.tolist())):
        mine = rows == row
        share: Tensor = mine.to(embeds.device)
        spans.append(ImageSpan(row, columns[mine], embeds[share], tuple(layer[share] for layer in deep)))
    return tuple(spans)


def needed(inputs: Mapping[str, Any], name: str, what: str = "an image") -> Any:
    """Return an argument that images, or videos, need.

    Raises
    ------
    PromptError
        If it is missing.
    """
    value = inputs.get(name)
    if value is None:
        raise PromptError(f"the call has {what} and no {name}: hand over everything that the processor returned")
    return value


def runs(kinds: Tensor) -> list[Tensor]:
    """Return the positions (n,) of each run of equal values in (L,), in order."""
    edges = (kinds[1:] != kinds[:-1]).nonzero().flatten() + 1
    return list(torch.tensor_split(torch.arange(len(kinds), device=kinds.device), edges.tolist()))
