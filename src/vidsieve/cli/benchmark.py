"""`vidsieve eval` on a published set of questions, every method in one run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.markup import escape

from vidsieve import registry
from vidsieve.cli.progress import Bar
from vidsieve.cli.shared import (
    check_output,
    command_line,
    err,
    note_few,
    out,
    quiet,
    set_threads,
    stoppable,
    table,
    with_error,
    words,
    write_json,
    write_report,
)
from vidsieve.errors import EvaluationError, RetentionError
from vidsieve.retention import parse_retention

BASELINES = ("random", "uniform", "downsample")
"""Measured in every run, beside the model with all tokens."""


def run_benchmark(
    name: str,
    data: Path,
    names: list[str],
    retentions: list[str],
    *,
    folder: Path,
    share: tuple[int, int],
    model: str | None,
    frames: str | None,
    fps: float | None,
    tokens_per_frame: int | None,
    protocol: str | None,
    answer: str,
    max_new_tokens: int,
    subset: int | None,
    allow_missing: bool,
    indices: bool,
    earliest: bool,
    layout: str | None,
    device: str,
    seed: int,
    threads: int,
    report: Path | None,
    figures: Path | None,
    json: Path | None,
) -> None:
    """Measure every method on a published set of questions, and print, keep and report the table."""
    counts = [_count(word) for word in words(frames or "32")]
    amounts = [parse_retention(word) for word in retentions]
    if not amounts or not counts:
        raise RetentionError("give at least one retention, as 0.25,0.1, and one number of frames")
    check_output(folder / "run.json")
    set_threads(threads)
    from vidsieve.evaluation.measuring import AskSettings, conditions_of, items_of, measured
    from vidsieve.evaluation.methods import check_known, named_methods
    from vidsieve.evaluation.protocols import protocol as protocol_of
    from vidsieve.report.sections import evaluation_sections

    if protocol is not None:
        if frames is not None or tokens_per_frame is not None or fps is not None:
            raise EvaluationError("--protocol says how many frames and tokens there are: leave those options out")
        fixed = protocol_of(protocol)
        counts, tokens_per_frame, model = [fixed.frames], fixed.tokens_per_frame, model or fixed.model
        layout = layout or fixed.layout
    if model is None:
        raise EvaluationError("which model? Give --model, or a paper's --protocol")
    for word in names:
        check_known(word)
    benchmark = registry.benchmarks.get(name)
    items = items_of(
        benchmark,
        data,
        subset=subset,
        seed=seed,
        allow_missing=allow_missing,
        note=lambda text: err.print(f"note: {text}", markup=False, soft_wrap=True),
    )
    quiet()
    listed = [*(base for base in BASELINES if base not in names and "all" not in names), *names]
    methods = named_methods(listed, model, earliest=earliest)
    asking = AskSettings(
        model,
        tuple(counts),
        fps,
        tokens_per_frame,
        layout,
        protocol,
        answer,
        max_new_tokens,
        seed,
        indices,
        earliest,
        device,
    )
    with stoppable(folder), Bar("videos", len({item.video for item in items})) as advance:
        result = measured(
            benchmark,
            items,
            conditions_of(counts, methods, amounts),
            asking,
            folder,
            about={"data": data.name, "subset": subset},
            share=share,
            command=command_line(),
            progress=advance,
        )
    if result is None:
        out.print(f"this share is done; the table is made when the others are, in {folder}")
        return
    print_table(result)
    out.print(f"written: {folder}")
    write_report(report, result["benchmark"], lambda: evaluation_sections(result), result["settings"]["model"], figures)
    write_json(json, result)


def _count(word: str) -> int:
    if not word.isdigit() or int(word) < 1:
        raise EvaluationError(f"--frames is a whole number from 1 on, or several, as 8,16,32; got {word!r}")
    return int(word)


def print_table(result: dict[str, Any]) -> None:
    """Print a benchmark's table: what each condition keeps, its accuracy, and its differences."""
    from vidsieve.report.sections import named

    several = len({row["frames"] for row in result["rows"]}) > 1
    lines = []
    for row in result["rows"]:
        lines.append(
            (
                escape(named(row)),
                *([row["frames"]] if several else []),
                row["retention"],
                *(_number(row[key], "{:.4f}") for key in ("layer_retention", "real_retention")),
                with_error(f"{100 * row['accuracy']:.1f}", 100 * row["stderr"], 1),
                f"{100 * row['figure']:.1f}",
                *(_difference(row[f"vs_{other}"] if other != row["method"] else None) for other in ("random", "full")),
            )
        )
    for row in result["refused"]:
        lines.append((escape(row["method"]), *([row["frames"]] if several else []), row["retention"], *"––––––"))
    columns = (
        "method",
        *(["frames"] if several else []),
        "retention",
        "of layers",
        "left",
        "accuracy % ± s.e.",
        "figure %",
        "− random, 95 %",
        "− all tokens, 95 %",
    )
    size = f"{result['questions']} questions about {result['videos']} videos"
    out.print(table(f"{result['benchmark']}: {size}", columns, lines, right=range(1, len(columns))))
    out.print(f"figure: {result['figure']}", highlight=False)
    note_few(result["videos"])
    for row in result["refused"]:
        out.print(f"{row['method']}: {row['reason']}", markup=False, highlight=False)
    if result["failed"]:
        lost = sum(row["questions"] for row in result["failed"])
        first = result["failed"][0]
        what = "1 question" if lost == 1 else f"{lost} questions"
        out.print(
            f"{what} could not be asked and count as answered wrongly; samples.jsonl names each. First: "
            f"{Path(first['video']).name}: {first['reason']}",
            markup=False,
            highlight=False,
        )


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else form.format(value)


def _difference(found: dict[str, Any] | None) -> str:
    if found is None:
        return "–"
    return with_error(f"{100 * found['diff']:+.1f}", 196 * found["stderr"], 1)
