"""Pseudo-videos of the testbed: a few still frames, each held for a while, with a caption of what they show.

The first stage of SCORE's curriculum (§4.4): between frames nothing changes but at the joints.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from vidsieve.testbed.world import FRAMES, Cast, make_cast, render, scene_rng

HELD = (3, 6)
"""Least and most frames that an image is held for."""


def held_for(rng: np.random.Generator) -> list[int]:
    """Return for how many frames each of 3 or 4 images is held, 16 in all; two images cannot fill 16 frames."""
    count = int(rng.integers(3, 5))
    while True:
        lengths = rng.integers(HELD[0], HELD[1] + 1, count)
        if int(lengths.sum()) == FRAMES:
            return [int(length) for length in lengths]


def make_pseudo(world: str, seed: int, index: int) -> tuple[Cast, NDArray[np.uint8]]:
    """Return what pseudo-video `index` shows, and its frames (16, 144, 144, 3) uint8 RGB.

    Its images are frames of one scene, far apart. They share the fixtures, as every caption that the model knows begins
    with those; nothing moves, and all else stays in its cell for as long as its image is held.
    """
    rng = scene_rng(world, seed, index, salt=3)
    cast = make_cast(world, seed, index)
    lengths = held_for(rng)
    moments = np.sort(rng.choice(FRAMES, len(lengths), replace=False))
    shown = np.repeat(moments, lengths)
    return _stilled(cast, shown.tolist()), render(cast, seed, index)[shown]


def make_still(world: str, seed: int, index: int) -> tuple[Cast, NDArray[np.uint8]]:
    """Return what one frame of scene `index` shows, and the frame (144, 144, 3) uint8 RGB."""
    cast = make_cast(world, seed, index)
    moment = int(scene_rng(world, seed, index, salt=4).integers(FRAMES))
    return _stilled(cast, [moment]), render(cast, seed, index)[moment]


def _stilled(cast: Cast, shown: list[int]) -> Cast:
    """Return what a scene's frames show, each for itself: nothing moves from one to the next."""
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
