"""Sections of the commands' pages: their tables, with charts and frames."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vidsieve.errors import OutputError, TrainingError
from vidsieve.evaluation.contributions import Contributions
from vidsieve.evaluation.table import Table, named
from vidsieve.report import charts
from vidsieve.report.page import FramesOf, Kept, Section
from vidsieve.report.pictures import kept_figure
from vidsieve.training.heldout import rank_correlation, ranks
from vidsieve.training.run_folder import read_metrics
from vidsieve.types import TokenGrid
from vidsieve.video.reading import Video

Row = Mapping[str, Any]


def table_section(table: Table) -> Section:
    """Return the section of a table, with its notes."""
    return Section(table.title, "\n".join(table.notes), table)


def result_sections(table: Table) -> list[Section]:
    """Return the sections of an experiment, on a page with its table's title: table, charts, and further tables."""
    rows = table.result["rows"]
    if "accuracy" in rows[0]:
        drawn = accuracy_charts(rows)
    else:
        drawn = [time_section(part_times(rows))] if "ms" in rows[0] else []
    first = replace(table_section(table), title="Accuracy" if "accuracy" in rows[0] else "Times")
    return [first, *drawn, *map(table_section, table.more)]


# -- one video --------------------------------------------------------------------------------------------------------


def video_sections(video: Video, grid: TokenGrid, methods: Sequence[Kept], title: str = "Kept tokens") -> list[Section]:
    """Return the frames of a video with what methods keep of them: in the viewer, and as rows of frames."""
    alt = "Rows of frames, one a method, with dropped tokens dark; the viewer above has the same, frame by frame."
    rows = kept_figure(video.pixels, grid, {method.name: method.indices for method in methods})
    return [frames_section(video, grid, methods, title), Section("Masks, row by row", figure=rows, alt=alt)]


def frames_section(video: Video, grid: TokenGrid, methods: Sequence[Kept], title: str) -> Section:
    """Return the frames of a video in the viewer, with what methods keep of them."""
    return Section(title, frames=FramesOf.of(video.pixels, video.timestamps.tolist(), grid, methods))


def contributions_sections(
    video: Video, measured: Contributions, answer: str, method: str, kept: int, scores: NDArray[np.floating[Any]] | None
) -> list[Section]:
    """Return the contribution of every token to the answer, attention and a method's scores (CaCoVID, Figure 1)."""
    rivals = {"attention of the last token": measured.attention} | ({method: scores} if scores is not None else {})
    shown = {"contribution, measured": measured.contribution, **rivals}
    ways = [Kept(name, np.argsort(-np.asarray(v), kind="stable")[:kept].tolist(), v) for name, v in shown.items()]
    sure, total, contribution = measured.sure, len(measured.contribution), torch.as_tensor(measured.contribution)
    tensors = {name: torch.as_tensor(v) for name, v in rivals.items()}
    lines = [
        (
            name,
            f"{rank_correlation(v, contribution):+.3f}",
            f"{100 * ranks(v).numpy()[sure].mean() / total:.0f} %" if sure.any() else "–",
        )
        for name, v in tensors.items()
    ]
    text = (
        f"Log-odds of “{answer}” with the token minus without it, over {measured.subsets} random subsets of "
        f"{100 * measured.share:g} % of the tokens. {int(sure.sum())} of {total} tokens contribute significantly (3.5 "
        "standard errors above 0, large in the chart); a score that finds them ranks them near 100 %. In the viewer: "
        f"the {kept} highest of each."
    )
    columns = ("", "rank correlation with contribution", "mean rank of those that contribute significantly")
    points = {
        name: [
            (float(r), float(c), float(mark))
            for r, c, mark in zip(100 * ranks(v) / len(v), measured.contribution, sure, strict=True)
        ]
        for name, v in tensors.items()
    }
    figure = charts.cloud(points, x="rank of the score, %", y="measured contribution")
    alt = "Points, one a token: what it contributes, against its rank by attention and by the method."
    return [
        Section("Attention against contribution", text, Table("", columns, lines), figure, alt),
        frames_section(video, measured.grid, ways, "Contribution, attention and scores, token by token"),
    ]


def answer_sections(
    video: Video,
    question: str,
    answer: Row,
    scores: NDArray[np.floating[Any]] | None,
    parts: Sequence[str],
    measured: Contributions | None = None,
) -> list[Section]:
    """Return the report of one answer, as `Answer.as_dict` has it, with the method's scores where it has them.

    With `measured`, what tokens contribute is beside what the LLM's attention says of them.
    """
    rows = [("question", question), ("answer", answer["answer"]), ("method", answer["method"])]
    rows += [("prompt", f"{answer['prompt_tokens_before']} → {answer['prompt_tokens_after']} tokens")]
    sections = [Section("The answer", table=Table("", ("", ""), rows, frozenset({0, 1})))]
    for trace in answer["videos"][:1]:
        grid = TokenGrid(*trace["grid"])
        sections += video_sections(video, grid, [Kept(answer["method"], trace["indices"], scores)])
    if measured is not None:
        kept = answer["videos"][0]["kept"] if answer["videos"] else max(1, measured.grid.num_tokens // 10)
        sections += contributions_sections(video, measured, answer["answer"], answer["method"], kept, scores)
    return [*sections, time_section({answer["method"]: {part: answer["ms"].get(part, 0.0) for part in parts}})]


def time_section(rows: Mapping[str, Mapping[str, float]], title: str = "Where the time goes") -> Section:
    """Return milliseconds of every part of the work, by name."""
    columns = ["", *next(iter(rows.values())), "total"]
    lines = [(name, *(f"{ms:.1f}" for ms in row.values()), f"{sum(row.values()):.1f}") for name, row in rows.items()]
    chart = charts.stacks(rows, x="ms")
    return Section(
        title,
        "Milliseconds. Select: selection, and making the shorter prompt. Generate: after the first token.",
        Table("", columns, lines),
        chart,
        "Bars of the milliseconds in the table above.",
    )


def comparison_sections(video: Video, question: str, table: Table, scores: Mapping[str, Tensor]) -> list[Section]:
    """Return the page of a comparison: its table, and the frames with what methods keep of them.

    Parameters
    ----------
    scores : mapping
        By method and retention the scores (N,) of tokens, where methods have them.
    """
    result = table.result
    kept = [
        Kept(row["name"], row["indices"], scores[row["key"]].numpy() if row["key"] in scores else None)
        for row in result["rows"]
        if row["indices"] is not None
    ]
    first, *rest = result_sections(table)
    first = replace(first, title="Answers", text=f"Asked: {question}\n{first.text}")
    frames = video_sections(video, TokenGrid(*result["grid"]), kept) if kept else []
    return [first, *frames, *rest]


def part_times(rows: Sequence[Row]) -> dict[str, dict[str, float]]:
    """Return by name the milliseconds of every part of the work, from the rows of a timing or a comparison."""
    names = [row.get("name") or f"{named(row)}, {row['retention']}" for row in rows]
    spent = [{part: ms["mean"] for part, ms in row["ms"].items() if part != "total"} for row in rows]
    return dict(zip(names, spent, strict=True))


# -- many questions ---------------------------------------------------------------------------------------------------


def accuracy_charts(rows: Sequence[Row]) -> list[Section]:
    """Return charts of accuracy against retention and against frames, where there are several of these."""
    sections = []
    rows = [{"frames": None, **row} for row in rows]
    order = list(dict.fromkeys(map(named, rows)))
    for frames in dict.fromkeys(row["frames"] for row in rows):
        some = [row for row in rows if row["frames"] == frames]
        lines: dict[str, list[tuple[float, float, float]]] = {}
        for row in some:
            if row["method"] != "full" and row["real_retention"] is not None:
                point = (100 * row["layer_retention"], 100 * row["accuracy"], _interval(row["stderr"]))
                lines.setdefault(named(row), []).append(point)
        if not any(len(points) > 1 for points in lines.values()):
            continue
        level = next((("all tokens", 100 * row["accuracy"]) for row in some if row["method"] == "full"), None)
        figure = charts.against(
            lines,
            x="% of the tokens that layers see on average",
            y="accuracy %",
            level=level,
            log=True,
            order=order,
        )
        where = f", {frames} frames" if frames is not None else ""
        sections.append(_chart(f"Accuracy against retention{where}", figure, "95 % intervals."))
    if len({row["frames"] for row in rows}) > 1:
        lines = {}
        for row in rows:
            name = named(row) + ("" if row["method"] == "full" else f", {row['retention']}")
            lines.setdefault(name, []).append((row["frames"], 100 * row["accuracy"], _interval(row["stderr"])))
        figure = charts.against(lines, x="frames", y="accuracy %", log=True, order=order)
        text = "95 % intervals; a retention ending in t is a count."
        sections.append(_chart("Accuracy against frames", figure, text))
    return sections


def _interval(error: float | None) -> float:
    return 196 * error if error is not None and math.isfinite(error) else 0.0


def _chart(title: str, figure: Any, text: str) -> Section:
    return Section(title, text, figure=figure, alt=f"{title}: the figures are in the table of accuracies.")


# -- training ---------------------------------------------------------------------------------------------------------

CURVES = (
    ("reward", "mean reward"),
    ("right", "rollouts with the correct answer"),
    ("ce", "cross-entropy"),
    ("dead_groups", "groups with equal rewards"),
    ("kept", "share kept"),
    ("entropy", "entropy, bits"),
    ("ratio", "rate"),
    ("loss", "loss"),
    ("eval_accuracy", "held-out accuracy"),
    ("eval_ce_excess", "held-out cross-entropy above all tokens'"),
)


def training_sections(metrics: Path) -> list[Section]:
    """Return the report of a training run from its ``metrics.jsonl``.

    Raises
    ------
    OutputError
        If there is none.
    """
    try:
        rows = read_metrics(metrics.parent)
    except TrainingError as error:
        raise OutputError(f"no report: {error}") from None
    if not rows:
        raise OutputError(f"no report: {metrics} holds no step yet")
    sections = []
    for name, text in CURVES:
        points = [(float(row["step"]), float(row[name]), 0.0) for row in rows if isinstance(row.get(name), int | float)]
        if points:
            chart = charts.against({text: points}, x="step", y=text)
            alt = f"{text} over {len(points)} measurements, from {points[0][1]:.3g} to {points[-1][1]:.3g}"
            sections.append(Section(text.capitalize(), figure=chart, alt=alt))
    last = [(name, f"{value:.4g}" if isinstance(value, float) else value) for name, value in rows[-1].items()]
    return [Section("The last step", table=Table("", ("", ""), last)), *sections]
