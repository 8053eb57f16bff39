"""One self-contained HTML file: tables, charts and frames with their kept tokens lit."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vidsieve.evaluation.table import Table
from vidsieve.io.files import writing
from vidsieve.io.texts import printable
from vidsieve.report.charts import svg
from vidsieve.types import TokenGrid

_SIDE = 360  # pixels: no frame of a report is larger


@dataclass(frozen=True)
class Kept:
    """Tokens that one method keeps of a video.

    Parameters
    ----------
    name : str
    indices : raster indices of kept tokens
    scores : (N,) floating, or None
        Higher = keep; shown by their ranks.
    """

    name: str
    indices: Sequence[int]
    scores: NDArray[np.floating[Any]] | None = None


@dataclass(frozen=True)
class FramesOf:
    """Frames of a video, and what methods keep of them, as the page's script reads it."""

    data: str
    names: tuple[str, ...]
    second: int
    images: tuple[dict[str, str], ...]
    numbers: tuple[int, ...]
    counts: tuple[tuple[str, tuple[int, ...]], ...]

    @classmethod
    def of(
        cls, pixels: NDArray[np.uint8], timestamps: Sequence[float], grid: TokenGrid, methods: Sequence[Kept]
    ) -> FramesOf:
        """Return frames (T', H, W, 3) uint8 with what one or more methods keep; T' is T or a multiple of it."""
        shown = [
            {"name": one.name, "kept": [int(i) for i in one.indices], "scores": _ranks(one.scores)} for one in methods
        ]
        data = {"grid": [grid.frames, grid.height, grid.width], "methods": shown}
        counts = tuple(
            (
                one.name,
                tuple(np.bincount(np.asarray(one.indices, int) // grid.per_frame, minlength=grid.frames).tolist()),
            )
            for one in methods
        )
        images = tuple(
            {"source": _jpeg(frame), "alt": f"frame {number}, {moment:.1f} s"}
            for number, (frame, moment) in enumerate(zip(pixels, timestamps, strict=True))
        )
        names = tuple(one.name for one in methods)
        return cls(script_json(data), names, min(1, len(names) - 1), images, tuple(range(grid.frames)), counts)


@dataclass(frozen=True)
class Section:
    """A part of a page: a title, and any of a text, a table, a matplotlib figure and frames.

    `alt` says in words what the figure shows.
    """

    title: str
    text: str = ""
    table: Table | None = None
    figure: Any = None
    alt: str = ""
    frames: FramesOf | None = None


def script_json(value: Any) -> str:
    """Return a value as JSON that may stand in a script element, whatever texts it holds."""
    text = json.dumps(value, separators=(",", ":"), ensure_ascii=True)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _ranks(scores: NDArray[np.floating[Any]] | None) -> list[int] | None:
    """Return scores by rank, 0 to 255: a few large ones would leave the others dark."""
    if scores is None:
        return None
    order = np.asarray(scores, np.float64).argsort(kind="stable").argsort(kind="stable")
    return [int(rank) for rank in np.rint(255 * order / max(1, len(order) - 1))]


def _jpeg(frame: NDArray[np.uint8]) -> str:
    """Return a frame as a data URI."""
    image = Image.fromarray(frame)
    image.thumbnail((_SIDE, _SIDE))
    if max(image.size) < _SIDE // 2:  # small ones are shown large, their pixels sharp
        times = _SIDE // 2 // max(image.size) + 1
        image = image.resize((image.width * times, image.height * times), Image.Resampling.NEAREST)
    file = io.BytesIO()
    image.save(file, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()


def page(
    title: str,
    sections: Sequence[Section],
    *,
    lead: str = "",
    command: str = "",
    about: Mapping[str, str] | None = None,
) -> str:
    """Return the HTML of a report; every text is escaped and printable.

    Parameters
    ----------
    lead : what stands below the title
    command : command line of the run
    about : versions and the like, at the end
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(loader=PackageLoader("vidsieve.report", ""), autoescape=True, undefined=StrictUndefined)
    ready = [
        {
            "title": part.title,
            "text": part.text,
            "table": Markup("" if part.table is None else part.table.to_html()),
            "alt": part.alt,
            "chart": Markup("" if part.figure is None else svg(part.figure)),
            "frames": part.frames and {**vars(part.frames), "data": Markup(part.frames.data)},
        }
        for part in sections
    ]
    text: str = environment.get_template("page.html.j2").render(
        title=title,
        lead=lead,
        sections=ready,
        command=command,
        about=dict(about or {}),
        viewer=any(part.frames for part in sections),
    )
    return printable(text)


def write_page(path: str | Path, title: str, sections: Sequence[Section], **options: Any) -> None:
    """Write a report, as `page` makes it.

    Raises
    ------
    OutputError
        If the file cannot be written.
    """
    text = page(title, sections, **options)
    with writing(Path(path)) as temporary:
        temporary.write_text(text, encoding="utf-8")
