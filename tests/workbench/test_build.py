"""The recipe from nothing to a model, in a few steps of every stage."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from workbench.testbed import build
from workbench.testbed.build import build_testbed
from workbench.testbed.curriculum import CURRICULUM

STAGES = ["V", "A", *(stage.name for stage in CURRICULUM)]


def run(folder, seed=3):
    lines = []
    record = build_testbed(folder, seed=seed, scenes=6, quick=True, log=lines.append)
    return record, lines


def weights(folder):
    return AutoModelForImageTextToText.from_pretrained(folder / "model").state_dict()


@pytest.mark.slow
def test_the_recipe_runs_whole_repeats_and_resumes(tmp_path, monkeypatch):
    record, _ = run(tmp_path / "straight")
    assert list(record["stages"]) == STAGES
    assert json.loads((tmp_path / "straight" / "model" / "testbed.json").read_text())["seed"] == 3
    processor = AutoProcessor.from_pretrained(tmp_path / "straight" / "model")
    assert processor.tokenizer.decode(processor.tokenizer("the red cross")["input_ids"]) == "the red cross"

    original, ran = build.run_stage, []

    def stops_at_c1(model, stage, *rest):
        ran.append(stage.name)
        if stage.name == "C1" and len(ran) < 4:
            raise KeyboardInterrupt
        return original(model, stage, *rest)

    monkeypatch.setattr(build, "run_stage", stops_at_c1)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "parts")
    assert not (tmp_path / "parts" / "model").exists()
    _, lines = run(tmp_path / "parts")
    assert ran == ["C0a", "C0b", "C1", "C1", "C2"]
    assert sum("done before" in line for line in lines) == 4
    straight, parts = weights(tmp_path / "straight"), weights(tmp_path / "parts")
    assert all(torch.equal(straight[name], parts[name]) for name in straight)
