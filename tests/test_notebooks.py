"""The notebooks of `examples/` run, with smaller numbers than those whose outputs they show; so does the script."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from vidsieve.testing import tiny_models

FOLDER = Path(__file__).parent.parent / "examples"
SMALLER = {
    "method": "QUESTIONS = 24",
    "train": "STEPS, QUESTIONS = 2, 24",
    "compare": "RETENTIONS = [0.1]",
    "reinvest": "SCENES, EACH, FRAMES, TOKENS = 2, 2, (16, 32), (144, 576)",
    "stream": "SCENES, EACH = 2, 2",
    "calibrate": "SCENES, EACH, FRESH, TOLERANCE = 15, 1, 2, 0.3",
}
"""Run behind the cell that has the tag ``parameters``."""


def cells(name: str) -> list[dict]:
    return json.loads((FOLDER / f"{name}.ipynb").read_text("utf-8"))["cells"]


NAMES = sorted(path.stem for path in FOLDER.glob("*.ipynb"))


@pytest.mark.parametrize("name", NAMES)
def test_it_runs(name, tmp_path):
    parts = []
    for cell in cells(name):
        if cell["cell_type"] == "code":
            parts.append(re.sub(r"(?m)^%.*$", "", "".join(cell["source"])))
            parts += [SMALLER[name]] if "parameters" in cell["metadata"].get("tags", []) else []
    script = tmp_path / "notebook.py"
    script.write_text("\n\n".join(parts), "utf-8")
    environment = {**os.environ, "MPLBACKEND": "Agg"}
    done = subprocess.run([sys.executable, script], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("name", NAMES)
def test_it_shows_its_outputs_and_its_links_exist(name):
    code = [cell for cell in cells(name) if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1)), "run it from the top, and save"
    outputs = [output for cell in code for output in cell["outputs"]]
    assert outputs and not [output for output in outputs if output["output_type"] == "error"]
    for cell in cells(name):
        for link in re.findall(r"\]\((\.\./[^)]+)\)", "".join(cell["source"])):
            assert (FOLDER / link).exists(), link


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_the_script_for_qwen_runs_on_a_tiny_model(family, run, tmp_path):
    run("testbed", "render", tmp_path / "scenes", "--scenes", "1")
    clip = tmp_path / "scenes" / "scene-0000.mp4"
    getattr(tiny_models, family)().save_pretrained(tmp_path / "model")
    tiny_models.processor_for(family).save_pretrained(tmp_path / "model")
    script = [sys.executable, FOLDER / "qwen.py", clip, "what colour", "--model", tmp_path / "model", "--frames", "8"]
    done = subprocess.run(
        [*script, "--methods", "divprune,evs", "--retention", "0.25", "--max-new-tokens", "3"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    shown = done.stdout.splitlines()
    assert [line.split()[0] for line in shown] == ["all", "divprune", "evs"]
    for line in shown[1:]:
        kept, total = map(int, re.search(r"(\d+) of (\d+) video tokens", line).groups())
        assert kept == total // 4
