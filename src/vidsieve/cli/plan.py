"""vidsieve plan: what serving takes, from a configuration and a datasheet."""

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
        str, typer.Option(help="H100, H200, A100-80GB, A100-40GB, L40S, L4, A10, RTX4090, or cpu: measured now.")
    ] = "H100",
    peak_tflops: Annotated[
        float | None, typer.Option(help="10¹² operations a second in this dtype, dense; of any machine.")
    ] = None,
    bandwidth: Annotated[float | None, typer.Option(help="GB/s of memory; of any machine.")] = None,
    memory: Annotated[float | None, typer.Option(help="GB of memory; of any machine.")] = None,
    efficiency: Annotated[
        float | None,
        typer.Option(help="Share of the peak that is reached.", min=0.01, max=1, show_default="0.5; 1 on cpu"),
    ] = None,
    frames: Annotated[int, typer.Option(help="Frames of a video.", min=1)] = 32,
    size: Annotated[
        str | None, typer.Option(help="Height x width of frames, where the family keeps it.", show_default="360x640")
    ] = None,
    retention: Annotated[str, typer.Option(help="Fractions of video tokens kept, comma-separated.")] = "1,0.25,0.1",
    method: Annotated[
        str | None, typer.Option(help="Count this method's own cost too.", show_default="selecting is free")
    ] = None,
    prompt_tokens: Annotated[int, typer.Option(help="Tokens of text in a prompt, its template included.", min=1)] = 64,
    answer_tokens: Annotated[int, typer.Option(help="Tokens of an answer.", min=1)] = 64,
    dtype: Annotated[str, typer.Option(help="Of weights and caches: bf16, fp16 or fp32.")] = "bf16",
    batch: Annotated[int, typer.Option("--batch", "--concurrency", help="Requests decoded together.", min=1)] = 8,
    videos_per_day: Annotated[float, typer.Option(help="How many machines for these?", min=1, callback=positive)] = 1e6,
    layout: Layout = None,
    json: Json = None,
) -> None:
    """Predict tokens, operations, memory, times and machines from a configuration alone, without weights."""
    check_output(json)
    amounts = parse_retentions(retention)
    quiet()
    from vidsieve.serving.machines import machine_of
    from vidsieve.serving.models import read_model
    from vidsieve.serving.plan import Load, check_method
    from vidsieve.serving.plan import plan as planned

    check_method(method)
    load = Load(frames, _size(size), prompt_tokens, answer_tokens, batch, dtype, method, videos_per_day)
    machine = machine_of(gpu, dtype, peak_tflops=peak_tflops, bandwidth=bandwidth, memory=memory, efficiency=efficiency)
    result = planned(read_model(model, layout), machine, load, amounts)
    print_plan(result)
    write_json(json, result)


def _size(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    height, _, width = text.partition("x")
    if not (height.isdigit() and width.isdigit() and int(height) and int(width)):
        raise EvaluationError(f"--size is height x width in pixels, as 360x640; got {text!r}")
    return int(height), int(width)


def print_plan(result: Mapping[str, Any]) -> None:
    """Print a column for each retention, then what the figures rest on."""
    rows, load = result["rows"], result["load"]
    lines = [
        ("video tokens", *(f"{r['video_tokens']:,}" for r in rows)),
        ("LLM tokens", *(f"{r['llm_tokens']:,}" for r in rows)),
        ("prefill, TFLOPs", *(f"{r['prefill_flops'] / 1e12:,.4g}" for r in rows)),
        ("encoder, TFLOPs", *(f"{r['encoder_flops'] / 1e12:,.4g}" for r in rows)),
        ("weights, GB", *(f"{result['weights_bytes'] / 1e9:.2f}" for _ in rows)),
        ("KV cache of a request, MB", *(f"{r['kv_bytes'] / 1e6:.1f}" for r in rows)),
        ("requests that fit in memory", *(f"{r['concurrent']:,}" for r in rows)),
        ("encoder, ms", *(f"{1e3 * r['encoder_s']:.1f}" for r in rows)),
        ("selecting, ms", *(f"{1e3 * r['select_s']:.2f}" for r in rows)),
        ("prefill, ms", *(f"{1e3 * r['prefill_s']:.1f}" for r in rows)),
        (
            "decode, ms a token",
            *(f"{1e3 * r['decode_s']:.2f} (batch {r['batch']})" if r["concurrent"] else "–" for r in rows),
        ),
        ("one request, s", *(_or(r["latency_s"], ".3f") for r in rows)),
        ("encoder's share of the work", *(f"{100 * r['encoder_s'] / r['busy_s']:.0f} %" for r in rows)),
        ("requests a second", *(_or(r["per_second"], ".2f") for r in rows)),
        (f"machine hours for {load['videos_per_day']:,.0f} videos", *(_or(r["machine_hours"], ",.1f") for r in rows)),
        (f"machines for {load['videos_per_day']:,.0f} videos a day", *(_or(r["machines"], ",") for r in rows)),
    ]
    title = (
        f"{escape(result['model'])} on {escape(result['machine']['name'])}, {load['frames']} frames, {load['dtype']}: "
        "predicted, not measured"
    )
    columns = ("", *(f"{100 * r['retention']:g} %" for r in rows))
    out.print(table(title, columns, lines, right=range(1, len(columns))))
    for r in rows:
        if r["missing_bytes"]:
            out.print(
                f"{100 * r['retention']:g} %: no request fits; its cache takes {r['missing_bytes'] / 1e9:.2f} GB more "
                "than the weights leave"
            )
    for line in result["assumptions"]:
        out.print(f"- {escape(line)}", soft_wrap=True)


def _or(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)
