"""Learning curves of training conditions side by side."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vidsieve.report.pictures import new_figure, save

SHOWN = (("right", "rollouts answered rightly"), ("dead_groups", "groups with equal rewards"), ("ratio", "rate kept"))
"""Figures that are drawn, each where a condition logs it, and what they say."""


def curves_picture(path: str | Path, tables: Sequence[dict[str, Any]]) -> None:
    """Write a PNG or SVG: one line of panels a table, one panel a figure, one curve a condition.

    Parameters
    ----------
    tables : sequence of dict
        As `workbench.testbed.ablating.tabulated` makes them; rows without a ``curve`` are left out.

    Raises
    ------
    OutputError
        If the file cannot be written.
    """
    tables = [table for table in tables if any("curve" in row for row in table["rows"])]
    figure = new_figure(figsize=(4.6 * len(SHOWN), 3.6 * max(1, len(tables))), layout="constrained")
    panels = figure.subplots(max(1, len(tables)), len(SHOWN), squeeze=False)
    for line, table in zip(panels, tables, strict=False):
        rows = [row for row in table["rows"] if "curve" in row]
        for panel, (name, text) in zip(line, SHOWN, strict=True):
            for row in rows:
                if name not in row["curve"][0]:
                    continue
                points = [(point["step"] / row["curve"][-1]["step"], point[name]) for point in row["curve"]]
                panel.plot(*zip(*points, strict=True), label=row["label"], linewidth=1.4)
            panel.set_title(f"{table['name']}: {text}", fontsize=9, loc="left")
            panel.set_xlabel("share of the run", fontsize=8)
            panel.tick_params(labelsize=8)
            panel.grid(alpha=0.25)
        line[0].legend(fontsize=7, frameon=False)
    save(figure, path, dpi=130)
