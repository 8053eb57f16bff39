"""The recipes from nothing to the models, in a few steps of every stage."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from vidsieve.loading import load_model
from vidsieve.testbed.questions import KINDS
from vidsieve.testbed.world import TOKENS
from workbench.testbed import build
from workbench.testbed.build import build_testbed
from workbench.testbed.curriculum import CURRICULUM
from workbench.testbed.deepen import FRONT, TranslationRecipe, deepened, question_words, train_translation
from workbench.testbed.language import accuracy, prepare, run_blocks

STAGES = ["V", "A", *(stage.name for stage in CURRICULUM)]


def run(folder, models="all", seed=3):
    lines = []
    record = build_testbed(folder, models, seed=seed, scenes=6, quick=True, log=lines.append)
    return record, lines


def weights(folder, name):
    return AutoModelForImageTextToText.from_pretrained(folder / name / name).state_dict()


@pytest.mark.slow
def test_the_recipe_runs_whole_repeats_and_resumes(tmp_path, monkeypatch):
    records, _ = run(tmp_path / "straight")
    stages = {name: list(record["stages"]) for name, record in records.items()}
    assert stages == {"shallow": STAGES, "deep": ["P", "T"], "second": STAGES[2:]}
    for name, seed in (("shallow", 3), ("deep", 4), ("second", 5)):
        folder = tmp_path / "straight" / name / name
        assert json.loads((folder / "testbed.json").read_text())["seed"] == seed
        processor = AutoProcessor.from_pretrained(folder)
        assert processor.tokenizer.decode(processor.tokenizer("the red cross")["input_ids"]) == "the red cross"

    original, ran = build.run_stage, []

    def stops_at_c1(model, stage, *rest):
        ran.append(stage.name)
        if stage.name == "C1" and len(ran) < 4:
            raise KeyboardInterrupt
        return original(model, stage, *rest)

    monkeypatch.setattr(build, "run_stage", stops_at_c1)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "parts", "shallow")
    assert not (tmp_path / "parts" / "shallow" / "shallow").exists()
    _, lines = run(tmp_path / "parts", "shallow")
    assert ran == ["C0a", "C0b", "C1", "C1", "C2"]
    assert sum("done before" in line for line in lines) == 4
    straight, parts = weights(tmp_path / "straight", "shallow"), weights(tmp_path / "parts", "shallow")
    assert all(torch.equal(straight[name], parts[name]) for name in straight)

    deep, second = weights(tmp_path / "straight", "deep"), weights(tmp_path / "straight", "second")
    shared = [name for name in deep if "language_model.layers" not in name]
    assert all(torch.equal(deep[name], second[name]) for name in shared if "newline" not in name and "norm" not in name)


def test_the_deep_model_starts_as_the_shallow_one_but_for_the_words_of_questions():
    shallow, _ = load_model("testbed:shallow")
    deep, before = deepened(shallow, 5)
    assert deep.config.text_config.layer_types[:FRONT] == ["sliding_attention"] * FRONT
    scenes = prepare(shallow, "dense", 21, 1)
    asked = [(q.ids, [q.answer]) for q in scenes.questions[0]]
    tokens = torch.arange(TOKENS)[None]
    args = scenes.tokens[:1].float(), tokens, [asked]
    with torch.no_grad():
        old = run_blocks(shallow, *args)[0]
        deep.get_input_embeddings().weight[question_words()] = before
        assert torch.allclose(run_blocks(deep, *args)[0], old, atol=1e-4)


@pytest.mark.slow
def test_translation_brings_the_answers_back():
    shallow, _ = load_model("testbed:shallow")
    deep, before = deepened(shallow, 5)
    scenes, held = prepare(shallow, "dense", 21, 24), prepare(shallow, "dense", 23, 4)
    lost = accuracy(deep, held, TOKENS, KINDS)
    figures = train_translation(deep, before, scenes, held, TranslationRecipe(steps=150), 5, lambda line: None)
    assert lost["colour"] < 0.6 < 0.9 < figures["colour"] and figures["error"] < 0.01


def test_the_shipped_deep_model_answers_as_well_as_the_shallow_one():
    found = {}
    for name in ("testbed:deep", "testbed:shallow"):
        model, _ = load_model(name)
        figures = accuracy(model, prepare(model, "dense", 9_301, 8), TOKENS, KINDS)
        found[name] = sum(figures.values()) / len(figures)
    assert found["testbed:deep"] > found["testbed:shallow"] - 0.05
