"""The equivalence table as JSON: every call against the masked reference, both families, eager and sdpa."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path

import torch

from vidsieve.benchmarking import machine, write_result
from vidsieve.testing.equivalence import STEPS, TOLERANCE, table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/equivalence.json"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    cells = list(table())
    for cell in cells:
        tokens = "" if cell.tokens_equal is None else f"  tokens equal: {cell.tokens_equal}"
        print(cell.family, cell.configuration, cell.call, cell.attention, f"{cell.difference:.1e}{tokens}", sep=" | ")
    worst = max(cell.difference for cell in cells)
    passed = sum(cell.passed for cell in cells)
    print(f"{passed} of {len(cells)} cells within {TOLERANCE:g}; largest difference {worst:.1e}")
    write_result(
        options.json,
        {
            "machine": machine(),
            "steps": STEPS,
            "tolerance": TOLERANCE,
            "largest": worst,
            "cells": [asdict(c) for c in cells],
        },
    )


if __name__ == "__main__":
    main()
