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
    projectors: Sequence[Any],
    count: int,
    *,
    config: Any,
    layers: int,
    per_frame: Callable[[int], int],
    cls_token: bool = False,
) -> Iterator[Left]:
    """Let a method merge the frames of one video inside an encoder, until the block ends.

    Frames are the batch rows of the encoder's blocks, or follow each other in one packed sequence (F·S, d), where every
    frame has the same rotary positions. What blocks get beside them, a row a frame or a row a patch, is cut to the
    frames that are left. The projectors' outputs have `count` frames again: merged ones repeat the one before that is
    left.

    Parameters
    ----------
    projectors : sequence of modules
        What reads the output of blocks; the last block itself where what reads it counts the frames of the call.
    count : int
        The number of frames.
    config : the encoder's configuration
    layers : int
        The number of layers of the LLM.
    per_frame : function of the number of patches of a frame
        Returns the number of LLM tokens that a frame becomes.
    cls_token : bool
        True if the first place of a frame is a class token.

    Raises
    ------
    UnsupportedCallError
        If the block whose attention the method reads has none.
    """
    left, heard = Left(torch.arange(count)), front.listens(len(blocks))
    notes: list[Note] = []

    def shortened(module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        hidden, frames = args[0], left.frames
        if len(frames) == count:
            return None
        if hidden.ndim > 2:
            rest = (_rows(value, frames, count) for value in args[1:])
            return (hidden, *rest), {name: _rows(value, frames, count) for name, value in kwargs.items()}
        if len(args) > 1 or "cu_seqlens" not in kwargs:
            raise UnsupportedCallError(
                f"{front.name} shortens the cu_seqlens of a {type(module).__name__}, which gets {', '.join(kwargs)} "
                f"and {len(args)} unnamed arguments"
            )
        return args, {name: _packed(name, value, hidden, len(frames), count) for name, value in kwargs.items()}

    def after(number: int) -> Any:
        def merge(module: Any, args: Any, output: Any) -> Any:
            rows = output if isinstance(output, Tensor) else output[0]
            hidden = _by_frame(rows, len(left.frames)) if rows.ndim == 2 else rows
            attention = _of_frames(notes, len(hidden), cls_token) if number == heard else None
            tokens = per_frame(hidden.shape[1] - cls_token)
            made = front.step(EncoderView(number, len(blocks), hidden, count, tokens, layers, attention))
            if made is None:
                return output
            fewer, kept = made.hidden, made.frames.cpu()
            sorted_ = bool((kept[1:] > kept[:-1]).all()) and len(kept) > 0 and int(kept[0]) >= 0
            if not sorted_ or int(kept[-1]) >= len(hidden) or fewer.shape != (len(kept), *hidden.shape[1:]):
                raise SelectionError(f"{front.name} must return fewer frames of {tuple(hidden.shape)}, sorted, unique")
            left.frames, left.attention, left.segments = left.frames[kept], made.attention, made.segments
            fewer = fewer.flatten(0, 1) if rows.ndim == 2 else fewer
            return fewer if isinstance(output, Tensor) else (fewer, *output[1:])

        return merge

    def spread(module: Any, args: Any, output: Tensor) -> Tensor:
        frames = len(left.frames)
        if len(output) != frames and (output.ndim > 2 or len(output) % frames):
            raise UnsupportedCallError(f"{len(output)} frames reach the projector, and {front.name} left {frames}")
        place = torch.searchsorted(left.frames, torch.arange(count), right=True) - 1
        return _by_frame(output, frames)[place.clamp(min=0).to(output.device)].flatten(0, 1)

    with ExitStack() as stack:
        if heard is not None:
            notes = stack.enter_context(listening(config, _attending(front, blocks, heard)))
        for number, block in enumerate(blocks):
            stack.callback(block.register_forward_pre_hook(shortened, with_kwargs=True).remove)
            if number < len(blocks) - 1:
                stack.callback(block.register_forward_hook(after(number)).remove)
        for projector in projectors:
            stack.callback(projector.register_forward_hook(spread).remove)
        yield left


def _attending(front: EncoderFront, blocks: Sequence[Any], number: int) -> Any:
    """Return the attention module of a block."""
    having = [place for place, block in enumerate(blocks) if attention_modules(block)]
    if number not in having:
        raise UnsupportedCallError(
            f"{front.name} reads the attention of block {number} of this vision encoder, which has none: let it merge "
            f"last after one of {having} (layers=…)"
        )
    return attention_modules(blocks[number])[0]


def _rows(value: Any, frames: Tensor, count: int) -> Any:
    """Return the rows of `frames` (F',) of what has `count` rows; anything else as it is."""
    if isinstance(value, tuple):
        return tuple(_rows(part, frames, count) for part in value)
    if isinstance(value, Tensor) and value.ndim and len(value) == count:
        return value[frames.to(value.device)]
    return value


def _packed(name: str, value: Any, hidden: Tensor, left: int, count: int) -> Any:
    """Return an argument of a block of a packed sequence as it is for `left` of `count` equal frames.

    Bounds of sequences, rotary positions (…, S, d), and the grid of one video.
    """
    if name == "cu_seqlens":
        return value[value <= len(hidden)]
    if name == "position_embeddings":
        return tuple(part.narrow(-2, 0, len(hidden)) for part in value)
    if name == "grid_thw":
        ((steps, height, width),) = value
        return [[steps * left // count, height, width]]
    return value


def _by_frame(rows: Tensor, frames: int) -> Tensor:
    """Return rows (F·n, …) as (F, n, …)."""
    return rows.reshape(frames, len(rows) // frames, *rows.shape[1:])


def _of_frames(notes: list[Note], frames: int, cls_token: bool) -> Tensor:
    """Return the attention (F, S) that each patch receives, the mean over heads and all queries of its frame.

    Queries of other windows than a patch's own give it none.
    """
    rows = [received(*note, cls_token=cls_token)[0] for note in notes]
    size = sum(row.numel() for row in rows) // frames
    return torch.cat([(row * (row.shape[1] / size)).flatten() for row in rows]).reshape(frames, size)


def cells(frames: Tensor, patch: int) -> Tensor:
    """Return frames (T, 3, H, W) as the pixels (T, C, 3·patch²) of their square patches; a rest at the edges goes."""
    tiles = frames.unfold(2, patch, patch).unfold(3, patch, patch)  # (T, 3, rows, columns, patch, patch)
    return tiles.permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)
