"""Long videos of which few frames matter: a scene of the world cut into short clips, with other frames between them.

The 16 frames of a scene appear as four clips of four frames at drawn times. Every other frame shows glyphs and decoys,
which no question is about, over backgrounds of its own. Questions and answers are those of the scene. Frames are drawn
sixteen at a time, so that a stream of hours needs no more memory than a short video.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from vidsieve.errors import VideoError
from vidsieve.testbed.questions import Question, make_questions
from vidsieve.testbed.world import FRAMES, GRID, Cast, make_cast, render, scene_rng

CLIP = 4
"""Frames of a clip."""
_OTHERS = 2**20
"""Seeds and numbers of the frames between clips start here: no scene has them."""


@dataclass(frozen=True)
class LongScene:
    """Scene `index` of a world under `seed`, spread over a video of `frames` frames.

    Raises
    ------
    VideoError
        If there are fewer frames than the scene has.
    """

    world: str
    seed: int
    index: int
    frames: int

    def __post_init__(self) -> None:
        if self.frames < FRAMES:
            raise VideoError(f"a long video has at least the {FRAMES} frames of its scene, got {self.frames}")

    @property
    def cast(self) -> Cast:
        """The objects that can be asked about, in the scene's own 16 frames."""
        return make_cast(self.world, self.seed, self.index)

    @property
    def times(self) -> NDArray[np.int64]:
        """The frame of the long video at which each frame of the scene appears, (16,) int64, ascending."""
        rng = scene_rng(self.world, self.seed, self.index, salt=6)
        before = np.sort(rng.integers(0, self.frames - FRAMES + 1, FRAMES // CLIP))
        return np.arange(FRAMES) + np.repeat(before, CLIP)

    def questions(self) -> list[Question]:
        """Return the scene's questions, with `targets` that index the long video's tokens."""
        times, cells = self.times, GRID * GRID
        return [
            replace(q, targets=tuple(int(times[token // cells]) * cells + token % cells for token in q.targets))
            for q in make_questions(self.cast, self.seed, self.index)
        ]

    def read(self) -> Iterator[NDArray[np.uint8]]:
        """Yield the frames (144, 144, 3) uint8 RGB one after the other; equal scenes give equal pixels."""
        shown = dict(zip(self.times.tolist(), render(self.cast, self.seed, self.index), strict=True))
        for first in range(0, self.frames, FRAMES):
            block = range(first, min(first + FRAMES, self.frames))
            if not shown.keys() >= set(block):
                others = render(self.others(first // FRAMES), *self._numbers(first // FRAMES))
            for at in block:
                yield shown[at] if at in shown else others[at - first]

    def pixels(self) -> NDArray[np.uint8]:
        """Return all frames, (frames, 144, 144, 3) uint8 RGB."""
        return np.stack(list(self.read()))

    def others(self, block: int) -> Cast:
        """Return the cast of frames 16·`block` …, which shows nothing that is asked about, in the scene's colours."""
        seed, index = self._numbers(block)
        colours = sorted({thing.colour for thing in self.cast.objects if thing.kind == "glyph"})
        rng, cast = scene_rng(self.world, seed, index, salt=6), make_cast(self.world, seed, index)
        glyphs = [thing for thing in cast.objects if thing.kind == "glyph"]
        # A colour that a question identifies an object by must not appear on a glyph.
        return replace(cast, objects=tuple(replace(thing, colour=str(rng.choice(colours))) for thing in glyphs))

    def _numbers(self, block: int) -> tuple[int, int]:
        """Return the seed and the number of the scene that a block of other frames is made from."""
        return self.seed + _OTHERS, self.index * _OTHERS + block
