"""The equivalence table as JSON: every family, call and attention against the masked reference, by method."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path

import torch

import vidsieve
from vidsieve.benchmarking import machine, write_result
from vidsieve.testing.equivalence import STEPS, TOLERANCE, table

METHODS = {"random": 0.3, "visionzip": 0.4, "fastv": 0.8}
"""One method that drops, one that merges, one inside the LLM (of 3 layers, so that little can go)."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/equivalence.json"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for name, retention in METHODS.items():
        cells = list(table(vidsieve.load(name, retention=retention)))
        for cell in cells:
            tokens = "" if cell.tokens_equal is None else f"  tokens equal: {cell.tokens_equal}"
            where = (name, cell.family, cell.configuration, cell.call, cell.attention)
            print(*where, f"{cell.difference:.1e}{tokens}", sep=" | ")
        rows += [{"method": name, "retention": retention, **asdict(cell), "passed": cell.passed} for cell in cells]
    worst, passed = max(row["difference"] for row in rows), sum(row["passed"] for row in rows)
    print(f"{passed} of {len(rows)} cells within {TOLERANCE:g}; largest difference {worst:.1e}")
    write_result(
        options.json,
        {
            "machine": machine(),
            "steps": STEPS,
            "tolerance": TOLERANCE,
            "largest": worst,
            "cells": rows,
        },
    )


if __name__ == "__main__":
    main()
