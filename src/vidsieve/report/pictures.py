"""Pictures of kept tokens, and of training videos."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from vidsieve.io.files import writing
from vidsieve.io.texts import printable
from vidsieve.types import TokenGrid

_DIM = 0.22
_SMALLEST = 288  # pixels: lower frames are enlarged in an overlay


def new_figure(**options: Any) -> Any:
    """Return a matplotlib figure that needs no display; matplotlib is loaded here, where a picture is wanted."""
    import matplotlib

    matplotlib.use("Agg", force=False)
    from matplotlib.figure import Figure

    return Figure(**options)


def save(figure: Any, path: str | Path, dpi: int = 140) -> None:
    """Write a figure as PNG, or by the path's ending as SVG or PDF.

    Raises
    ------
    OutputError
        If the file cannot be written.
    """
    path = Path(path)
    with writing(path) as temporary:
        figure.savefig(temporary, dpi=dpi, format=path.suffix.lstrip(".") or "png")


def drawable(text: str) -> str:
    """Return a text as matplotlib draws it: printable, and no dollar sign begins a formula."""
    return printable(text).replace("$", r"\$")


def lit_frames(
    frames: NDArray[np.uint8], grid: TokenGrid, kept: Sequence[int], shown: Sequence[int] | None = None
) -> NDArray[np.uint8]:
    """Return the `shown` ones (default: all) of frames (T', H, W, 3) uint8, dropped tokens dark.

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
    numbers = np.arange(count) if shown is None else np.asarray(shown)
    lit = np.empty((len(numbers), *frames.shape[1:]), np.uint8)
    for place, number in enumerate(numbers):  # in float32 a frame at a time
        light = _DIM + (1 - _DIM) * mask[number * grid.frames // count][rows][:, columns]
        lit[place] = np.rint(frames[number] * light[..., None])
    return lit


def kept_figure(
    frames: NDArray[np.uint8], grid: TokenGrid, kept: Mapping[str, Sequence[int]], title: str = "", columns: int = 8
) -> Any:
    """Return a figure with one line of frames per method, kept tokens lit, dropped ones dark (SCORE, Figure 5).

    Parameters
    ----------
    kept : method → raster indices
    columns : int
        Frames shown, evenly spaced.
    """
    shown = np.unique(np.linspace(0, len(frames) - 1, min(columns, len(frames))).round().astype(int)).tolist()
    aspect = frames.shape[1] / frames.shape[2]
    figure = new_figure(figsize=(1.35 * len(shown) + 1.2, 1.35 * aspect * (len(kept) + 1) + 0.9), layout="constrained")
    axes: Any = figure.subplots(len(kept) + 1, len(shown), squeeze=False)
    lines = {"all tokens": range(grid.num_tokens), **kept}
    for line, (name, indices) in zip(axes, lines.items(), strict=True):
        for axis, lit in zip(line, lit_frames(frames, grid, list(indices), shown), strict=True):
            axis.imshow(lit, interpolation="nearest")
            axis.set_xticks([])
            axis.set_yticks([])
        label = name if name == "all tokens" else f"{drawable(name)}\n{len(indices)} of {grid.num_tokens}"
        line[0].set_ylabel(label, rotation=0, ha="right", va="center", fontsize=8)
    for axis, frame in zip(axes[0], shown, strict=True):
        axis.set_title(f"frame {frame}", fontsize=7)
    if title:
        figure.suptitle(drawable(title), fontsize=9)
    return figure


def overlay_video(
    path: str | Path, frames: NDArray[np.uint8], duration: float, grid: TokenGrid, kept: Mapping[str, Sequence[int]]
) -> None:
    """Write an mp4 that shows the frames a method was given with its kept tokens lit, several methods side by side.

    Parameters
    ----------
    duration : float
        Seconds that all frames together are shown; 0: one a frame.
    kept : method → raster indices

    Raises
    ------
    OutputError
        If the file cannot be written.
    """
    from vidsieve.video.reading import write_video

    times = max(1, -(-_SMALLEST // frames.shape[1]))
    parts = []
    for name, indices in kept.items():
        lit = lit_frames(frames, grid, list(indices)).repeat(times, 1).repeat(times, 2)
        parts.append(_titled(lit, f"{name}: {len(indices)} of {grid.num_tokens}"))
    joined = np.concatenate(parts, 2)
    joined = joined[:, : joined.shape[1] // 2 * 2, : joined.shape[2] // 2 * 2]
    write_video(path, np.ascontiguousarray(joined), max(len(frames) / duration, 0.1) if duration > 0 else 1.0)


def _titled(frames: NDArray[np.uint8], text: str) -> NDArray[np.uint8]:
    """Return frames with a line of text above them."""
    strip = Image.new("RGB", (frames.shape[2], 24))
    ImageDraw.Draw(strip).text((6, 5), printable(text), fill=(255, 255, 255), font=ImageFont.load_default(13))
    line = np.broadcast_to(np.asarray(strip, np.uint8), (len(frames), *np.asarray(strip).shape))
    return np.concatenate([line, frames], 1)


def contact_sheet(path: str | Path, videos: Sequence[tuple[NDArray[np.uint8], str]]) -> None:
    """Write a PNG: each video's frames in a row, its caption below, cut after four lines.

    Parameters
    ----------
    videos : (frames (T, H, W, 3) uint8, caption), at least one

    Raises
    ------
    OutputError
        If the file cannot be written.
    """
    width, margin, gap, line = 13.0, 0.25, 0.04, 0.17  # inches
    cell = min(1.6, (width - 2 * margin) / max(len(frames) for frames, _ in videos))
    texts = [textwrap.wrap(drawable(caption), 190, max_lines=4, placeholder=" …") for _, caption in videos]
    tall = [cell * min(1.5, frames.shape[1] / frames.shape[2]) for frames, _ in videos]
    heights = [high + 0.1 + line * len(text) + 0.3 for high, text in zip(tall, texts, strict=True)]
    total = sum(heights) + margin
    figure = new_figure(figsize=(width, total))
    top = total - margin
    for (frames, _), text, high, height in zip(videos, texts, tall, heights, strict=True):
        for place, frame in enumerate(frames):
            box = (margin + place * cell) / width, (top - high) / total, (cell - gap) / width, high / total
            axis: Any = figure.add_axes(box)
            axis.imshow(frame[:: max(1, frame.shape[0] // 300), :: max(1, frame.shape[1] // 300)], aspect="auto")
            axis.set_axis_off()
        figure.text(
            margin / width,
            (top - high - 0.1) / total,
            "\n".join(text),
            va="top",
            fontsize=8.5,
            linespacing=1.25,
        )
        top -= height
    with writing(Path(path)) as temporary:
        figure.savefig(temporary, dpi=110, format="png")
