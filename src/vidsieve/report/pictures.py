"""Pictures of kept tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vidsieve.files import writing
from vidsieve.types import TokenGrid

_DIM = 0.22


def lit_frames(frames: NDArray[np.uint8], grid: TokenGrid, kept: Sequence[int]) -> NDArray[np.uint8]:
    """Return frames (T', H, W, 3) uint8 on which dropped tokens are dark.

    Parameters
    ----------
    frames : (T', H, W, 3) uint8
        T' is T, or a multiple of it where the model joins neighbouring frames into one token.
    kept : raster indices of kept tokens
    """
    flat = np.zeros(grid.num_tokens, np.float32)
    flat[list(kept)] = 1
    mask = flat.reshape(grid.frames, grid.height, grid.width)
    count, height, width = frames.shape[:3]
    rows = np.arange(height) * grid.height // height
    columns = np.arange(width) * grid.width // width
    shown = np.arange(count) * grid.frames // count
    light = _DIM + (1 - _DIM) * mask[shown][:, rows][:, :, columns]
    return np.asarray(np.rint(frames * light[..., None]), np.uint8)


def kept_picture(
    path: str | Path, frames: NDArray[np.uint8], grid: TokenGrid, kept: Mapping[str, Sequence[int]],
    title: str = "", columns: int = 8,
) -> None:  # fmt: skip
    """Write a PNG: one line of frames per method, kept tokens lit, dropped ones dark.

    Parameters
    ----------
    kept : method → raster indices
    columns : int
        Frames shown, evenly spaced.

    Raises
    ------
    OutputError
        If the file cannot be written.
    """
    import matplotlib

    matplotlib.use("Agg", force=False)
    from matplotlib.figure import Figure

    shown = np.unique(np.linspace(0, len(frames) - 1, min(columns, len(frames))).round().astype(int))
    aspect = frames.shape[1] / frames.shape[2]
    figure = Figure(figsize=(1.35 * len(shown) + 1.2, 1.35 * aspect * (len(kept) + 1) + 0.9), layout="constrained")
    axes: Any = figure.subplots(len(kept) + 1, len(shown), squeeze=False)
    lines = {"all tokens": range(grid.num_tokens), **kept}
    for line, (name, indices) in zip(axes, lines.items(), strict=True):
        lit = lit_frames(frames, grid, list(indices))
        for axis, frame in zip(line, shown, strict=True):
            axis.imshow(lit[frame], interpolation="nearest")
            axis.set_xticks([])
            axis.set_yticks([])
        label = name if name == "all tokens" else f"{name}\n{len(indices)} of {grid.num_tokens}"
        line[0].set_ylabel(label, rotation=0, ha="right", va="center", fontsize=8)
    for axis, frame in zip(axes[0], shown, strict=True):
        axis.set_title(f"frame {frame}", fontsize=7)
    if title:
        figure.suptitle(title, fontsize=9)
    with writing(Path(path)) as temporary:
        figure.savefig(temporary, dpi=110, format="png")
