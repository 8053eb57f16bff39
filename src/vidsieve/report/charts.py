"""Charts of a report, as SVG that follows the page's colours."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

from vidsieve.report.pictures import drawable, new_figure

_MARKS = "os^Dv<>Phx*"
COLOURS = ["#1a73e8", "#c2570c", "#2e8b3d", "#9467bd", "#0e8a9a", "#c8429a", "#85860f", "#7d7d7d", "#d93025", "#a0674b"]
"""Of lines, points and bars, the most different first: each 3:1 or more against a light or dark page (WCAG, 1.4.11)."""


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
    order: Sequence[str] = (),
) -> Any:
    """Return a figure of lines of points (x, y, half an interval) by name.

    `level` is a name and a height drawn across, such as all tokens' accuracy; `log` spaces x by ratios. Charts with the
    same `order` have the same colour for a name, and for "NAME, …", which differ in the style of their lines.
    """
    figure = new_figure(figsize=(8.2, 4.6), layout="constrained")
    panel = _panel(figure, x, y)
    places_of = {name: number for number, name in enumerate(order or lines)}
    drawn = [0] * len(places_of)
    for name, points in lines.items():
        number = places_of[name if name in places_of else name.rpartition(", ")[0]]
        drawn[number] += 1
        places, heights, errors = zip(*sorted(points), strict=True)
        if log:  # side by side, so that intervals do not cover each other
            places = tuple(place * 1.012 ** (number - len(places_of) / 2) for place in places)
        panel.errorbar(
            places,
            heights,
            yerr=errors if any(errors) else None,
            label=drawable(name),
            marker=_MARKS[number % len(_MARKS)],
            markersize=4,
            linewidth=1.3,
            capsize=2,
            color=COLOURS[number % len(COLOURS)],
            linestyle=("-", "--", ":")[(drawn[number] - 1 + number // len(COLOURS)) % 3],
        )
    if level is not None:
        panel.axhline(level[1], linestyle="--", linewidth=1, color="#808080", label=drawable(level[0]))
    if log:
        panel.set_xscale("log")
        shown: list[float] = []
        for value in sorted({point[0] for points in lines.values() for point in points}):
            if not shown or value > 1.12 * shown[-1]:  # labels that do not touch
                shown.append(value)
        panel.set_xticks(shown, [f"{value:.3g}" for value in shown])
        panel.minorticks_off()
    if y.endswith("%"):
        low, high = panel.get_ylim()
        panel.set_ylim(max(low, -2), min(high, 102))
    if len(lines) > 1 or level is not None:
        figure.legend(loc="outside right upper", fontsize=8, frameon=False)
    return figure


def cloud(points: Mapping[str, Sequence[tuple[float, float, float]]], *, x: str, y: str) -> Any:
    """Return a figure of single points (x, y, 1 if it is to stand out, else 0), by name."""
    figure = new_figure(figsize=(8.2, 4.2), layout="constrained")
    panel = _panel(figure, x, y)
    for number, (name, series) in enumerate(points.items()):
        places, heights, marked = zip(*series, strict=True)
        panel.scatter(
            places,
            heights,
            s=[9 + 51 * mark for mark in marked],
            alpha=0.7,
            label=drawable(name),
            color=COLOURS[number % len(COLOURS)],
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
        panel.barh(
            range(len(names)),
            lengths,
            left=left,
            label=drawable(part),
            color=COLOURS[number % len(COLOURS)],
            height=0.7,
        )
        left = [a + b for a, b in zip(left, lengths, strict=True)]
    panel.set_yticks(range(len(names)), map(drawable, names))
    panel.invert_yaxis()
    figure.legend(loc="outside right upper", fontsize=8, frameon=False)
    return figure
