"""Rows of training prompts: the fields of a row, the options that answers name, and the videos that are held out."""

from __future__ import annotations

import json

import pytest
from file_rows import rows_of

from vidsieve.errors import TrainingError
from vidsieve.evaluation.benchmarks import questions
from vidsieve.testbed.files import write_scenes
from vidsieve.training.data.filtering import filter_file
from vidsieve.training.data.layouts import read_records
from vidsieve.training.data.merging import merge_files
from vidsieve.training.data.prompts import FilePrompts
from vidsieve.training.data.table import held_out, keys_of, load_rows
from vidsieve.training.recipes import train_policy
from vidsieve.training.sources import Files


def rows_file(tmp_path, *rows):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


ASKED = {"video": "a.mp4", "question": "?", "options": ["red", "blue"], "answer": "red"}


@pytest.mark.parametrize(
    ("row", "fault"),
    [
        ({"video": "a.mp4", "caption": "c", "question": "?"}, "missing field options"),
        ({"video": "a.mp4", "question": "?", "problem_type": "numerical"}, "answer: is missing, and only a multiple"),
        ({"video": 5, "caption": "c"}, "video: expected str, got int"),
        ({"video": "a.mp4", "caption": None}, "caption: expected str, got null"),
        ({"video": "a.mp4", "caption": "  "}, "caption: expected a text that is not empty"),
        (
            {"video": "a.mp4"},
            "a row needs video, and caption or question and options; or frames or image, and caption",
        ),
        (["a"], "a row needs"),
        ({"caption": "c"}, "a row needs"),
        (ASKED | {"options": ["red"]}, "two or more"),
        (ASKED | {"options": None}, "options: expected array, got null"),
        (ASKED | {"answer": "green"}, "the answer 'green' is none of its options"),
        (
            ASKED | {"problem_type": "open"},
            "problem_type: invalid enum value 'open', must be one of multiple choice, num",
        ),
        (ASKED | {"image": "a.png"}, "video and image do not go together"),
        ({"image": "a.png", "caption": "c", "question": "?"}, "image and question do not go together"),
        ({"frames": [["a.png", 1]], "video": "a.mp4", "caption": "c"}, "video and frames do not go together"),
        ({"frames": [["a.png", 0]], "caption": "c"}, "frames[0][1]: expected int >= 1"),
        ({"frames": [["a.png", True]], "caption": "c"}, "frames[0][1]: expected int, got bool"),
        ({"frames": [["a.png"]], "caption": "c"}, "frames[0]: expected array of length 2, got 1"),
        ({"frames": [], "caption": "c"}, "frames: expected array of length >= 1"),
        ({"frames": "x", "caption": "c"}, "frames: expected array, got str"),
    ],
)
def test_malformed_rows_are_named(tmp_path, row, fault):
    good, bad = read_records(rows_file(tmp_path, ASKED, row))
    assert good.rows and not bad.rows and bad.number == 2 and fault in bad.fault


def test_a_wrong_answer_is_told_before_training(testbed, tmp_path):
    from vidsieve.adapters.pruning import adapter_for

    (tmp_path / "a.mp4").touch()
    model, processor = testbed
    path = rows_file(tmp_path, ASKED, ASKED | {"answer": "green"})
    prompts = FilePrompts(adapter_for(model), processor, path)
    assert len(prompts.choices) == 1
    assert "record 2: the answer 'green' is none of its options" in prompts.skipped.summary()


UNLABELLED = {name: value for name, value in ASKED.items() if name != "answer"} | {"question": "which colour ?"}


def test_a_question_without_an_answer_is_for_the_models_own_alone(testbed, tmp_path):
    """Rewards "agreement" and of captions train on it; others, held-out prompts and evaluations leave it out."""
    write_scenes(tmp_path, world="dense", seed=2, scenes=2)
    rows = [json.loads(line) for line in (tmp_path / "questions.jsonl").read_text().splitlines()]
    blank = [{name: value for name, value in row.items() if name != "answer"} for row in rows]
    path, few = rows_file(tmp_path, *blank), {"steps": 1, "prompts_per_step": 2, "token_rollouts": 4}
    few |= {"taught": False, "blind_reward": "answer"}
    record = train_policy("sieve", *testbed, tmp_path / "sieve", few, files=Files(path))
    assert record["prompts"] == 2 and record["skipped"]["left_out"] == {"a caption": 2}
    with pytest.raises(TrainingError, match=r"can be used: .*a question without an answer: for reward 'agreement'"):
        train_policy("cacovid", *testbed, tmp_path / "cacovid", {"steps": 1}, files=Files(path))
    with pytest.raises(TrainingError, match="a question without an answer"):
        train_policy("sieve", *testbed, tmp_path / "held", few | {"hold_out": 0.5}, files=Files(path))
    mixed = rows_file(tmp_path, *blank, *(row for row in rows if "question" in row))
    assert questions.read(mixed)[0].fault == "answer: is missing"


def test_a_filter_and_a_mix_keep_questions_without_an_answer(testbed, tmp_path):
    (tmp_path / "a.mp4").touch()
    path = rows_file(tmp_path, ASKED, UNLABELLED)
    assert filter_file(path, tmp_path / "out.jsonl", [testbed]).others == 1
    merge_files([(path, None)], tmp_path / "mix.jsonl")
    for name in ("out.jsonl", "mix.jsonl"):
        assert UNLABELLED["question"] in (tmp_path / name).read_text()


def test_images_that_rows_share_are_held_out_together(tmp_path):
    rows = [
        {"frames": [[f"{group}{i}.png", 3], [f"{group}{i + 1}.png", 3]], "caption": "c"}
        for group in "abcdefgh"
        for i in range(3)
    ]
    path = rows_file(tmp_path, *rows)
    for share in (0.05, 0.25, 0.5):
        view = load_rows(path, present=False)
        held = held_out(view, share, path)
        sides = [bool(keys_of(row) & held) for row in view]
        assert all(keys_of(row) <= held for row, side in zip(view, sides, strict=True) if side)
        assert 0 < sum(sides) / len(rows) <= share + 0.13 and not all(sides)
    with pytest.raises(TrainingError, match="hang together"):
        held_out(load_rows(rows_file(tmp_path, *rows[:3]), present=False), 0.5, path)


def test_a_filter_keeps_other_kinds_of_question(testbed, tmp_path):
    counted = {"video": "a.mp4", "question": "how many ?", "answer": "3", "problem_type": "numerical"}
    lines = [
        ASKED | {"question": f"what colour is the {name} ?", "answer": right}
        for name in ("home", "disc", "wedge")
        for right in ("red", "blue")
    ]
    path = rows_file(tmp_path, *lines, counted, {"video": "a.mp4", "caption": "c"})
    found = filter_file(path, tmp_path / "out.jsonl", [testbed])
    assert (found.questions, found.captions, found.others) == (6, 1, 1)
    left = rows_of(tmp_path / "out.jsonl")
    assert [row["question"] for row in left if "problem_type" in row] == ["how many ?"]
    assert len(left) == found.kept + 2
