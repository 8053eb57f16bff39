"""What the commands' reports are made of."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vidsieve.errors import OutputError
from vidsieve.evaluation.contributions import Contributions, rank_correlation, ranks
from vidsieve.evaluation.stats import FEW
from vidsieve.report import charts
from vidsieve.report.page import FramesOf, Kept, Section, TableOf
from vidsieve.report.pictures import kept_figure
from vidsieve.types import TokenGrid
from vidsieve.video.reading import Video

Row = Mapping[str, Any]


def named(row: Row) -> str:
    """Return how a table calls a condition: method, variant, part and policy."""
    name = row["method"] if row["variant"] in ("ours", "-") else f"{row['method']}:{row['variant']}"
    name += f" ({row['part']})" if row.get("part") else ""
    return name + (f" ({row['policy']})" if row.get("policy") else "")


# -- one video ----------------------------------------------------------------------------------------------


def frames_section(video: Video, grid: TokenGrid, methods: Sequence[Kept], title: str = "Kept tokens") -> Section:
    """Return the frames of a video with what methods keep of them."""
    return Section(title, frames=FramesOf.of(video.pixels, video.timestamps.tolist(), grid, methods))


def masks_section(video: Video, grid: TokenGrid, kept: Mapping[str, Sequence[int]]) -> Section:
    """Return rows of frames, one a method, with what it keeps lit: all of them at one glance."""
    said = "Rows of frames, one a method, with dropped tokens dark; the viewer above has the same, frame by frame."
    return Section("Masks, row by row", figure=kept_figure(video.pixels, grid, kept), said=said)


def contributions_sections(
    video: Video, measured: Contributions, answer: str, method: str, kept: int, scores: NDArray[np.floating[Any]] | None
) -> list[Section]:
    """Return what every token contributes to the answer, beside attention and a method's scores (CaCoVID, Figure 1)."""
    rivals = {"attention of the last token": measured.attention} | ({method: scores} if scores is not None else {})
    shown = {"contribution, measured": measured.contribution, **rivals}
    ways = [Kept(name, np.argsort(-np.asarray(v), kind="stable")[:kept].tolist(), v) for name, v in shown.items()]
    sure, total = measured.sure, len(measured.contribution)
    lines = [
        (
            name,
            f"{rank_correlation(v, measured.contribution):+.3f}",
            f"{100 * ranks(v)[sure].mean() / total:.0f} %" if sure.any() else "–",
        )
        for name, v in rivals.items()
    ]
    text = (
        f"Log-odds of “{answer}” with a token less without it, over {measured.subsets} random subsets of "
        f"{100 * measured.share:g} % of the tokens. {int(sure.sum())} of {total} tokens surely contribute (3.5 "
        "standard errors above 0); a score that finds them ranks them near 100 %. In the viewer: the "
        f"{kept} highest of each."
    )
    columns = ("", "rank correlation with contribution", "mean rank of those that surely contribute")
    points = {
        name: [(float(r), float(c), 0.0) for r, c in zip(100 * ranks(v) / len(v), measured.contribution, strict=True)]
        for name, v in rivals.items()
    }
    figure = charts.cloud(points, x="rank of the score, %", y="measured contribution")
    said = "Points, one a token: what it contributes, against its rank by attention and by the method."
    return [
        Section("Attention against contribution", text, TableOf(columns, lines), figure, said),
        frames_section(video, measured.grid, ways, "Contribution, attention and scores, token by token"),
    ]


def answer_sections(
    video: Video,
    question: str,
    said: Row,
    scores: NDArray[np.floating[Any]] | None,
    parts: Sequence[str],
    measured: Contributions | None = None,
) -> list[Section]:
    """Return the report of one answer, as `Answer.as_dict` has it, with the method's scores where it has them.

    With `measured`, what tokens contribute is beside what the LLM's attention says of them.
    """
    rows = [("question", question), ("answer", said["answer"]), ("method", said["method"])]
    rows += [("prompt", f"{said['prompt_tokens_before']} → {said['prompt_tokens_after']} tokens")]
    found = [Section("The answer", table=TableOf(("", ""), rows, frozenset({1})))]
    for trace in said["videos"][:1]:
        grid = TokenGrid(*trace["grid"])
        found.append(frames_section(video, grid, [Kept(said["method"], trace["indices"], scores)]))
        found.append(masks_section(video, grid, {said["method"]: trace["indices"]}))
    if measured is not None:
        kept = said["videos"][0]["kept"] if said["videos"] else max(1, measured.grid.num_tokens // 10)
        found += contributions_sections(video, measured, said["answer"], said["method"], kept, scores)
    found.append(time_section({said["method"]: {part: said["ms"].get(part, 0.0) for part in parts}}))
    return found


def time_section(rows: Mapping[str, Mapping[str, float]], title: str = "Where the time goes") -> Section:
    """Return milliseconds of every part of the work, by name."""
    columns = ["", *next(iter(rows.values())), "sum"]
    lines = [(name, *(f"{ms:.1f}" for ms in row.values()), f"{sum(row.values()):.1f}") for name, row in rows.items()]
    chart = charts.stacks(rows, x="ms")
    return Section(
        title,
        "Milliseconds. Select: choosing tokens, and making the shorter prompt of them.",
        TableOf(columns, lines),
        chart,
        "Bars of the milliseconds in the table above.",
    )


def comparison_sections(video: Video, result: Row) -> list[Section]:
    """Return the report of a comparison, as `evaluation.comparing.compare` returns it."""
    columns = ("method", "of layers", "left", "answer", "as all tokens", "choosing ms", "total ms")
    lines = [
        (
            row["name"],
            f"{row['layer_retention']:.3f}",
            f"{row['real_retention']:.3f}",
            row["answer"],
            "yes" if row["same"] else "no",
            f"{row['select_ms']['median']:.1f}",
            f"{row['ms']['total']['median']:.1f}",
        )
        for row in result["rows"]
    ]
    lines += [(row["name"], "–", "–", row["reason"], "–", "–", "–") for row in result["refused"]]
    found = [Section("Answers", f"Asked: {result['question']}", TableOf(columns, lines, frozenset({3})))]
    kept = [Kept(row["name"], row["indices"], row["scores"]) for row in result["rows"] if row["indices"] is not None]
    if kept:
        grid = TokenGrid(*result["grid"])
        found += [frames_section(video, grid, kept), masks_section(video, grid, {k.name: k.indices for k in kept})]
    parts = {
        row["name"]: {part: row["ms"][part]["median"] for part in row["ms"] if part != "total"}
        for row in result["rows"]
    }
    return [*found, time_section(parts)]


def pipeline_sections(result: Row) -> list[Section]:
    """Return the report of a timed pipeline, as `eval.stopwatch.measure` returns it."""
    rows = {f"{named(row)}, {row['retention']}": row for row in result["rows"]}
    times = {name: {p: v["mean"] for p, v in row["ms"].items() if p != "all"} for name, row in rows.items()}
    full = result["rows"][0]
    lines = [
        (
            name,
            f"{row['visual'][1]:.0f}",
            f"{row['prompt'][1]:.0f}",
            f"{row['flops']['paper'] / 1e12:.4g}",
            f"{row['flops']['counted'] / 1e12:.4g}",
            f"{full['flops']['counted'] / row['flops']['counted']:.2f}×",
            f"{row['times_faster']['prefill']:.2f}×",
            f"{row['times_faster']['all']:.2f}×",
            f"{row['ms']['all']['p50']:.0f}",
            f"{row['ms']['all']['p95']:.0f}",
            f"{row['peak_MiB']:.0f}",
            "–" if row is full else row["pays_from"] or "no length",
        )
        for name, row in rows.items()
    ]
    columns = (
        "",
        "video tokens",
        "prompt",
        "TFLOP, papers' formula",
        "TFLOP, counted",
        "fewer",
        "LLM faster, with selecting",
        "all faster",
        "p50 ms",
        "p95 ms",
        "peak MiB",
        "pays from (frames)",
    )
    text = (
        f"{result['model']} on {result['device']}, {result['dtype']}, attention {result['attention']}; "
        f"{', '.join(map(str, result['lengths']))} frames, {result['repeats']} rounds, {result['new_tokens']} new "
        "tokens."
    )
    found = [time_section(times, "Where the time goes"), Section("What it saves", text, TableOf(columns, lines))]
    notes = [(named(row), row["retention"], row["reason"]) for row in result["refused"]]
    if notes:
        found.append(Section("Not possible", table=TableOf(("method", "kept", "why"), notes, frozenset({2}))))
    return found


# -- many questions -----------------------------------------------------------------------------------------


def evaluation_sections(result: Row) -> list[Section]:
    """Return the report of an evaluation: of a benchmark, or of the testbed."""
    rows = [_known(row) for row in result["rows"]]
    several = len({row["frames"] for row in rows}) > 1
    columns = ["method", *(["frames"] if several else []), "retention", "of layers", "left", "accuracy %", "± s.e."]
    columns += ["− random", "− all tokens"]
    lines = []
    for row in rows:
        lines.append(
            [
                named(row),
                *([row["frames"]] if several else []),
                row["retention"],
                *(as_figure(row[key], 1, 4) for key in ("layer_retention", "real_retention")),
                as_figure(row["accuracy"], 100, 1),
                as_figure(row["stderr"], 100, 1),
                *(as_difference(row[f"vs_{name}"] if row["method"] != name else None) for name in ("random", "full")),
            ]
        )
    for row in result["refused"]:
        lines.append([named(row), *([row["frames"]] if several else []), row["retention"], *"––––––"])
    found = [Section("Accuracy", _about(result), TableOf(columns, lines))]
    found += _curves(rows)
    found += _categories(rows)
    notes = [(named(row), str(row["retention"]), row["reason"]) for row in result["refused"]]
    if notes:
        found.append(Section("Not possible", table=TableOf(("method", "retention", "why"), notes, frozenset({2}))))
    lost = [(row["video"], row["questions"], row["reason"]) for row in result.get("failed", [])]
    if lost:
        text = "They count as answered wrongly."
        table = TableOf(("video", "questions", "why"), lost, frozenset({2}))
        found.append(Section("Questions that could not be asked", text, table))
    return found


def _known(row: Row) -> dict[str, Any]:
    """Return a row of either kind of evaluation with the fields of both."""
    by = row.get("by") or {"kind": {k: {"accuracy": v, "stderr": math.nan} for k, v in row.get("by_kind", {}).items()}}
    return {
        "frames": None,
        **row,
        "by": by,
        "retention": f"{float(row['retention']):g}" if not str(row["retention"]).endswith("t") else row["retention"],
    }


def _about(result: Row) -> str:
    if "benchmark" in result:
        asked = f"{result['benchmark']}: {result['questions']} questions about {result['videos']} videos"
    else:
        asked = f"Testbed, world {result['world']}: {result['n_questions']} questions on {result['n_scenes']} scenes"
    videos = result["videos"] if "benchmark" in result else result["n_scenes"]
    few = f" {videos} videos are too few for these errors: from {FEW} on they hold." if videos < FEW else ""
    return f"{asked}. Errors are clustered by video; differences are paired, with 95 % intervals.{few}"


def as_figure(value: float | None, times: float, digits: int) -> str:
    """Return a number as tables have it; a dash for none."""
    return "–" if value is None or not math.isfinite(value) else f"{times * value:.{digits}f}"


def as_difference(found: Row | None) -> str:
    """Return a paired difference in points with its 95 % interval."""
    if found is None:
        return "–"
    return f"{100 * found['diff']:+.1f} ± {as_figure(found['stderr'], 196, 1)}"


def _interval(error: float | None) -> float:
    return 196 * error if error is not None and math.isfinite(error) else 0.0


def _curves(rows: Sequence[dict[str, Any]]) -> list[Section]:
    """Return accuracy against retention, and against frames, where there are several."""
    found = []
    full = [row for row in rows if row["method"] == "full"]
    for frames in dict.fromkeys(row["frames"] for row in rows):
        lines: dict[str, list[tuple[float, float, float]]] = {}
        for row in rows:
            if row["frames"] == frames and row["method"] != "full" and row["real_retention"] is not None:
                point = (100 * row["layer_retention"], 100 * row["accuracy"], _interval(row["stderr"]))
                lines.setdefault(named(row), []).append(point)
        if not any(len(points) > 1 for points in lines.values()):
            continue
        level = next((("all tokens", 100 * row["accuracy"]) for row in full if row["frames"] == frames), None)
        chart = charts.against(
            lines, x="% of the tokens that layers see on average", y="accuracy %", level=level, log=True
        )
        where = f", {frames} frames" if frames is not None else ""
        found.append(_chart(f"Accuracy against retention{where}", chart, "95 % intervals."))
    if len({row["frames"] for row in rows}) > 1:
        lines = {}
        for row in rows:
            name = named(row) + ("" if row["method"] == "full" else f", {row['retention']}")
            lines.setdefault(name, []).append((row["frames"], 100 * row["accuracy"], _interval(row["stderr"])))
        chart = charts.against(lines, x="frames", y="accuracy %", log=True)
        found.append(_chart("Accuracy against frames", chart, "95 % intervals; a retention ending in t is a count."))
    return found


def _chart(title: str, figure: Any, text: str) -> Section:
    return Section(title, text, figure=figure, said=f"{title}: the figures are in the table of accuracies.")


def _categories(rows: Sequence[dict[str, Any]]) -> list[Section]:
    found = []
    for name in dict.fromkeys(name for row in rows for name in row["by"]):
        values = list(dict.fromkeys(value for row in rows for value in row["by"].get(name, {})))
        if len(values) < 2:
            continue
        lines = [
            (
                f"{named(row)}, {row['retention']}" + (f", {row['frames']} frames" if row["frames"] else ""),
                *(_cell(row["by"].get(name, {}).get(value)) for value in values),
            )
            for row in rows
        ]
        errors = any("±" in cell for line in lines for cell in line[1:])
        text = "In %, ± standard error." if errors else "In %."
        found.append(Section(f"Accuracy by {name}", text, TableOf(("", *values), lines)))
    return found


def _cell(found: Row | None) -> str:
    if found is None:
        return "–"
    error = as_figure(found["stderr"], 100, 1)
    return f"{100 * found['accuracy']:.1f}" + ("" if error == "–" else f" ± {error}")


# -- training -----------------------------------------------------------------------------------------------

CURVES = (
    ("reward", "mean reward"),
    ("right", "rollouts answered rightly"),
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
        rows = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise OutputError(f"no report: {metrics} cannot be read ({error})") from None
    found = []
    for name, text in CURVES:
        points = [(float(row["step"]), float(row[name]), 0.0) for row in rows if isinstance(row.get(name), int | float)]
        if points:
            chart = charts.against({text: points}, x="step", y=text)
            said = f"{text} over {len(points)} measurements, from {points[0][1]:.3g} to {points[-1][1]:.3g}"
            found.append(Section(text.capitalize(), figure=chart, said=said))
    last = [(name, f"{value:.4g}" if isinstance(value, float) else value) for name, value in rows[-1].items()]
    return [Section("The last step", table=TableOf(("", ""), last)), *found]
