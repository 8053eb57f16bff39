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
    frame has the same rotary positions. The projectors' outputs have `count` frames again: merged ones repeat the one
    before that is left.

    Parameters
    ----------
    projectors : sequence of modules
        What reads the output of blocks.
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
    notes: list[Note] = []

    def shortened(module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        hidden = args[0]
        if hidden.ndim > 2 or len(left.frames) == count:
            return None
        bounds, rotary = kwargs.get("cu_seqlens"), kwargs.get("position_embeddings")
        if bounds is None or rotary is None:
            raise UnsupportedCallError(
                f"{front.name} shortens the cu_seqlens and position_embeddings of a {type(module).__name__}, which "
                f"gets {', '.join(kwargs)}"
            )
        changed = {
            "cu_seqlens": bounds[bounds <= len(hidden)],
            "position_embeddings": tuple(part.narrow(-2, 0, len(hidden)) for part in rotary),
        }
        return args, kwargs | changed

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
            notes = stack.enter_context(listening(config, attention_modules(blocks[heard])[0]))
        for number, block in enumerate(blocks):
            stack.callback(block.register_forward_pre_hook(shortened, with_kwargs=True).remove)
            if number < len(blocks) - 1:
                stack.callback(block.register_forward_hook(after(number)).remove)
        for projector in projectors:
            stack.callback(projector.register_forward_hook(spread).remove)
        yield left


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
