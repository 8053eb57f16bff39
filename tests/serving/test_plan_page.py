"""docs/plan.md says what its result file and the present formulas give."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
RESULT = ROOT / "benchmarks" / "results" / "plan.json"


def test_the_page_is_as_the_benchmark_writes_it(tmp_path):
    page = tmp_path / "plan.md"
    page.write_text((ROOT / "docs" / "plan.md").read_text("utf-8"), "utf-8")
    command = [sys.executable, ROOT / "benchmarks" / "plan.py", "--read", RESULT, "--page", page]
    subprocess.run(command, check=True, timeout=120)
    assert page.read_text("utf-8") == (ROOT / "docs" / "plan.md").read_text("utf-8")


def test_predictions_from_products_alone_are_too_small_and_not_by_much():
    for case in json.loads(RESULT.read_text("utf-8"))["models"].values():
        for row in case["rows"]:
            assert row["prefill"]["ratio"] == pytest.approx(0.85, abs=0.15), row
            assert row["encoder"]["ratio"] == pytest.approx(0.8, abs=0.2) and 0.3 < row["decode"]["ratio"] < 1, row
