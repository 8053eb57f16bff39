"""vidsieve plan: time, memory and cost of serving, predicted from a configuration and a datasheet."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.markup import escape

from vidsieve.cli.options import Json, Layout, positive
from vidsieve.cli.output import check_output, out, table, write_json
from vidsieve.cli.shared import quiet
from vidsieve.errors import EvaluationError
from vidsieve.io.texts import percent
from vidsieve.retention import parse_retentions

UNITS = {"flops": ("TFLOPs", 1e12), "bytes": ("MB", 1e6), "s": ("ms", 1e-3)}  # by the last word of a figure's name

LABELS = {"encoder": "encode", "decode": "generate a token", "kv": "KV cache"}


def plan(
    model: Annotated[
        str, typer.Option(help="A size that needs no download (qwen2.5-vl-7b, …), a folder or hub id, or 'testbed'.")
    ] = "qwen2.5-vl-7b",
    gpu: Annotated[
        str, typer.Option(help="H100, H200, A100-80GB, A100-40GB, L40S, L4, A10, RTX4090, or TFLOP/s,GB/s,GB.")
    ] = "H100",
    frames: Annotated[int, typer.Option(help="Frames of a video.", min=1)] = 32,
    size: Annotated[str, typer.Option(help="Height x width of frames, for families that keep it.")] = "360x640",
    retention: Annotated[str, typer.Option(help="Fractions of video tokens kept, comma-separated.")] = "1,0.25,0.1",
    answer_tokens: Annotated[int, typer.Option(help="Tokens of an answer.", min=1)] = 64,
    batch: Annotated[int, typer.Option(help="Requests decoded together.", min=1)] = 8,
    price: Annotated[
        float | None, typer.Option(help="Price of one GPU hour.", show_default=False, callback=positive)
    ] = None,
    layout: Layout = None,
    json: Json = None,
) -> None:
    """Predict tokens, operations, memory, times and cost of serving from a configuration alone, without weights."""
    check_output(json)
    amounts, (height, _, width) = parse_retentions(retention), size.partition("x")
    if not (height.isdigit() and width.isdigit() and int(height) and int(width)):
        raise EvaluationError(f"--size must be height x width in pixels, as 360x640; got {size!r}")
    quiet()
    from vidsieve.serving import plan as serving

    card, pixels = serving.read_gpu(gpu), (int(height), int(width))
    result = serving.plan(
        model, card, amounts, layout=layout, frames=frames, size=pixels, answer_tokens=answer_tokens, batch=batch
    )
    rows = result["rows"]
    if price is not None:
        rows = [row | {"price_of_1000": 1000 * price / row["per_hour"] if row["per_hour"] else None} for row in rows]
    lines = []
    for name in list(rows[0])[1:]:
        part, _, last = name.rpartition("_")
        unit, one = UNITS.get(last, ("", 1))
        values = (_shown(row[name], one) for row in rows)
        label = (part if unit else name).replace("_", " ").replace("llm", "LLM")
        lines.append((f"{LABELS.get(label, label)}, {unit}" if unit else label, *values))
    columns = ("", *(percent(row["retention"]) for row in rows))
    title = f"{escape(model)} on {escape(gpu)}, {frames} frames: predicted"
    out.print(table(title, columns, lines, right=range(1, len(columns))))
    out.print("\n".join(f"- {line}" for line in result["assumptions"]), soft_wrap=True, markup=False)
    write_json(json, result | {"rows": rows})


def _shown(value: float | None, unit: float) -> str:
    """Return a prediction in a unit: counts in full, others to three digits."""
    if value is None:
        return "–"
    return f"{value:,}" if isinstance(value, int) and unit == 1 else f"{float(f'{value / unit:.3g}'):,.6g}"
