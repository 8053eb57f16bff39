"""The testbed in a folder: stopped, shared out and repeated, it gives the same files and the same table."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest
import torch

import vidsieve
from vidsieve.adapters.pruning import adapter_for
from vidsieve.answering import next_token_logits
from vidsieve.errors import BudgetError, EvaluationError, PromptError
from vidsieve.evaluation import experiment
from vidsieve.evaluation.conditions import named_methods
from vidsieve.evaluation.tasks import testbed as measuring
from vidsieve.evaluation.tasks.testbed import FULL, SceneCondition, ScenesTask, scene_conditions, scene_questions
from vidsieve.loading import load_model
from vidsieve.testbed.questions import make_questions
from vidsieve.testbed.world import make_cast, render
from vidsieve.types import Selection

QUESTIONS, SEED = 60, 77


@pytest.fixture(scope="module")
def conditions():
    return scene_conditions(named_methods(["random", "cacovid", "fastv"], prefill=True), [0.4, 0.1])


@pytest.fixture(scope="module")
def task(testbed):
    model, processor = testbed
    return ScenesTask(adapter_for(model), processor, "dense", SEED, QUESTIONS)


def run(folder, task, conditions, share=(0, 1)):
    return experiment.run(task, conditions, folder, share=share, command="vidsieve eval testbed")


def files(folder):
    return {name: (folder / name).read_bytes() for name in ("result.json", "samples.jsonl")}


@pytest.fixture(scope="module")
def whole(tmp_path_factory, task, conditions):
    """A run's folder, its result, and the options chosen: those of a scene under one condition after another."""
    folder, judged, said = tmp_path_factory.mktemp("whole"), measuring._right, []

    def noted(scene, logits):
        chosen = logits.gather(1, scene.options).argmax(1).tolist()
        said.append([question.options[n] for question, n in zip(scene.questions, chosen, strict=True)])
        return judged(scene, logits)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measuring, "_right", noted)
        return folder, run(folder, task, conditions).result, said


@torch.no_grad()
def by_hand(model, processor, methods, questions):
    """Ask one question after another of a model that a method is attached to, as a reader of the README would.

    Return for each method the options of the highest next-token logit, and whether they are the answers.
    """
    found = {name: [] for name in methods}
    scene = 0
    while questions > 0:
        cast = make_cast("dense", SEED, scene)
        frames, ready = list(render(cast, SEED, scene)), None
        for question in make_questions(cast, SEED, scene)[:questions]:
            content = [{"type": "video", "video": frames}, {"type": "text", "text": question.text}]
            inputs = processor.apply_chat_template(
                [{"role": "user", "content": content}],
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
            )
            pixels = {"pixel_values_videos": inputs["pixel_values_videos"]}
            # The vision tower reads a scene once: its features stand in for the pixels, where it may.
            ready = ready or model.get_video_features(**pixels)
            words = {name: inputs[name] for name in ("input_ids", "attention_mask")}
            for name, method in methods.items():
                fronted = method is not None and method.front is not None
                inputs = words | (pixels if fronted else {"mm_encoder_outputs": {"video": ready}})
                if method is None:
                    logits = model(**inputs).logits[0, -1]
                else:
                    with vidsieve.attach(model, method, seed=SEED + scene):
                        logits = model(**inputs).logits[0, -1]
                ids = processor.tokenizer.convert_tokens_to_ids(list(question.options))
                said = question.options[int(logits[ids].argmax())]
                found[name].append((said, said == question.answer))
            questions -= 1
        scene += 1
    return found


def test_a_folder_changes_no_number(whole, task, conditions):
    results = experiment.measured(task, conditions)
    plain, right = task.tabulate(results).result, task.marks(results)
    for one, other in zip(plain["rows"], whole[1]["rows"], strict=True):
        assert {**one, "select_ms": 0} == {**other, "select_ms": 0}
    samples = [json.loads(line) for line in (whole[0] / "samples.jsonl").read_text().splitlines()]
    assert len(samples) == QUESTIONS * len(plain["rows"])
    for row, (key, marks) in zip(plain["rows"], right.items(), strict=True):
        mine = [sample["right"] for sample in samples if sample["condition"] == key]
        assert mine == marks and row["accuracy"] == sum(mine) / QUESTIONS
    assert len({sample["item"] for sample in samples}) == QUESTIONS
    assert [row["method"] for row in plain["refused"]] == ["fastv"]


def test_stopped_and_shared_runs_give_the_same_files(tmp_path, whole, task, conditions, monkeypatch):
    scenes = len(scene_questions("dense", SEED, QUESTIONS))
    assert scenes == 3 and sum(map(len, scene_questions("dense", SEED, QUESTIONS))) == QUESTIONS
    real, asked = measuring.read_scene, []

    def stopped(*arguments):
        asked.append(1)
        if len(asked) == 2:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(measuring, "read_scene", stopped)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "stopped", task, conditions)
    run(tmp_path / "stopped", task, conditions)
    assert len(asked) == scenes + 1, "the scene that was measured is not measured again"
    assert files(tmp_path / "stopped") == files(whole[0])
    assert run(tmp_path / "shared", task, conditions, (1, 2)) is None
    run(tmp_path / "shared", task, conditions, (0, 2))
    assert files(tmp_path / "shared") == files(whole[0])


def test_another_policy_is_another_run(tmp_path, task, conditions):
    run(tmp_path, replace(task, questions=2), conditions)
    policy = next(method for method in named_methods(["cacovid"]).values()).policy
    for weight in policy.parameters():
        weight.data.add_(0.1)
    other = named_methods(["random", "cacovid", "fastv"], prefill=True)
    object.__setattr__(other["cacovid"], "policy", policy)
    with pytest.raises(EvaluationError, match="policies"):
        run(tmp_path, replace(task, questions=2), scene_conditions(other, [0.4, 0.1]))


def test_a_method_that_reads_the_question_chooses_for_each(testbed, task):
    """Also where all questions of a scene are asked at once: with the first one's tokens the others would go wrong."""
    method = vidsieve.load("cacovid", "testbed", retention=0.05)
    few = replace(task, questions=8)
    marks = few.marks(experiment.measured(few, [FULL, SceneCondition(method)]))
    alone = by_hand(*testbed, {"cacovid": method}, 8)["cacovid"]
    assert marks["cacovid/ours/0.05"] == [right for _, right in alone]


def test_what_acts_before_or_inside_the_encoder_has_a_scene_of_its_own(testbed, task):
    methods = named_methods(["earlytom:ours", "reuse+divprune", "divprune"])
    methods["earlytom:ours"] = replace(methods["earlytom:ours"], inner=False)
    few, at = replace(task, questions=6), scene_conditions(methods, [0.1])
    results = experiment.measured(few, at)
    marks = few.marks(results)
    assert len(marks) == 4
    assert {row["kept"] for samples in results.samples.values() for row in samples.values() if "kept" in row} == {
        57,
        576,
    }
    for condition in at[1:3]:
        alone = by_hand(*testbed, {"it": condition.method}, 6)["it"]
        assert marks[condition.key] == [right for _, right in alone], condition.key


def test_a_video_read_once_gives_the_logits_of_a_whole_batch():
    """Prompts of several lengths; layers of sliding attention too."""
    for which in ("shallow", "deep"):
        model, processor = load_model(f"testbed:{which}")
        adapter = adapter_for(model)
        scene = measuring.read_scene(adapter, processor, "dense", 7, 0, 12)
        assert len({int(n) for n in scene.encoded.attention_mask.sum(1)}) > 1
        for indices in (torch.arange(576), torch.arange(3, 576, 11)):
            selection = Selection(indices)
            plan = adapter.build(scene.encoded, [[selection]] * 12)
            with torch.no_grad():
                once = measuring.logits_of_one_selection(adapter, scene.encoded, selection)
                torch.testing.assert_close(once, next_token_logits(adapter, plan), atol=1e-4, rtol=1e-4)
    ids = scene.encoded.input_ids.clone()
    ids[1, int(scene.encoded.attention_mask[1].long().argmax())] += 1
    with pytest.raises(PromptError, match="differ before the end of the video"):
        measuring.logits_of_one_selection(adapter, replace(scene.encoded, input_ids=ids), selection)


def test_the_command_gives_what_asking_by_hand_gives(whole, testbed, cli, tmp_path):
    """Of every method the answer to every question, whether it is right, and the accuracy, to the last digit."""
    folder, table = tmp_path / "run", tmp_path / "table.json"
    shutil.copytree(whole[0], folder)  # the command goes on with it, and finds everything measured
    cli(
        "eval",
        "testbed",
        "--methods",
        "random,cacovid,fastv",
        "--retention",
        "0.4,0.1",
        "--seed",
        SEED,
        "--questions",
        QUESTIONS,
        "--out",
        folder,
        "--json",
        table,
    )
    rows = json.loads(table.read_text())["rows"]
    marks = {}
    for sample in map(json.loads, (folder / "samples.jsonl").read_text().splitlines()):
        marks.setdefault(sample["condition"], []).append(sample["right"])
    keys = list(marks)
    methods = {
        "full/-/1": None,
        "random/ours/0.1": vidsieve.load("random", retention=0.1),
        "cacovid/ours/0.1": vidsieve.load("cacovid", "testbed", retention=0.1),
        "fastv/ours/0.4": vidsieve.load("fastv", retention=0.4),
    }
    for key, answered in by_hand(*testbed, methods, QUESTIONS).items():
        number = keys.index(key)
        right = [right for _, right in answered]
        assert [word for word, _ in answered] == [word for some in whole[2][number :: len(keys)] for word in some], key
        assert right == marks[key], key
        assert rows[number]["accuracy"] == sum(right) / QUESTIONS, key
    assert len({row["accuracy"] for row in rows}) > 3, "conditions that could be taken for one another"


def test_what_the_command_refuses_is_refused_by_hand_too(whole, testbed):
    (refused,) = whole[1]["refused"]
    method = vidsieve.load(refused["method"], retention=refused["retention"])
    assert "cannot go below" in refused["reason"]
    with pytest.raises(BudgetError, match="cannot go below"):
        by_hand(*testbed, {"refused": method}, 1)


def test_a_method_that_the_models_layers_do_not_allow_has_no_row(task):
    """Of the deep model's layers the first two slide: SparseVLM begins at layer 2 there, FastV cannot at layer 1."""
    methods = named_methods(["random", "sparsevlm"], prefill=True) | {"fastv": vidsieve.load("fastv", layer=1)}
    table = experiment.run(replace(task, questions=3), scene_conditions(methods, [0.5])).result
    assert [row["method"] for row in table["rows"]] == ["full", "random", "sparsevlm"]
    (refused,) = table["refused"]
    said = "sliding_attention in layers 0, 1: layers from 2 on"
    assert refused["method"] == "fastv" and said in refused["reason"]
