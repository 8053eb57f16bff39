"""Families whose video frames are images to the model: placeholders alone do not tell a video from some images."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from vidsieve.adapters.adapter import Adapter
from vidsieve.adapters.encoded import ImageSpan, VideoFeatures, VideoSpan
from vidsieve.adapters.family import Videos
from vidsieve.adapters.front import cells, sources
from vidsieve.adapters.locate import check_count, of_frames
from vidsieve.adapters.probe import block_mean
from vidsieve.adapters.transformers_api import encoder_features
from vidsieve.compressors.front import EncoderFront, FrameFront, Front
from vidsieve.errors import PromptError, UnsupportedCallError
from vidsieve.types import ENCODER_NEEDS, Need, Stage, TokenGrid


class FrameAdapter(Adapter):
    """Base of families that read a video as images, each a square of tokens; positions are 1-D.

    The images of a prompt are one video if there are two or more, unless ``videos=[(first, count), …]`` says which
    runs of images (counted over the batch, in order) are videos; the others are then kept whole.
    """

    provides: ClassVar[frozenset[Need]] = Adapter.provides | ENCODER_NEEDS
    modality: ClassVar[Literal["video", "image"]] = "image"
    flat: ClassVar[frozenset[str]] = frozenset({"image"})
    image_keys: ClassVar[tuple[str, ...]] = ()
    fronts: ClassVar[frozenset[Stage]] = frozenset({Stage.FRAME, Stage.ENCODER})

    @abstractmethod
    def frame_features(self, inputs: Mapping[str, Any]) -> Tensor:
        """Return every image of a batch (F, n, D), encoded by the model's vision tower and projector, in order."""

    @property
    @abstractmethod
    def frame_side(self) -> int:
        """Tokens along one side of a frame."""

    @property
    def video_token_id(self) -> int:
        """The id of an image placeholder: frames are images."""
        return self.image_token_id

    def carries_video(self, inputs: Mapping[str, Any]) -> bool:
        """True if a call has pixels or ready features of two or more images of a prompt."""
        ready = encoder_features(inputs, "image")
        ids = inputs.get("input_ids")
        pixels = inputs.get(self.video_keys[0])
        if ids is None:  # one image alone is not a video
            return ready is not None or (pixels is not None and math.prod(pixels.shape[:-3]) > 1)
        given = ready is not None or pixels is not None
        # Pixels without any placeholder are a mistake to report.
        return given and (self.holds_video(ids) or not bool((ids == self.image_token_id).any()))

    def holds_video(self, ids: Tensor) -> bool:
        """True if a prompt holds two or more images."""
        return bool(((ids == self.image_token_id).sum(-1) >= 2 * self.frame_side**2).any())

    def carries_image(self, inputs: Mapping[str, Any], ids: Tensor) -> bool:
        """Return False: every image is treated as a frame."""
        return False

    def holds_image(self, ids: Tensor) -> bool:
        """Return False: every image is treated as a frame."""
        return False

    def video_features(self, inputs: Mapping[str, Any]) -> list[VideoFeatures]:
        """Return all images of the batch as if they were one video."""
        frames = self.frame_features(inputs)
        grid = TokenGrid(len(frames), self.frame_side, self.frame_side)
        return [VideoFeatures(frames.flatten(0, 1), grid, frames[:0, 0])]

    def images(self, inputs: Mapping[str, Any]) -> Tensor:
        """Return the pixels (F, 3, H, W) of every image of a batch, in order."""
        return inputs["pixel_values"]  # type: ignore[no-any-return]

    def images_of(self, inputs: Mapping[str, Any], frames: Tensor) -> dict[str, Any]:
        """Return the arguments of a call that has some images (F',) int64 of a batch alone."""
        pixels = self.images(inputs)
        return {**inputs, "pixel_values": pixels[frames.to(pixels.device)]}

    def frames_of(self, inputs: Mapping[str, Any], video: int, frames: Tensor) -> dict[str, Any]:
        """Return what a video processor gives of one video, (videos, T, …) each, with some of its frames alone."""
        return {name: value[video : video + 1, frames.to(value.device)] for name, value in inputs.items()}

    def _reused(
        self, inputs: Mapping[str, Any], ids: Tensor, videos: Videos, front: FrameFront
    ) -> tuple[Tensor, Tensor]:
        """Return which of all images (E,) are encoded, and by image its number (F,) among them."""
        pixels, vision = self.images(inputs), self.model.config.vision_config
        taken, size = torch.arange(len(pixels)), self.frame_side**2
        rows = (ids == self.image_token_id).nonzero()[:, 0]
        check_count(len(rows), len(pixels) * size, "image", len(pixels))
        patch = vision.patch_size if isinstance(vision.patch_size, int) else vision.patch_size[0]
        for start, length in _videos(videos, rows[::size].tolist()):
            kept, places = sources(front, cells(pixels[start : start + length], patch))
            taken[start : start + length] = start + kept[places]
        encoded = torch.unique(taken)
        return encoded, torch.searchsorted(encoded, taken)

    def locate(
        self,
        ids: Tensor,
        inputs: Mapping[str, Any],
        videos: Videos,
        needs: frozenset[Need],
        front: Front | None = None,
    ) -> tuple[tuple[VideoSpan, ...], tuple[ImageSpan, ...]]:
        """Return the videos and the images outside them, located by their placeholders."""
        self.check_front(front, inputs)
        if isinstance(front, EncoderFront):
            return self._located_merged(ids, inputs, videos, needs, front)
        size, places = self.frame_side**2, None
        if isinstance(front, FrameFront):
            encoded, places = self._reused(inputs, ids, videos, front)
            inputs = self.images_of(inputs, encoded)
        frames, probe = self.probed(lambda: self.frame_features(inputs), inputs, needs)  # (F, n, D)
        if places is not None:
            frames = frames[places.to(frames.device)]
            probe = None if probe is None else probe.at(places, size)
        first, where = self._placed(ids, len(frames))
        chosen = _videos(videos, first.tolist())
        side, spans = self.frame_side, []
        for start, length in chosen:
            tokens = frames[start : start + length].flatten(0, 1)
            signals = probe.part(start * size, length * size) if probe is not None else None
            through = None if places is None else len(torch.unique(places[start : start + length]))
            grid = TokenGrid(length, side, side)
            video = VideoFeatures(tokens, grid, tokens[:0], encoder=signals, encoded=through)
            span = where[start : start + length].flatten()
            spans.append(VideoSpan(int(first[start]), span, span[:0], video, span[:0]))
        others = _outside(chosen, len(frames))
        return tuple(spans), _images(first[others], where[others], frames[others.to(frames.device)])

    def _located_merged(
        self, ids: Tensor, inputs: Mapping[str, Any], videos: Videos, needs: frozenset[Need], front: EncoderFront
    ) -> tuple[tuple[VideoSpan, ...], tuple[ImageSpan, ...]]:
        """Return the videos, encoded one by one under a method inside the encoder, and the images outside them."""
        first, where = self._placed(ids, len(self.images(inputs)))
        chosen, spans = _videos(videos, first.tolist()), []
        for start, length in chosen:
            numbers = torch.arange(start, start + length)
            shown = partial(lambda numbers, some: self.images_of(inputs, numbers[some]), numbers)
            video = self._merged(shown, length, needs, front)
            tokens, rest = of_frames(where[numbers].flatten(), video)
            spans.append(VideoSpan(int(first[start]), tokens, tokens[:0], video, rest))
        others = _outside(chosen, len(first))
        if not len(others):
            return tuple(spans), ()
        return tuple(spans), _images(first[others], where[others], self.frame_features(self.images_of(inputs, others)))

    def _placed(self, ids: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """Return the prompt (F,) of each of `count` images, and the columns (F, n) of its placeholders."""
        size = self.frame_side**2
        rows, columns = (ids == self.image_token_id).nonzero(as_tuple=True)
        check_count(len(rows), count * size, "image", count)
        rows = rows.view(count, size)
        if not torch.equal(rows[:, 0], rows[:, -1]):
            raise PromptError("an image's placeholders run from one prompt of the batch into the next")
        return rows[:, 0], columns.view(count, size)

    def check_videos(self, videos: Videos) -> None:
        """Refuse what is no list of (first, count)."""
        given: Any = videos
        pairs = given is None or (
            isinstance(given, list | tuple)
            and all(isinstance(v, list | tuple) and len(v) == 2 and all(isinstance(n, int) for n in v) for v in given)
        )
        if not pairs:
            raise UnsupportedCallError(f"videos must be a list of (first, count) pairs, as [(0, 8)]; got {videos!r}")

    def pool_signals(self, values: list[Tensor], inputs: Mapping[str, Any]) -> Tensor:
        """Return the mean of the patches that pixel shuffle puts into each token."""
        patches = torch.cat(values).float()
        side = math.isqrt(patches.shape[1])
        return block_mean(patches, side, side // self.frame_side).flatten(0, 1)


def _outside(videos: Sequence[tuple[int, int]], count: int) -> Tensor:
    """Return which of `count` images are in no video, sorted."""
    inside = {number for start, length in videos for number in range(start, start + length)}
    return torch.tensor([number for number in range(count) if number not in inside], dtype=torch.int64)


def _images(rows: Tensor, columns: Tensor, frames: Tensor) -> tuple[ImageSpan, ...]:
    """Return the images of every prompt, from the prompt (O,), the columns (O, n) and features (O, n, D) of each."""
    return tuple(
        ImageSpan(row, columns[rows == row].flatten(), frames[(rows == row).to(frames.device)].flatten(0, 1))
        for row in sorted(set(rows.tolist()))
    )


def _videos(videos: Videos, rows: list[int]) -> list[tuple[int, int]]:
    """Return (first, count) of every video among images of prompts `rows`."""
    return _runs(rows) if videos is None else _checked(videos, rows)


def _runs(rows: list[int]) -> list[tuple[int, int]]:
    """Return (first, count) of the images of every prompt that has two or more."""
    starts = {row: rows.index(row) for row in dict.fromkeys(rows)}
    return [(start, rows.count(row)) for row, start in starts.items() if rows.count(row) > 1]


def _checked(videos: Sequence[tuple[int, int]], rows: list[int]) -> list[tuple[int, int]]:
    end = 0
    for first, count in videos:
        if first < end or count < 1 or first + count > len(rows):
            raise UnsupportedCallError(
                f"videos={list(videos)!r} must be (first, count) pairs in order that do not overlap, among the "
                f"{len(rows)} images of the call"
            )
        if rows[first] != rows[first + count - 1]:
            raise UnsupportedCallError(f"video ({first}, {count}) runs from one prompt of the batch into the next")
        end = first + count
    if not videos:
        raise UnsupportedCallError("videos=[] names no video: leave it out, or call the model as it is")
    return list(videos)
