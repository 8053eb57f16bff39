"""vidsieve plan: what serving takes, predicted from a configuration and a datasheet."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import typer
from rich.markup import escape

from vidsieve.cli.shared import Json, Layout, check_output, out, positive, quiet, table, write_json
from vidsieve.errors import EvaluationError
from vidsieve.retention import parse_retentions


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
    amounts = parse_retentions(retention)
    quiet()
    from vidsieve.serving.plan import Load, read_gpu, read_model
    from vidsieve.serving.plan import plan as predict

    height, _, width = size.partition("x")
    if not (height.isdigit() and width.isdigit() and int(height) and int(width)):
        raise EvaluationError(f"--size must be height x width in pixels, as 360x640; got {size!r}")
    load = Load(frames, (int(height), int(width)), answer_tokens=answer_tokens, batch=batch)
    result = predict(read_model(model, layout), read_gpu(gpu), load, amounts)
    print_plan(result, price)
    write_json(json, result)


def print_plan(result: Mapping[str, Any], price: float | None) -> None:
    """Print a column for each retention, then the assumptions."""
    rows = result["rows"]
    lines = [
        ("video tokens", *(f"{row['video_tokens']:,}" for row in rows)),
        ("LLM tokens", *(f"{row['llm_tokens']:,}" for row in rows)),
        ("prefill, TFLOPs", *(f"{row['prefill_flops'] / 1e12:,.4g}" for row in rows)),
        ("encoder, TFLOPs", *(f"{row['encoder_flops'] / 1e12:,.4g}" for row in rows)),
        ("KV cache of a request, MB", *(f"{row['kv_bytes'] / 1e6:,.1f}" for row in rows)),
        ("requests that fit in memory", *(f"{row['concurrent']:,}" for row in rows)),
        ("encoder, ms", *(f"{1e3 * row['encoder_s']:.1f}" for row in rows)),
        ("prefill, ms", *(f"{1e3 * row['prefill_s']:.1f}" for row in rows)),
        ("decoding, ms a token", *(f"{1e3 * row['decode_s']:.2f} (batch {row['batch']})" for row in rows)),
        ("one request, s", *("–" if row["latency_s"] is None else f"{row['latency_s']:.3f}" for row in rows)),
        ("requests an hour", *(f"{row['per_hour']:,.0f}" for row in rows)),
    ]
    if price is not None:
        costs = (f"{1000 * price / row['per_hour']:,.3f}" if row["per_hour"] else "–" for row in rows)
        lines.append(("price of 1,000 requests", *costs))
    title = (
        f"{escape(result['model'])} on {escape(result['gpu']['name'])}, {result['load']['frames']} frames: predicted"
    )
    columns = ("", *(f"{100 * row['retention']:g} %" for row in rows))
    out.print(table(title, columns, lines, right=range(1, len(columns))))
    for line in result["assumptions"]:
        out.print(f"- {escape(line)}", soft_wrap=True)
