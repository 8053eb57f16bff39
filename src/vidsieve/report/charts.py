"""Charts of a report, as SVG that follows the page's colours."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vidsieve.io.files import writing
from vidsieve.report.pictures import drawable, new_figure

_MARKS = "os^Dv<>Phx*"


def svg(figure: Any) -> str:
    """Return a matplotlib figure as an SVG element, the same for the same figure, its black the page's ink."""
    import matplotlib

    file = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "vidsieve"}):
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    text = file.getvalue()
    text = text[text.index("<svg") :].replace("#000000", "currentColor")
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    return re.sub(r'(<text\b(?![^>]*fill:)[^>]*style=")', r"\1fill: currentColor; ", text)


def save(figure: Any, path: str | Path) -> None:
    """Write a figure as PNG, or by the path's ending as SVG or PDF.

    Raises
    ------
    OutputError
        If the file cannot be written.
    """
    path = Path(path)
    with writing(path) as temporary:
        figure.savefig(temporary, dpi=140, format=path.suffix.lstrip(".") or "png")


def _panel(figure: Any, x: str, y: str) -> Any:
    panel = figure.subplots()
    panel.set_xlabel(x)
    panel.set_ylabel(y)
    panel.grid(alpha=0.25)
    for side in ("top", "right"):
        panel.spines[side].set_visible(False)
    return panel


def against(
    lines: Mapping[str, Sequence[tuple[float, float, float]]],
    *,
    x: str,
    y: str,
    level: tuple[str, float] | None = None,
    log: bool = False,
) -> Any:
    """Return a figure of lines of points (x, y, half an interval) by name.

    `level` is a name and a height drawn across, such as all tokens' accuracy; `log` spaces x by ratios.
    """
    figure = new_figure(figsize=(8.2, 4.6), layout="constrained")
    panel = _panel(figure, x, y)
    for number, (name, points) in enumerate(lines.items()):
        places, heights, errors = zip(*sorted(points), strict=True)
        panel.errorbar(
            places,
            heights,
            yerr=errors if any(errors) else None,
            label=drawable(name),
            marker=_MARKS[number % len(_MARKS)],
            markersize=4,
            linewidth=1.3,
            capsize=2,
            color=f"C{number % 10}",
            linestyle=("-", "--", ":")[number // 10 % 3],
        )
    if level is not None:
        panel.axhline(level[1], linestyle="--", linewidth=1, color="#808080")
        panel.annotate(
            drawable(level[0]), (1, level[1]), xycoords=("axes fraction", "data"), ha="right", va="bottom", fontsize=8
        )
    if log:
        panel.set_xscale("log")
        shown: list[float] = []
        for value in sorted({point[0] for points in lines.values() for point in points}):
            if not shown or value > 1.12 * shown[-1]:  # labels that do not touch
                shown.append(value)
        panel.set_xticks(shown, [f"{value:.3g}" for value in shown])
        panel.minorticks_off()
    if len(lines) > 1:
        figure.legend(loc="outside right upper", fontsize=8, frameon=False)
    return figure


def cloud(points: Mapping[str, Sequence[tuple[float, float, float]]], *, x: str, y: str) -> Any:
    """Return a figure of single points (x, y, ignored), by name."""
    figure = new_figure(figsize=(8.2, 4.2), layout="constrained")
    panel = _panel(figure, x, y)
    for number, (name, series) in enumerate(points.items()):
        places, heights, _ = zip(*series, strict=True)
        panel.scatter(
            places,
            heights,
            s=9,
            alpha=0.55,
            label=drawable(name),
            color=f"C{number}",
            marker=_MARKS[number % len(_MARKS)],
            linewidths=0,
        )
    panel.axhline(0, linewidth=1, color="#808080")
    figure.legend(loc="outside right upper", fontsize=8, frameon=False)
    return figure


def stacks(rows: Mapping[str, Mapping[str, float]], *, x: str) -> Any:
    """Return a figure of horizontal bars by name, each made of named parts."""
    figure = new_figure(figsize=(8.2, 0.9 + 0.36 * len(rows)), layout="constrained")
    panel = _panel(figure, x, "")
    parts = list(dict.fromkeys(part for row in rows.values() for part in row))
    names, left = list(rows), [0.0] * len(rows)
    for number, part in enumerate(parts):
        lengths = [rows[name].get(part, 0.0) for name in names]
        panel.barh(range(len(names)), lengths, left=left, label=drawable(part), color=f"C{number}", height=0.7)
        left = [a + b for a, b in zip(left, lengths, strict=True)]
    panel.set_yticks(range(len(names)), map(drawable, names))
    panel.invert_yaxis()
    figure.legend(loc="outside right upper", fontsize=8, frameon=False)
    return figure
