"""Pseudo-videos of the testbed, for the first stage of SCORE's curriculum (§4.4): a few still frames, each repeated."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from vidsieve.testbed.world import FRAMES, Cast, make_cast, render, scene_rng

HELD = (3, 6)
"""Minimum and maximum number of frames of an image."""


def held_for(rng: np.random.Generator) -> list[int]:
    """Return the numbers of frames of 3 or 4 images, 16 in all; two images cannot fill 16 frames."""
    count = int(rng.integers(3, 5))
    while True:
        lengths = rng.integers(HELD[0], HELD[1] + 1, count)
        if int(lengths.sum()) == FRAMES:
            return [int(length) for length in lengths]


def make_pseudo(world: str, seed: int, index: int) -> tuple[Cast, NDArray[np.uint8]]:
    """Return the cast of pseudo-video `index`, and its frames (16, 144, 144, 3) uint8 RGB.

    Its images are frames of one scene. They share the fixtures, with which every caption that the model knows begins;
    nothing moves while an image is repeated.
    """
    rng = scene_rng(world, seed, index, salt=3)
    cast = make_cast(world, seed, index)
    lengths = held_for(rng)
    moments = np.sort(rng.choice(FRAMES, len(lengths), replace=False))
    shown = np.repeat(moments, lengths)
    return _stilled(cast, shown.tolist()), render(cast, seed, index)[shown]


def make_still(world: str, seed: int, index: int) -> tuple[Cast, NDArray[np.uint8]]:
    """Return the cast of one frame of scene `index`, and the frame (144, 144, 3) uint8 RGB."""
    cast = make_cast(world, seed, index)
    moment = int(scene_rng(world, seed, index, salt=4).integers(FRAMES))
    return _stilled(cast, [moment]), render(cast, seed, index)[moment]


def _stilled(cast: Cast, shown: list[int]) -> Cast:
    """Return the cast of single frames of a scene, in which nothing moves."""
    objects = []
    for thing in cast.objects:
        cells = {t: (row, column) for t, row, column in thing.track}
        track = tuple((t, *cells[moment]) for t, moment in enumerate(shown) if moment in cells)
        if not track:
            continue
        turned = thing.turned and tuple(t for t, moment in enumerate(shown) if moment in thing.turned[1])
        kind = "flash" if thing.kind == "mover" else thing.kind
        changed = (thing.turned[0], turned) if thing.turned and turned else None
        objects.append(replace(thing, kind=kind, track=track, turned=changed, direction=None))
    crowd = [o for o in objects if o.kind == "flash"]
    shapes, colours = (Counter(getattr(o, name) for o in crowd) for name in ("shape", "colour"))
    lone = tuple(shape for shape, count in shapes.items() if count == 1)
    alone = tuple(colour for colour, count in colours.items() if count == 1)
    return Cast(cast.world, tuple(objects), (), lone, alone)
