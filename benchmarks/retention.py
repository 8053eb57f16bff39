"""Nominal against real retention, method by method: the JSON and docs/retention.md.

Real videos of the testbed, of 16×6×6 tokens, and random ones of 32×196 tokens under a random LLaVA-OneVision of 28
layers, as deep as the 7B model.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import vidsieve
from vidsieve import registry
from vidsieve.cli.shared import quiet
from vidsieve.compressors.base import Compressor
from vidsieve.errors import VidsieveError
from vidsieve.io.files import writing
from vidsieve.io.machine import machine, write_result
from vidsieve.loading import load_model
from vidsieve.testbed.model import chat_inputs
from vidsieve.testbed.questions import make_questions
from vidsieve.testbed.world import make_cast, render
from vidsieve.testing.tiny_models import END, FAMILIES, START, USER, VIDEO

RETENTIONS = (0.25, 0.1)
DEPTH = 28
"""Layers of the 7B models that the methods were published on."""
SCENES = 8
STEPS = 3
"""Tokens generated, so that methods that act while decoding do."""

INTRODUCTION = """\
# What a retention ratio means, method by method

Written by `python benchmarks/retention.py`; every figure is in `benchmarks/results/retention.json`.

**kept at the end**: the fraction of video tokens kept after the last stage. **mean over layers**: the mean fraction of
tokens that a layer sees; compute is proportional to it, and variant `ours` keeps it at or below the retention.
**tokens**: tokens kept after the last stage, plus newlines that no budget counts; for methods that act while decoding,
also the share of these tokens that layers read. `official` keeps what the release's arithmetic keeps. –: the method
cannot keep so few tokens here; the reason is below the table. Methods with a policy keep exactly ⌊R·N⌋ tokens. Which
family runs which method is in [families.md](families.md).
"""


def conditions() -> Iterator[tuple[str, Compressor]]:
    """Yield every method without training in every variant, its parts apart, and moved to earlier layers."""
    for name in registry.compressors:
        kind = registry.compressors.get(name)
        if kind.trained:
            continue
        for variant in kind.variants:
            method, label = vidsieve.load(name, variant=variant), name if variant == "ours" else f"{name}:{variant}"
            yield label, method
            if hasattr(method, "inner"):
                yield f"{label}, outer part", vidsieve.load(name, variant=variant, inner=False)
            if hasattr(method, "earliest") and variant == "ours":
                yield f"{label}, earliest", vidsieve.load(name, variant=variant, earliest=True)


def deep(family: str, **vision: Any) -> Any:
    """Return a random model of a family with `DEPTH` layers, its vision encoder's configuration changed."""
    model = FAMILIES[family]()
    raw = model.config.to_dict()
    raw["text_config"].pop("layer_types", None)
    raw["text_config"] |= {"num_hidden_layers": DEPTH, "max_position_embeddings": 32768}
    raw["vision_config"] |= vision
    torch.manual_seed(0)
    made = type(model)(type(model.config).from_dict(raw))
    made.vidsieve_template = model.vidsieve_template
    if hasattr(model.config, "vidsieve_layout"):
        made.config.vidsieve_layout = model.config.vidsieve_layout
    made.generation_config = model.generation_config
    return made.eval()


def scene_inputs(processor: Any) -> list[dict[str, Any]]:
    """Return one question about each of some scenes of the testbed."""
    made = []
    for number in range(SCENES):
        cast = make_cast("dense", 9001, number)
        made.append(chat_inputs(processor, render(cast, 9001, number), [make_questions(cast, 9001, number)[0].text]))
    return made


def random_inputs(frames: int = 32, per_frame: int = 196) -> list[dict[str, Tensor]]:
    """Return a prompt about random frames of 216 px: 27×27 patches, 14×14 tokens."""
    draw = torch.Generator().manual_seed(1)
    words = torch.randint(10, 100, (12,), generator=draw).tolist()
    ids = torch.tensor([[START, USER, *[VIDEO] * (frames * per_frame + 1), *words, END, START, 110]])
    pixels = torch.randn(1, frames, 3, 216, 216, generator=draw)
    return [{"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values_videos": pixels}]


@torch.no_grad()
def kept(model: Any, method: Compressor, batches: list[dict[str, Any]]) -> dict[str, Any]:
    """Return what a method keeps, as means over videos, or why it refuses."""
    found = []
    try:
        for inputs in batches:
            with vidsieve.attach(model, method) as session:
                model.generate(**inputs, max_new_tokens=STEPS, do_sample=False)
            found += list(session.trace)
    except VidsieveError as error:
        return {"refused": str(error)}
    count, total = len(found), found[0].total
    decoded = [trace.decoded for trace in found if trace.decoded is not None]
    return {
        "real": sum(trace.real_retention for trace in found) / count,
        "layers": sum(trace.layer_retention for trace in found) / count,
        "alive": sum(trace.kept for trace in found) / count,
        "total": total,
        "newlines": sum(trace.newlines for trace in found) / count,
        "from": sorted({layer for trace in found for layer in trace.layers}),
        "acts": method.acts.value,
        "exact": not method.adaptive_budget,
        "decoded": sum(decoded) / len(decoded) if decoded else None,
    }


def cell(row: dict[str, Any]) -> str:
    """Return what a table says of a row."""
    if "refused" in row:
        return "– | – | –"
    decoded = "" if row["decoded"] is None else f" ({row['decoded']:.3f} of them read)"
    return f"{row['real']:.4f} | {row['layers']:.4f} | {row['alive']:.0f} + {row['newlines']:g}{decoded}"


def page(result: dict[str, Any]) -> str:
    """Return the page of docs."""
    lines = [INTRODUCTION]
    for title, rows in result["kept"].items():
        lines += [f"## {title}", ""]
        columns = [f"{100 * ratio:g} %: kept at the end | mean over layers | tokens" for ratio in RETENTIONS]
        lines += [f"| method | acts | {' | '.join(columns)} |", "|---|---|" + "---|" * 3 * len(columns)]
        reasons = []
        for label, by in rows.items():
            there = [row for row in by.values() if "acts" in row]
            acts = there[0]["acts"] if there else "–"
            lines.append(f"| `{label}` | {acts} | {' | '.join(cell(by[f'{ratio:g}']) for ratio in RETENTIONS)} |")
            reasons += [f"- {row['refused']}" for row in by.values() if "refused" in row]
        lines += ["", *dict.fromkeys(reasons), ""]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/retention.json"))
    parser.add_argument("--page", type=Path, default=Path("docs/retention.md"))
    options = parser.parse_args()
    quiet()
    model, processor = load_model("testbed")
    settings = {
        f"The testbed: {SCENES} scenes of 16×6×6 tokens, 8 layers": (model, scene_inputs(processor)),
        f"Random frames: 32×14×14 tokens, {DEPTH} layers": (deep("llava_onevision", image_size=216), random_inputs()),
    }
    found: dict[str, dict[str, Any]] = {}
    for title, (network, batches) in settings.items():
        for label, method in conditions():
            by = {f"{ratio:g}": kept(network, method.with_retention(ratio), batches) for ratio in RETENTIONS}
            found.setdefault(title, {})[label] = by
            print(title.partition(":")[0], label, *(cell(row) for row in by.values()), sep=" | ", flush=True)
    result = {"machine": machine(), "retentions": RETENTIONS, "kept": found}
    write_result(options.json, result)
    with writing(options.page) as temporary:
        temporary.write_text(page(result), encoding="utf-8")


if __name__ == "__main__":
    main()
