"""The testbed in a folder: stopped, shared out and repeated, it gives the same files and the same table."""

from __future__ import annotations

import json

import pytest

from vidsieve.errors import EvaluationError
from vidsieve.eval import testbed as measuring
from vidsieve.eval.methods import named_methods, rows_for
from vidsieve.eval.testbed import evaluate, run_config, scene_counts, write_run
from vidsieve.store import Store

QUESTIONS = 60
ABOUT = {"world": "A", "seed": 77, "questions": QUESTIONS}


@pytest.fixture(scope="module")
def rows():
    return rows_for(named_methods(["random", "cacovid", "fastv"], prefill=True), [0.4, 0.1])


def run(folder, testbed, rows, share=(0, 1)):
    with Store(folder, run_config(testbed[0], rows, ABOUT), share) as store:
        result = evaluate(*testbed, rows, world="A", seed=77, questions=QUESTIONS, store=store)
    if result["n_questions"] == QUESTIONS:
        write_run(folder, result, "vidsieve eval testbed")
    return result


def files(folder):
    return {name: (folder / name).read_bytes() for name in ("result.json", "samples.jsonl")}


@pytest.fixture(scope="module")
def whole(tmp_path_factory, testbed, rows):
    folder = tmp_path_factory.mktemp("whole")
    return folder, run(folder, testbed, rows)


def test_a_folder_changes_no_number(whole, testbed, rows):
    plain = evaluate(*testbed, rows, world="A", seed=77, questions=QUESTIONS)
    for one, other in zip(plain["rows"], whole[1]["rows"], strict=True):
        assert {**one, "select_ms": 0} == {**other, "select_ms": 0}
    assert plain["right"] == whole[1]["right"]
    samples = [json.loads(line) for line in (whole[0] / "samples.jsonl").read_text().splitlines()]
    assert len(samples) == QUESTIONS * len(plain["rows"])
    for row, (key, marks) in zip(plain["rows"], plain["right"].items(), strict=True):
        mine = [sample["right"] for sample in samples if sample["condition"] == key]
        assert mine == marks and row["accuracy"] == sum(mine) / QUESTIONS
    assert len({sample["item"] for sample in samples}) == QUESTIONS
    assert [row["method"] for row in plain["refused"]] == ["fastv"]


def test_stopped_and_shared_runs_give_the_same_files(tmp_path, whole, testbed, rows, monkeypatch):
    scenes = len(scene_counts("A", 77, QUESTIONS))
    assert scenes == 3 and sum(scene_counts("A", 77, QUESTIONS)) == QUESTIONS
    real, asked = measuring._measured, []

    def stopped(*arguments):
        asked.append(1)
        if len(asked) == 2:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(measuring, "_measured", stopped)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "stopped", testbed, rows)
    run(tmp_path / "stopped", testbed, rows)
    assert len(asked) == scenes + 1, "the scene that was measured is not measured again"
    assert files(tmp_path / "stopped") == files(whole[0])
    assert run(tmp_path / "shared", testbed, rows, (1, 2))["n_questions"] < QUESTIONS
    run(tmp_path / "shared", testbed, rows, (0, 2))
    assert files(tmp_path / "shared") == files(whole[0])


def test_another_policy_is_another_run(tmp_path, testbed, rows):
    with Store(tmp_path, run_config(testbed[0], rows, ABOUT)):
        pass
    policy = next(method for method in named_methods(["cacovid"]).values()).policy
    for weight in policy.parameters():
        weight.data.add_(0.1)
    other = named_methods(["random", "cacovid", "fastv"], prefill=True)
    object.__setattr__(other["cacovid"], "policy", policy)
    with pytest.raises(EvaluationError, match="rows"):
        Store(tmp_path, run_config(testbed[0], rows_for(other, [0.4, 0.1]), ABOUT))
