"""Training prompts from files."""

from __future__ import annotations

import json

import pytest
import torch

from vidsieve.adapters.pruning import adapter_for
from vidsieve.errors import TrainingError
from vidsieve.testbed.files import write_scenes
from vidsieve.training.data.prompts import FilePrompts
from vidsieve.training.recipes import train_policy
from vidsieve.training.sources import Files


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("files")
    write_scenes(place, world="dense", seed=1, scenes=2)
    return place


def test_rendered_scenes_train_both_policies(testbed, folder, tmp_path):
    model, processor = testbed
    for method in ("cacovid", "score"):
        settings = {"steps": 1, "prompts_per_step": 2}
        record = train_policy(
            method,
            model,
            processor,
            tmp_path / method,
            settings,
            files=Files(folder / "questions.jsonl"),
            model_name="testbed",
        )
        assert record["prompts"] == 2


def test_every_row_comes_once_a_pass_in_a_seeded_order(testbed, folder):
    model, processor = testbed
    prompts = FilePrompts(adapter_for(model), processor, folder / "questions.jsonl", seed=4)
    count = len(prompts.captions)
    ids = [tuple(prompts.caption(i).inputs["input_ids"].flatten().tolist()) for i in range(2 * count)]
    assert set(ids[:count]) == set(ids[count:]) and len(set(ids)) == count
    again = FilePrompts(adapter_for(model), processor, folder / "questions.jsonl", seed=4)
    assert torch.equal(again.choice(3).inputs["input_ids"], prompts.choice(3).inputs["input_ids"])


ROW = {"video": "scene-0000.mp4", "question": "what ?", "options": ["red", "blue"], "answer": "red"}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{", "is not JSON"),
        ({"video": "scene-0000.mp4"}, "needs video, and caption or question"),
        (ROW | {"video": "gone.mp4"}, "nothing in .* can be used: 1 missing video of 1 row, first .*gone.mp4"),
        (ROW | {"answer": "green"}, "none of its options"),
        (ROW | {"options": ["red", "dark blue"]}, "neither they nor the letters A, B are one token"),
        ({"video": "scene-0000.mp4", "caption": ""}, "that is not empty"),
        ({"video": "scene-0000.mp4", "caption": " \n "}, "that is not empty"),
    ],
)
def test_bad_rows_are_named(testbed, folder, row, message):
    model, processor = testbed
    path = folder / "bad.jsonl"
    path.write_text(row if isinstance(row, str) else json.dumps(row))
    with pytest.raises(TrainingError, match=message):
        prompts = FilePrompts(adapter_for(model), processor, path)
        _ = prompts.caption(0) if isinstance(row, dict) and "caption" in row else prompts.choice(0)


@pytest.mark.parametrize(
    ("change", "when", "what"),
    [
        ({"question": "<video> what ?"}, "at once", "question that cannot be asked"),
        ({"question": " "}, "at once", "malformed record"),
        ({"options": ["red", "RED"]}, "at once", "malformed record"),
        ({"question": "zzz"}, "later", "prompt that cannot be asked"),
    ],
)
def test_a_row_that_cannot_be_asked_gives_its_place_to_the_next(testbed, folder, change, when, what):
    model, processor = testbed
    path = folder / "one-bad.jsonl"
    path.write_text("\n".join(map(json.dumps, [ROW, ROW | change, ROW | {"question": "what colour ?"}])))
    forward, backward = (FilePrompts(adapter_for(model), processor, path, seed=1) for _ in range(2))
    assert len(forward.choices) == (2 if when == "at once" else 3)
    ids = [forward.choice(number).inputs["input_ids"].tolist() for number in range(6)]
    assert ids == [backward.choice(number).inputs["input_ids"].tolist() for number in reversed(range(6))][::-1]
    assert len({tuple(row[0]) for row in ids}) == 2
    assert dict(forward.skipped.faults) == {what: 1}
    assert f"1 {what}" in forward.skipped.summary() and " 2" in forward.skipped.summary()


def test_rows_of_the_other_kind(testbed, folder):
    model, processor = testbed
    path = folder / "only.jsonl"
    path.write_text(json.dumps(ROW))
    with pytest.raises(TrainingError, match="no rows with a caption"):
        FilePrompts(adapter_for(model), processor, path).caption(0)


def test_a_file_of_video_r1_is_read_as_it_is(testbed, folder):
    """Its multiple-choice questions on videos; images and other kinds of question are left out."""
    model, processor = testbed
    record = {
        "data_type": "video",
        "problem_type": "multiple choice",
        "problem": "what colour ?",
        "options": ["A. red", "B. blue"],
        "solution": "<answer>B</answer>",
        "path": "./scene-0000.mp4",
    }
    path = folder / "video-r1.json"
    path.write_text(json.dumps([record | {"data_type": "image"}, record, record | {"problem_type": "OCR"}]))
    prompts = FilePrompts(adapter_for(model), processor, path)
    assert len(prompts.choices) == 1 and prompts.choice(0).answer == 1
    path.write_text(json.dumps([record | {"path": "gone.mp4"}]))
    with pytest.raises(TrainingError, match=r"1 missing video of 1 row, first .*gone\.mp4"):
        FilePrompts(adapter_for(model), processor, path)
