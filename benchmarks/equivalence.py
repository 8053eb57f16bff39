"""The equivalence table: every family, call and attention against the masked reference; JSON and docs/calls.md."""

from __future__ import annotations

import argparse
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers

import vidsieve
from vidsieve.io.files import writing
from vidsieve.io.machine import machine, write_result
from vidsieve.testing.calls import STEPS
from vidsieve.testing.equivalence import CONFIGURATIONS, TOLERANCE, EquivalenceCell, refusals, table
from vidsieve.testing.tiny_models import FAMILIES

METHODS = {"random": 0.3, "visionzip": 0.4, "fastv": 0.8}
"""One method that drops, one that merges, one inside the LLM (of 3 layers, so that little can go)."""

INTRODUCTION = f"""\
# Every call under a session, family by family

Written by `python benchmarks/equivalence.py`; every figure is in `benchmarks/results/equivalence.json`. transformers
{transformers.__version__}, torch {torch.__version__.split("+")[0]}, tiny random models of the real classes in float32.

"exact" means: the call under a session equals a full forward in which the dropped tokens are masked out at unchanged
positions. Generated tokens are equal everywhere; the number is the largest difference of logits (of scores
for beams, of loss and tower gradient for labels) over {len(CONFIGURATIONS)} batches ({", ".join(CONFIGURATIONS)}) and
two attentions (eager, sdpa). A compiled language model and a device map run on the ragged batch with sdpa; under
a method inside the LLM, a compiled language model runs uncompiled.

Other methods before the LLM, trained ones too, take the path of `random` or, if they merge, of `visionzip`. `dycoke`,
which acts while decoding, is compared step by step in `tests/attach/test_decoding.py`; it refuses beams and static
caches. Methods with several stages, with a part before the LLM too, or that merge inside it are in
`tests/attach/test_staged.py`, against a forward without a cache that merges the same.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/equivalence.json"))
    parser.add_argument("--page", type=Path, default=Path("docs/calls.md"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    start, rows, found = time.perf_counter(), [], {}
    for name, retention in METHODS.items():
        cells = list(table(vidsieve.load(name, retention=retention)))
        for cell in cells:
            print(name, cell.family, cell.configuration, cell.call, cell.attention, outcome([cell]), sep=" | ")
        rows += [{"method": name, "retention": retention, **asdict(cell), "passed": cell.passed} for cell in cells]
        found[name] = cells
    refused = {family: refusals(family, vidsieve.load("random", retention=0.3)) for family in FAMILIES}
    exact = [row for row in rows if row["error"] is None]
    worst, passed = max(row["difference"] for row in exact), sum(row["passed"] for row in exact)
    print(
        f"{passed} of {len(exact)} cells within {TOLERANCE:g}; largest difference {worst:.1e}; "
        f"{len(rows) - len(exact)} refused as they should be"
    )
    result: dict[str, Any] = {
        "machine": machine(),
        "steps": STEPS,
        "tolerance": TOLERANCE,
        "largest": worst,
        "passed": passed,
        "compared": len(exact),
        "seconds": round(time.perf_counter() - start),
        "refused": refused,
        "cells": rows,
    }
    write_result(options.json, result)
    options.page.parent.mkdir(parents=True, exist_ok=True)
    with writing(options.page) as temporary:
        temporary.write_text(page(found, refused), encoding="utf-8")


def outcome(cells: list[EquivalenceCell]) -> str:
    """Return what the cells of one call show: exact, refused, or how far off."""
    if any(cell.error for cell in cells):
        return f"error: {cells[0].error}"
    worst = max(cell.difference or 0.0 for cell in cells)
    return f"exact, {worst:.0e}" if all(cell.passed for cell in cells) else f"WRONG by {worst:.0e}"


def page(found: dict[str, list[EquivalenceCell]], refused: dict[str, dict[str, str]]) -> str:
    """Return the tables as Markdown."""
    parts = [INTRODUCTION]
    for name, cells in found.items():
        notes: list[str] = []
        lines = [
            f"## `{name}`, retention {METHODS[name]}",
            "",
            "| call | " + " | ".join(FAMILIES) + " |",
            "|---" * (len(FAMILIES) + 1) + "|",
        ]
        for call in dict.fromkeys(cell.call for cell in cells):
            shown = []
            for family in FAMILIES:
                text = outcome([cell for cell in cells if (cell.family, cell.call) == (family, call)])
                if text.startswith("error: "):
                    notes += [text[7:]] if text[7:] not in notes else []
                    text = f"error {notes.index(text[7:]) + 1}"
                shown.append(text)
            lines.append(f"| {call} | " + " | ".join(shown) + " |")
        lines += [f"\nError {number}: {note}" for number, note in enumerate(notes, 1)]
        parts.append("\n".join(lines) + "\n")
    parts.append("## What is refused\n\nBefore anything runs, with these words, in every family:\n")
    families = list(refused)
    lines = ["| call | error |", "|---|---|"]
    for call, text in refused[families[0]].items():
        others = {refused[family][call] for family in families}
        lines += [f"| {call} | {other} |" for other in sorted(others | {text})]
    return "\n".join([*parts, "\n".join([*lines, *ELSEWHERE]), CALLER]) + "\n"


ELSEWHERE = [
    f"| {call} | {text} |"
    for call, text in {
        "`inputs_embeds` without `input_ids`": "pass input_ids: a video's tokens cannot be found in embeddings",
        "`inputs_embeds` beside `input_ids`": "leave inputs_embeds out: …",
        "`position_ids` (B, L), Qwen-VL": "position_ids must be (3, B, L) or (4, B, L)",
        "no `mm_token_type_ids`, Qwen-VL": "mm_token_type_ids is missing: …",
        "a filled cache under gradient checkpointing": "gradient checkpointing runs a model in training mode without …",
        "prefix tuning (PEFT), a method inside the LLM": "… a cache that holds tokens already: prefix tuning …",
        "tokens dropped at or before a sliding layer": "… layers from N on can be used …",
        "a named layer of a hybrid that is not behind full attention": "… layers N, M can be used …",
    }.items()
]
"""What is refused in some families or models only."""
CALLER = """
## What the caller gets

`generate` returns sequences that begin with the caller's `input_ids`. Everything else covers what the LLM read, the
shortened prompt: `logits`, `hidden_states`, `attentions` and caches, from `forward` and from `generate`.
`session.kept_positions` (B, L') names the column of the caller's prompt behind each of their columns, −1 on padding.

On an LLM some of whose layers slide or recur, a pruned call equals the unmodified model on the shortened prompt with
the same explicit positions, and not a forward under a mask: those layers count the tokens that are there. The trace
says so. Under a method inside such an LLM, layers after a drop run on the shorter prompt, recurrent ones too; it equals
the stock layers run by hand (`tests/attach/test_hybrids.py`)."""


if __name__ == "__main__":
    main()
