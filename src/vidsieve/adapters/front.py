"""A vision encoder under a method that acts before or inside it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from vidsieve.compressors.front import EncoderFront, FrameFront
from vidsieve.errors import SelectionError, UnsupportedCallError


def sources(front: FrameFront, frames: Tensor) -> tuple[Tensor, Tensor]:
    """Return which frames (E,) a method has encoded of (T, C, V), sorted, and by frame the number (T,) among them.

    Raises
    ------
    SelectionError
        If a frame takes the tokens of one that is not encoded.
    """
    chosen = front.sources(frames).cpu()
    if chosen.shape != (len(frames),) or chosen.dtype != torch.int64:
        raise SelectionError(f"{front.name}.sources must return ({len(frames)},) int64, got {tuple(chosen.shape)}")
    encoded = torch.unique(chosen)
    if int(encoded[0]) < 0 or int(encoded[-1]) >= len(frames) or not torch.equal(chosen[encoded], encoded):
        raise SelectionError(f"{front.name} lets frames take the tokens of frames that are not encoded")
    return encoded, torch.searchsorted(encoded, chosen)


@contextmanager
def merging(front: EncoderFront, blocks: Sequence[Any], projector: Any, count: int) -> Iterator[list[Tensor]]:
    """Let a method merge the frames of one video, the batch rows of an encoder's blocks, until the block ends.

    The projector's output has `count` rows again: those of merged frames repeat the row of a frame that is left.

    Yields
    ------
    list of one Tensor, (T',), int64
        The frames that are left, once the encoder has run.
    """
    left = [torch.arange(count)]

    def after(number: int) -> Any:
        def merge(module: Any, args: Any, output: Any) -> Any:
            hidden = output if isinstance(output, Tensor) else output[0]
            made = front.step(number, len(blocks), hidden)
            if made is None:
                return output
            fewer, kept = made[0], made[1].cpu()
            sorted_ = bool((kept[1:] > kept[:-1]).all()) and len(kept) > 0 and int(kept[0]) >= 0
            if not sorted_ or int(kept[-1]) >= len(hidden) or fewer.shape != (len(kept), *hidden.shape[1:]):
                raise SelectionError(f"{front.name} must return fewer frames of {tuple(hidden.shape)}, sorted, unique")
            left[0] = left[0][kept]
            return fewer if isinstance(output, Tensor) else (fewer, *output[1:])

        return merge

    def spread(module: Any, args: Any, output: Tensor) -> Tensor:
        if len(output) != len(left[0]):
            raise UnsupportedCallError(
                f"{len(output)} frames reach the projector, and {front.name} left {len(left[0])}"
            )
        place = torch.searchsorted(left[0], torch.arange(count), right=True) - 1
        return output[place.clamp(min=0).to(output.device)]

    hooks = [block.register_forward_hook(after(number)) for number, block in enumerate(blocks[:-1])]
    hooks.append(projector.register_forward_hook(spread))
    try:
        yield left
    finally:
        for hook in hooks:
            hook.remove()


def cells(frames: Tensor, patch: int) -> Tensor:
    """Return frames (T, 3, H, W) as the pixels (T, C, 3·patch²) of their square patches; a rest at the edges goes."""
    tiles = frames.unfold(2, patch, patch).unfold(3, patch, patch)  # (T, 3, rows, columns, patch, patch)
    return tiles.permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)
