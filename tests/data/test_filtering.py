"""Questions that a model answers without the video are left out, and nothing else."""

from __future__ import annotations

import json

import pytest
import torch

from vidsieve.data.filtering import blind_answers, filter_file
from vidsieve.data.rows import ask, read_rows
from vidsieve.errors import TrainingError
from vidsieve.testbed.files import write_scenes


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scenes")
    write_scenes(folder, world="A", seed=3, scenes=3)
    return folder / "questions.jsonl"


def one_by_one(model, processor, row):
    """Return whether the model is right about one question alone, by hand."""
    asked = ask(row, processor.tokenizer)
    text = processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "text", "text": asked.text}]}],
        add_generation_prompt=True,
        tokenize=False,
    )
    ids = processor.tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        logits = model(input_ids=ids).logits[0, -1]
    return int(logits[asked.option_ids].argmax()) == asked.answer


def test_a_batch_answers_as_one_by_one(testbed, questions):
    model, processor = testbed
    rows = [row for row in read_rows(questions) if "question" in row]
    found = blind_answers(model, processor, rows, batch=7)
    assert found == [one_by_one(model, processor, row) for row in rows] and 0.1 < sum(found) / len(found) < 0.6


@pytest.mark.parametrize("rule", ["any", "all"])
def test_what_is_left_needs_its_video(testbed, questions, tmp_path, monkeypatch, rule):
    model, processor = testbed
    rows = read_rows(questions)
    asked = [row for row in rows if "question" in row]
    first = blind_answers(model, processor, asked)
    second = [number % 3 == 0 for number in range(len(asked))]  # another model's answers
    answers = iter([first, second])
    monkeypatch.setattr("vidsieve.data.filtering.blind_answers", lambda *args, **options: next(answers))
    out = tmp_path / "deep" / "filtered.jsonl"
    out.parent.mkdir()
    found = filter_file(questions, out, [testbed, testbed], rule)
    gone = [(a or b) if rule == "any" else (a and b) for a, b in zip(first, second, strict=True)]
    wanted = [row["question"] for row, out_of_it in zip(asked, gone, strict=True) if not out_of_it]
    left = read_rows(out)
    assert [row["question"] for row in left if "question" in row] == wanted
    assert (found.questions, found.kept) == (len(asked), len(wanted)) and found.captions == len(rows) - len(asked)
    assert all((out.parent / row["video"]).is_file() for row in left), "paths lead from the new file"


def test_nothing_left_and_nothing_to_ask_are_errors(testbed, questions, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "vidsieve.data.filtering.blind_answers", lambda model, processor, rows, **options: [True] * len(rows)
    )
    with pytest.raises(TrainingError, match="none would teach anything"):
        filter_file(questions, tmp_path / "out.jsonl", [testbed])
    assert not (tmp_path / "out.jsonl").exists()
    captions = tmp_path / "captions.jsonl"
    captions.write_text(json.dumps({"video": "a.mp4", "caption": "a fox"}))
    with pytest.raises(TrainingError, match="no multiple-choice questions"):
        filter_file(captions, tmp_path / "out.jsonl", [testbed])
