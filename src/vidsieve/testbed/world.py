"""The synthetic video world: crowded, moving scenes in which few tokens decide an answer.

A scene is 16 frames of 144×144 pixels on a 6×6 lattice of 24-pixel cells; one cell of one frame is one video token. Two
*fixtures* are present throughout (one changes colour for two frames), two *movers* cross four cells, and more than a
hundred small objects *flash* for one or two frames: some have shapes that questions ask about; the others, *glyphs*,
look as salient, and no question is about them. Free cells hold decoys, mosaics of random colours; the background
drifts, cuts and flickers. Questions identify an object by one attribute; some shapes and colours occur exactly once.

In the `dense` world 64 flashes can be asked about, more than a small budget holds: the question is needed to choose.
In the `sparse` world there are 18 among 140 glyphs: a policy that does not read the question can find them. Each has
a twin, `dense-b` and `sparse-b`, with other drawings of the shapes, other backgrounds and motions.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from vidsieve.errors import UnknownNameError
from vidsieve.testbed.sprites import CELL, SIZES, TURNS, sprite_bank
from vidsieve.testbed.vocabulary import COLOURS, DIRECTIONS, FIXTURES, GLYPHS, SHAPES

FRAMES = 16
GRID = 6
SIDE = GRID * CELL
TOKENS = FRAMES * GRID * GRID
WORLD_VERSION = 1

_RGB = {
    "red": (225, 35, 35),
    "green": (30, 165, 50),
    "blue": (45, 75, 235),
    "yellow": (240, 225, 40),
    "purple": (165, 45, 190),
    "cyan": (45, 215, 225),
    "orange": (250, 140, 20),
    "white": (248, 248, 248),
}
_HUES = np.array([*_RGB.values(), (20, 20, 20), (128, 128, 128)], np.float64)
_STEP = {"left": (0, -1), "right": (0, 1), "up": (-1, 0), "down": (1, 0)}


@dataclass(frozen=True)
class WorldSettings:
    """Numbers of objects in a scene; the defaults are those of the dense world.

    Parameters
    ----------
    unique_shapes, unique_colours : int
        Flashes whose shape, or whose colour, no other flash has.
    decoy_share : float
        Fraction of the free cells that hold decoys.
    long_flash : float
        Fraction of the flashes that last for two frames.
    crowded : int, optional
        Shapes that all other flashes share, so that few flashes still make classes of more than three; None: all.
    order_questions : int, optional
        Most questions about the first or last of a class; None: all.
    """

    flashes: int = 64
    glyphs: int = 100
    movers: int = 2
    fixtures: int = 2
    unique_shapes: int = 4
    unique_colours: int = 2
    decoy_share: float = 0.45
    long_flash: float = 0.5
    crowded: int | None = None
    order_questions: int | None = None


@dataclass(frozen=True)
class World:
    """A kind of scenes: their settings, and which of two sets of drawings, backgrounds and motions they have."""

    look: Literal["A", "B"]
    settings: WorldSettings


_SPARSE = WorldSettings(flashes=18, glyphs=140, decoy_share=0.6, crowded=2, order_questions=4)
WORLDS = {
    "dense": World("A", WorldSettings()),
    "dense-b": World("B", WorldSettings()),
    "sparse": World("A", _SPARSE),
    "sparse-b": World("B", _SPARSE),
}
"""The worlds by name. Models and policies are trained on `dense` or `sparse`, never on their twins."""


def world_of(name: str) -> World:
    """Return the world of a name.

    Raises
    ------
    UnknownNameError
    """
    if name not in WORLDS:
        raise UnknownNameError("world", name, WORLDS)
    return WORLDS[name]


@dataclass(frozen=True)
class SceneObject:
    """One object: its look, and its cells as (frame, row, column) in time order."""

    kind: str
    shape: str
    colour: str
    track: tuple[tuple[int, int, int], ...]
    direction: str | None = None
    turned: tuple[str, tuple[int, ...]] | None = None

    def colour_at(self, frame: int) -> str:
        """Return the colour in `frame`: a fixture has another one while it is turned."""
        return self.turned[0] if self.turned and frame in self.turned[1] else self.colour

    def tokens(self) -> tuple[int, ...]:
        """Return the raster indices of the video tokens that show the object, in time order."""
        return tuple((t * GRID + row) * GRID + column for t, row, column in self.track)


@dataclass(frozen=True)
class Cast:
    """The objects of a scene, before it is drawn."""

    world: str
    objects: tuple[SceneObject, ...]
    decoys: tuple[tuple[int, int, int], ...]
    unique_shapes: tuple[str, ...] = field(default=())
    unique_colours: tuple[str, ...] = field(default=())


def scene_rng(world: str, seed: int, index: int, salt: int = 0) -> np.random.Generator:
    """Return the generator of scene `index` under `seed`; `salt` separates cast, drawing and questions."""
    return np.random.default_rng([WORLD_VERSION, ord(world_of(world).look), seed, index, salt])


class _Board:
    """The free cells of every frame."""

    def __init__(self, rng: np.random.Generator) -> None:
        self.rng = rng
        self.free = np.ones((FRAMES, GRID, GRID), bool)

    def place_flash(self, length: int) -> tuple[tuple[int, int, int], ...]:
        """Take a random free cell for `length` consecutive frames."""
        while True:
            t = int(self.rng.integers(0, FRAMES - length + 1))
            row, column = (int(v) for v in self.rng.integers(0, GRID, 2))
            if self.free[t : t + length, row, column].all():
                self.free[t : t + length, row, column] = False
                return tuple((t + i, row, column) for i in range(length))

    def place_mover(self, direction: str, length: int = 4) -> tuple[tuple[int, int, int], ...]:
        """Take a straight path of free cells, one cell a frame."""
        dy, dx = _STEP[direction]
        while True:
            t = int(self.rng.integers(0, FRAMES - length + 1))
            row, column = (int(v) for v in self.rng.integers(0, GRID, 2))
            path = tuple((t + i, row + i * dy, column + i * dx) for i in range(length))
            inside = all(0 <= r < GRID and 0 <= c < GRID for _, r, c in path)
            if inside and all(self.free[cell] for cell in path):
                for cell in path:
                    self.free[cell] = False
                return path


def _shared_looks(rng: np.random.Generator, count: int, shapes: list[str], colours: list[str]) -> list[tuple[str, str]]:
    """Return `count` looks of the crowded classes: two small classes (2 and 3 members), the rest shared evenly."""
    sizes = [2, 3] + [0] * (len(shapes) - 2)
    looks = []
    for shape, size in zip(shapes, sizes, strict=True):
        # Members of a small class differ in colour, so that "the first one" has one answer.
        looks += [(shape, str(c)) for c in rng.choice(colours, size, replace=False)]
    crowded = shapes[2:]
    while len(looks) < count:
        looks.append((str(rng.choice(crowded)), str(rng.choice(colours))))
    return looks[:count]


def make_cast(world: str, seed: int, index: int) -> Cast:
    """Return the objects of scene `index` of a world under `seed`."""
    s = world_of(world).settings
    rng = scene_rng(world, seed, index)
    board = _Board(rng)
    shapes = [str(v) for v in rng.permutation(SHAPES)]
    colours = [str(v) for v in rng.permutation(COLOURS)]
    mover_shapes, shapes = shapes[: s.movers], shapes[s.movers :]
    lone_shapes, shared_shapes = shapes[: s.unique_shapes], shapes[s.unique_shapes :]
    if s.crowded is not None:
        shared_shapes = shared_shapes[: 2 + s.crowded]
    lone_colours, rare_colour, *common = colours[: s.unique_colours], *colours[s.unique_colours :]
    objects: list[SceneObject] = []

    for shape in [str(v) for v in rng.permutation(FIXTURES)][: s.fixtures]:
        row, column = (int(v) for v in rng.integers(0, GRID, 2))
        while not board.free[0, row, column]:
            row, column = (int(v) for v in rng.integers(0, GRID, 2))
        board.free[:, row, column] = False
        first, second = (str(v) for v in rng.choice(common, 2, replace=False))
        start = int(rng.integers(2, FRAMES - 4))
        turned = (second, (start, start + 1)) if not objects else None
        objects.append(
            SceneObject("fixture", shape, first, tuple((t, row, column) for t in range(FRAMES)), turned=turned)
        )
    for shape in mover_shapes:
        direction = str(rng.choice(DIRECTIONS))
        objects.append(
            SceneObject("mover", shape, str(rng.choice(common)), board.place_mover(direction), direction=direction)
        )

    looks = [(shape, str(rng.choice(common))) for shape in lone_shapes]
    looks += [(str(rng.choice(shared_shapes[2:])), colour) for colour in lone_colours]
    pair = [str(v) for v in rng.choice(shared_shapes[2:], 2, replace=False)]
    looks += [(shape, rare_colour) for shape in pair]
    looks += _shared_looks(rng, s.flashes - len(looks), shared_shapes, common)
    glyph_looks = [(str(rng.choice(GLYPHS)), str(rng.choice(common))) for _ in range(s.glyphs)]
    for kind, group in (("flash", looks), ("glyph", glyph_looks)):
        for shape, colour in group:
            length = 1 + int(rng.random() < s.long_flash)
            objects.append(SceneObject(kind, shape, colour, board.place_flash(length)))

    empty = np.argwhere(board.free)
    chosen = empty[rng.random(len(empty)) < s.decoy_share]
    decoys = tuple((int(t), int(r), int(c)) for t, r, c in chosen)
    return Cast(world, tuple(objects), decoys, tuple(lone_shapes), tuple(lone_colours))


def _smooth(rng: np.random.Generator, coarse: int, size: int) -> NDArray[np.float32]:
    """Return (size, size, 3) smooth noise in about [-1, 1]: a coarse grid, bilinearly enlarged.

    Without matrix products, which round differently from processor to processor: the world's pixels must not.
    """
    at = np.linspace(0, coarse - 1, size)
    low = np.minimum(at.astype(int), coarse - 2)
    part = (at - low).astype(np.float32)
    grid = rng.normal(size=(coarse, coarse, 3)).astype(np.float32)
    rows = grid[low] * (1 - part)[:, None, None] + grid[low + 1] * part[:, None, None]
    across = part[None, :, None]
    return np.asarray(rows[:, low] * (1 - across) + rows[:, low + 1] * across, np.float32)


def _background(rng: np.random.Generator, look: str, size: int) -> NDArray[np.float32]:
    """Return a low-saturation texture (size, size, 3): stripes over smooth noise in look A, checks and rings in B."""
    tone = rng.uniform(70, 150)
    tint = rng.normal(scale=9, size=3)
    y, x = np.meshgrid(np.arange(float(size)), np.arange(float(size)), indexing="ij")
    angle, wave = rng.uniform(0, np.pi), rng.uniform(14, 40)
    along = x * np.cos(angle) + y * np.sin(angle)
    if look == "A":
        pattern = np.sin(2 * np.pi * along / wave)
    elif rng.random() < 0.5:
        across = -x * np.sin(angle) + y * np.cos(angle)
        pattern = np.sign(np.sin(2 * np.pi * along / wave) * np.sin(2 * np.pi * across / wave))
    else:
        centre = rng.uniform(0, size, 2)
        pattern = np.sin(2 * np.pi * np.sqrt((y - centre[0]) ** 2 + (x - centre[1]) ** 2) / wave)
    stripes = (rng.uniform(4, 14) * pattern).astype(np.float32)[..., None]
    base = (tone + tint).astype(np.float32)
    return np.asarray(base + np.float32(14) * _smooth(rng, int(rng.integers(4, 10)), size) + stripes, np.float32)


def render(cast: Cast, seed: int, index: int) -> NDArray[np.uint8]:
    """Return the frames (16, 144, 144, 3) uint8 RGB of a cast; equal seeds give equal pixels."""
    rng, look = scene_rng(cast.world, seed, index, salt=1), world_of(cast.world).look
    margin = 32
    frames = np.empty((FRAMES, SIDE, SIDE, 3), np.float32)
    cut = int(rng.integers(4, FRAMES - 3)) if rng.random() < 0.5 else FRAMES
    grounds = [_background(rng, look, SIDE + 2 * margin) for _ in range(2)]
    drift = rng.uniform(-1.5, 1.5, 2)
    for t in range(FRAMES):
        swing = 10 * np.sin(t / 2.5) if look == "B" else 0.0
        oy, ox = (round(float(margin + d * (t - FRAMES / 2) + swing)) for d in drift)
        frames[t] = grounds[int(t >= cut)][oy : oy + SIDE, ox : ox + SIDE]

    shake = rng.integers(-1, 2, (FRAMES, 2))
    # A border lets shaken and jittered sprites hang over the edge; it is cut off at the end.
    canvas = np.pad(frames, ((0, 0), (3, 3), (3, 3), (0, 0)), mode="edge")

    def corner(t: int, row: int, column: int, dy: int, dx: int) -> tuple[slice, slice]:
        y, x = row * CELL + 3 + int(shake[t, 0]) + dy, column * CELL + 3 + int(shake[t, 1]) + dx
        return slice(y, y + CELL), slice(x, x + CELL)

    for t, row, column in cast.decoys:
        side, parts = int(rng.integers(16, 23)), int(rng.integers(2, 4))
        mosaic = _HUES[rng.integers(0, len(_HUES), (parts, parts))] + rng.normal(scale=20, size=(parts, parts, 3))
        at = np.arange(side) * parts // side
        tile = np.clip(mosaic, 0, 255)[at][:, at]
        ys, xs = corner(t, row, column, (CELL - side) // 2, (CELL - side) // 2)
        canvas[t, ys.start : ys.start + side, xs.start : xs.start + side] = tile
    bank = sprite_bank(look)
    for thing in cast.objects:
        mask = bank[thing.shape][int(rng.integers(len(SIZES) * len(TURNS)))][..., None]
        dy, dx = (int(v) for v in rng.integers(-1, 2, 2))
        shade = rng.normal(scale=8, size=3)
        for t, row, column in thing.track:
            ys, xs = corner(t, row, column, dy, dx)
            paint = np.clip(np.asarray(_RGB[thing.colour_at(t)]) + shade, 0, 255)
            canvas[t, ys, xs] += mask * (paint - canvas[t, ys, xs])

    frames = canvas[:, 3:-3, 3:-3]
    gain = rng.uniform(0.9, 1.1, (FRAMES, 1, 1, 1)).astype(np.float32)
    grain = rng.normal(scale=5, size=(SIDE + 16, SIDE + 16, 3)).astype(np.float32)
    offsets = rng.integers(0, 17, (FRAMES, 2))
    noise = np.stack([grain[y : y + SIDE, x : x + SIDE] for y, x in offsets])
    return np.asarray(np.clip(np.rint(frames * gain + noise), 0, 255), np.uint8)
