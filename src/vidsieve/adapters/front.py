"""A vision encoder under a method that acts before or inside it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vidsieve.adapters.probe import Note, attention_modules, listening, received
from vidsieve.compressors.front import EncoderFront, EncoderView, FrameFront
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


@dataclass
class Left:
    """What is left of one video once an encoder has run under a method.

    Parameters
    ----------
    frames : Tensor, (T',), int64
    attention, segments : as in `Merged`, of the last merging
    """

    frames: Tensor
    attention: Tensor | None = None
    segments: Tensor | None = None


@contextmanager
def merging(
    front: EncoderFront,
    blocks: Sequence[Any],
    projector: Any,
    count: int,
    *,
    config: Any,
    layers: int,
    per_frame: Callable[[int], int],
    cls_token: bool = False,
) -> Iterator[Left]:
    """Let a method merge the frames of one video, the batch rows of an encoder's blocks, until the block ends.

    The projector's output has `count` rows again: those of merged frames repeat the row of a frame that is left.

    Parameters
    ----------
    count : int
        The number of frames.
    config : the encoder's configuration
    layers : int
        The number of layers of the LLM.
    per_frame : function of the number of patches of a frame
        Returns the number of LLM tokens that a frame becomes.
    cls_token : bool
        True if the first place of a frame is a class token.
    """
    left, heard = Left(torch.arange(count)), front.listens(len(blocks))

    def after(number: int, notes: list[Note]) -> Any:
        def merge(module: Any, args: Any, output: Any) -> Any:
            hidden = output if isinstance(output, Tensor) else output[0]
            attention = received(*notes.pop(), cls_token=cls_token)[0] if number == heard else None
            tokens = per_frame(hidden.shape[1] - cls_token)
            made = front.step(EncoderView(number, len(blocks), hidden, count, tokens, layers, attention))
            if made is None:
                return output
            fewer, kept = made.hidden, made.frames.cpu()
            sorted_ = bool((kept[1:] > kept[:-1]).all()) and len(kept) > 0 and int(kept[0]) >= 0
            if not sorted_ or int(kept[-1]) >= len(hidden) or fewer.shape != (len(kept), *hidden.shape[1:]):
                raise SelectionError(f"{front.name} must return fewer frames of {tuple(hidden.shape)}, sorted, unique")
            left.frames, left.attention, left.segments = left.frames[kept], made.attention, made.segments
            return fewer if isinstance(output, Tensor) else (fewer, *output[1:])

        return merge

    def spread(module: Any, args: Any, output: Tensor) -> Tensor:
        if len(output) != len(left.frames):
            raise UnsupportedCallError(
                f"{len(output)} frames reach the projector, and {front.name} left {len(left.frames)}"
            )
        place = torch.searchsorted(left.frames, torch.arange(count), right=True) - 1
        return output[place.clamp(min=0).to(output.device)]

    with ExitStack() as stack:
        notes: list[Note] = []
        if heard is not None:
            notes = stack.enter_context(listening(config, attention_modules(blocks[heard])[0]))
        for number, block in enumerate(blocks[:-1]):
            stack.callback(block.register_forward_hook(after(number, notes)).remove)
        stack.callback(projector.register_forward_hook(spread).remove)
        yield left


def cells(frames: Tensor, patch: int) -> Tensor:
    """Return frames (T, 3, H, W) as the pixels (T, C, 3·patch²) of their square patches; a rest at the edges goes."""
    tiles = frames.unfold(2, patch, patch).unfold(3, patch, patch)  # (T, 3, rows, columns, patch, patch)
    return tiles.permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)
