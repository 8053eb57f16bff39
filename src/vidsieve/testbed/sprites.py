"""Alpha masks of the testbed's shapes, drawn from formulas; worlds A and B draw the same names differently."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from vidsieve.testbed.vocabulary import FIXTURES, GLYPHS, SHAPES

CELL = 24
"""Side of a lattice cell in pixels: one cell is exactly one video token."""
SIZES = (18, 20, 22)
TURNS = (-8.0, 0.0, 8.0)
"""Object sizes in pixels and rotations in degrees; a scene draws one of each per object."""

Array = NDArray[np.float64]
Drawing = Callable[[Array, Array], NDArray[np.bool_]]


def _polygon(points: list[tuple[float, float]]) -> Drawing:
    """Return the even-odd test of a closed polygon given in [-1, 1] coordinates (y down)."""

    def inside(x: Array, y: Array) -> NDArray[np.bool_]:
        hit = np.zeros(x.shape, bool)
        for (x0, y0), (x1, y1) in zip(points, points[1:] + points[:1], strict=True):
            if y0 == y1:
                continue
            crosses = (y0 > y) != (y1 > y)
            hit ^= crosses & (x < (x1 - x0) * (y - y0) / (y1 - y0) + x0)
        return hit

    return inside


def _spikes(count: int, inner: float, turn: float = 0.0) -> Drawing:
    angles = np.pi * (np.arange(2 * count) / count) - np.pi / 2 + turn
    radii = np.where(np.arange(2 * count) % 2 == 0, 1.0, inner)
    return _polygon([(float(r * np.cos(a)), float(r * np.sin(a))) for a, r in zip(angles, radii, strict=True)])


def _regular(count: int, turn: float = 0.0) -> Drawing:
    angles = 2 * np.pi * np.arange(count) / count - np.pi / 2 + turn
    return _polygon([(float(np.cos(a)), float(np.sin(a))) for a in angles])


def _box(x0: float, y0: float, x1: float, y1: float) -> Drawing:
    return lambda x, y: (x >= x0) & (x <= x1) & (y >= y0) & (y <= y1)


def _disc(radius: float, cx: float = 0.0, cy: float = 0.0) -> Drawing:
    return lambda x, y: (x - cx) ** 2 + (y - cy) ** 2 <= radius**2


def _any(*parts: Drawing) -> Drawing:
    return lambda x, y: np.logical_or.reduce([part(x, y) for part in parts])


def _minus(base: Drawing, *holes: Drawing) -> Drawing:
    return lambda x, y: base(x, y) & ~np.logical_or.reduce([hole(x, y) for hole in holes])


def _heart(sharp: float) -> Drawing:
    return lambda x, y: (1.25 * x) ** 2 + (1.15 * -y + 0.1 - sharp * np.sqrt(np.abs(x))) ** 2 <= 1.0


def _zigzag(x: Array, y: Array) -> NDArray[np.bool_]:
    return (np.abs(y - (np.abs(((x + 1) * 2) % 2 - 1) * 1.4 - 0.7)) < 0.28) & (np.abs(x) < 1)


def _wave(x: Array, y: Array) -> NDArray[np.bool_]:
    return (np.abs(y - 0.6 * np.sin(np.pi * x)) < 0.32) & (np.abs(x) < 1)


_WORLD_A: dict[str, Drawing] = {
    "circle": _disc(0.92),
    "square": _box(-0.82, -0.82, 0.82, 0.82),
    "triangle": _polygon([(0, -0.95), (0.98, 0.82), (-0.98, 0.82)]),
    "star": _spikes(5, 0.42),
    "cross": _any(_box(-0.3, -0.95, 0.3, 0.95), _box(-0.95, -0.3, 0.95, 0.3)),
    "ring": _minus(_disc(0.95), _disc(0.52)),
    "diamond": _polygon([(0, -1.0), (0.72, 0), (0, 1.0), (-0.72, 0)]),
    "heart": _heart(0.7),
    "moon": _minus(_disc(0.95), _disc(0.8, 0.5, -0.1)),
    "arrow": _polygon([(1, 0), (0.05, 0.85), (0.05, 0.32), (-1, 0.32), (-1, -0.32), (0.05, -0.32), (0.05, -0.85)]),
    "crown": _polygon([(-0.95, 0.8), (-0.95, -0.8), (-0.45, 0.0), (0, -0.9), (0.45, 0.0), (0.95, -0.8), (0.95, 0.8)]),
    "drop": _any(_disc(0.6, 0, 0.38), _polygon([(0, -1), (0.55, 0.2), (-0.55, 0.2)])),
    "house": _any(_box(-0.7, -0.1, 0.7, 0.95), _polygon([(0, -1), (1, 0), (-1, 0)])),
    "tree": _any(_box(-0.18, 0.3, 0.18, 1.0), _polygon([(0, -1), (0.8, 0.45), (-0.8, 0.45)])),
    "cup": _any(
        _polygon([(-0.9, -0.7), (0.5, -0.7), (0.3, 0.9), (-0.7, 0.9)]), _minus(_disc(0.42, 0.5), _disc(0.2, 0.5))
    ),
    "bell": _any(
        _disc(0.55, 0, -0.35),
        _polygon([(-0.55, -0.35), (0.55, -0.35), (0.95, 0.65), (-0.95, 0.65)]),
        _disc(0.25, 0, 0.75),
    ),
    "zigzag": _zigzag,
    "hourglass": _polygon([(-0.85, -0.95), (0.85, -0.95), (-0.85, 0.95), (0.85, 0.95)]),
    "ladder": _any(
        _box(-0.7, -0.95, -0.4, 0.95),
        _box(0.4, -0.95, 0.7, 0.95),
        *(_box(-0.7, c - 0.13, 0.7, c + 0.13) for c in (-0.6, 0.0, 0.6)),
    ),
    "comb": _any(
        _box(-0.9, -0.8, 0.9, -0.45), *(_box(c - 0.14, -0.8, c + 0.14, 0.85) for c in (-0.75, -0.25, 0.25, 0.75))
    ),
    "hook": _any(
        _box(0.15, -0.95, 0.5, 0.4),
        _minus(_minus(_disc(0.68, -0.18, 0.3), _disc(0.33, -0.18, 0.3)), _box(-1, -1, 0.14, 0.25)),
    ),
    "wave": _wave,
    "lattice": _any(
        *(_box(c - 0.14, -0.9, c + 0.14, 0.9) for c in (-0.65, 0.0, 0.65)),
        *(_box(-0.9, c - 0.14, 0.9, c + 0.14) for c in (-0.65, 0.0, 0.65)),
    ),
    "fork": _any(
        _box(-0.15, -0.2, 0.15, 1.0),
        _box(-0.75, -0.3, 0.75, 0.0),
        *(_box(c - 0.15, -0.95, c + 0.15, 0.0) for c in (-0.6, 0.6)),
    ),
    "bolt": _polygon([(0.25, -1), (-0.7, 0.2), (-0.08, 0.2), (-0.3, 1), (0.7, -0.25), (0.05, -0.25), (0.6, -1)]),
    "anchor": _any(
        _box(-0.13, -0.6, 0.13, 0.9),
        _disc(0.25, 0, -0.72),
        _box(-0.5, -0.42, 0.5, -0.2),
        _minus(_disc(0.9, 0, 0.1), _disc(0.62, 0, 0.05), _box(-1, -1, 1, 0.25)),
    ),
    "chain": _any(
        _minus(_disc(0.5, -0.45, -0.45), _disc(0.22, -0.45, -0.45)),
        _minus(_disc(0.5, 0.45, 0.45), _disc(0.22, 0.45, 0.45)),
    ),
    "stairs": _polygon(
        [(-0.95, 0.95), (-0.95, 0.4), (-0.4, 0.4), (-0.4, -0.15), (0.2, -0.15), (0.2, -0.8), (0.95, -0.8), (0.95, 0.95)]
    ),
    "target": _any(_minus(_disc(0.98), _disc(0.68)), _disc(0.36)),
    "trident": _any(
        _box(-0.14, -0.95, 0.14, 1.0),
        _minus(_disc(0.8, 0, -0.3), _disc(0.5, 0, -0.35), _box(-1, -1.2, 1, -0.3)),
        _box(-0.8, -0.9, -0.52, -0.3),
        _box(0.52, -0.9, 0.8, -0.3),
    ),
    "bowtie": _polygon([(-0.95, -0.7), (0, -0.15), (0.95, -0.7), (0.95, 0.7), (0, 0.15), (-0.95, 0.7)]),
    "funnel": _any(_polygon([(-0.95, -0.85), (0.95, -0.85), (0.2, 0.1), (-0.2, 0.1)]), _box(-0.2, 0.05, 0.2, 0.95)),
}

_WORLD_B: dict[str, Drawing] = _WORLD_A | {
    "circle": lambda x, y: (x / 0.78) ** 2 + (y / 0.96) ** 2 <= 1,
    "square": _box(-0.95, -0.68, 0.95, 0.68),
    "triangle": _polygon([(-0.45, -0.98), (0.98, 0.85), (-0.98, 0.85)]),
    "star": _spikes(6, 0.45),
    "cross": _any(_box(-0.2, -0.98, 0.2, 0.98), _box(-0.98, -0.42, 0.98, -0.02)),
    "ring": _minus(_regular(6), _disc(0.55)),
    "diamond": _polygon([(0, -1.0), (0.85, -0.25), (0, 1.0), (-0.85, -0.25)]),
    "heart": _any(
        _disc(0.5, -0.45, -0.4), _disc(0.5, 0.45, -0.4), _polygon([(-0.93, -0.25), (0.93, -0.25), (0, 0.98)])
    ),
    "moon": _minus(_disc(0.98), _disc(0.85, 0.42, 0.32)),
    "arrow": _any(_polygon([(1, 0), (-0.15, 0.95), (-0.15, -0.95)]), _box(-1.0, -0.2, -0.1, 0.2)),
    "crown": _any(_box(-0.9, 0.1, 0.9, 0.8), *(_box(c - 0.17, -0.85, c + 0.17, 0.2) for c in (-0.73, 0.0, 0.73))),
    "drop": _any(_disc(0.62, 0.1, 0.35), _polygon([(-0.6, -1), (0.66, 0.1), (-0.5, 0.5)])),
    "house": _any(_box(-0.85, -0.25, 0.85, 0.95), _polygon([(-0.5, -0.95), (0.5, -0.95), (1, -0.2), (-1, -0.2)])),
    "tree": _any(_box(-0.15, 0.1, 0.15, 1.0), _disc(0.62, 0, -0.35)),
    "cup": _any(_box(-0.85, -0.75, 0.4, 0.85), _minus(_disc(0.5, 0.42), _disc(0.25, 0.42))),
    "bell": _any(
        _polygon([(-0.3, -0.9), (0.3, -0.9), (0.6, 0.3), (0.95, 0.6), (-0.95, 0.6), (-0.6, 0.3)]), _disc(0.22, 0, 0.75)
    ),
}


def _draw(drawing: Drawing, size: int, turn: float) -> NDArray[np.float32]:
    fine = 4
    grid = (np.arange(CELL * fine) + 0.5) / (CELL * fine) * 2 - 1
    y, x = np.meshgrid(grid, grid, indexing="ij")
    scale, angle = CELL / size, np.deg2rad(turn)
    u = (x * np.cos(angle) + y * np.sin(angle)) * scale
    v = (-x * np.sin(angle) + y * np.cos(angle)) * scale
    mask = drawing(u, v).astype(np.float32)
    return np.asarray(mask.reshape(CELL, fine, CELL, fine).mean(axis=(1, 3)), np.float32)


@lru_cache(maxsize=4)
def sprite_bank(look: str) -> dict[str, NDArray[np.float32]]:
    """Return for each shape its masks (sizes × turns, 24, 24) in [0, 1], float32; `look` is "A" or "B"."""
    drawings = {"A": _WORLD_A, "B": _WORLD_B}[look]
    return {
        name: np.stack([_draw(drawings[name], size, turn) for size in SIZES for turn in TURNS])
        for name in (*SHAPES, *FIXTURES, *GLYPHS)
    }
