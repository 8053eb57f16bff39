"""Questions of Video-R1's form: both layouts, parts that are left out, and messages about malformed records."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from vidsieve.errors import TrainingError
from vidsieve.training.data import prompts
from vidsieve.training.data.layouts import layout_of, read_records
from vidsieve.training.data.prompts import load_prompts
from vidsieve.training.data.rows import ASKED, KINDS, ask
from vidsieve.training.data.skipped import Skipped

CHOICE = {
    "problem_id": 7,
    "problem": "What does the child pick up? ",
    "data_type": "video",
    "problem_type": "multiple choice",
    "options": ["A. a red ball", "B. a spoon", "C. nothing"],
    "process": "<think>It bends down.</think>",
    "solution": "<answer>B</answer>",
    "path": "./STAR/clip 1.mp4",
    "data_source": "STAR",
}
COUNT = {
    "problem": "How many cubes collide?",
    "data_type": "video",
    "problem_type": "numerical",
    "options": [],
    "solution": "<answer>1,200</answer>",
    "path": "./CLEVRER/v.mp4",
}
IMAGE = COUNT | {"data_type": "image", "path": "./Math/a.png", "solution": 5}
RELEASE = {
    "modality_type": "video",
    "problem_type": "multiple choice",
    "solution": "<answer>B</answer>",
    "problem": "What does the child pick up? Options:\nA. a red ball\nB. a spoon\nC. nothing\n",
    "video": "STAR/clip 1.mp4",
}
TOKENIZER = SimpleNamespace(tokenizer=lambda word, **_: {"input_ids": [ord(word)]})


@pytest.fixture
def read(tmp_path):
    """A function that writes records and reads them."""

    def records(*entries, lines=False, root=None):
        path = tmp_path / "train.json"
        path.write_text("\n\n".join(map(json.dumps, entries)) if lines else json.dumps(entries, indent=1))
        assert layout_of(path).name == "video-r1"
        return list(read_records(path, root))

    return records


@pytest.mark.parametrize("lines", [False, True])
def test_a_record_in_both_layouts(read, tmp_path, lines):
    """The answer without its tags, options apart from the question, the path from the file's folder."""
    (ours,), (theirs,) = (record.rows for record in read(CHOICE, RELEASE, lines=lines))
    assert theirs == {
        "video": str(tmp_path / "STAR" / "clip 1.mp4"),
        "question": "What does the child pick up?",
        "options": ["A. a red ball", "B. a spoon", "C. nothing"],
        "answer": "B",
        "problem_type": "multiple choice",
    }
    assert ours == theirs | {"source": "STAR"}


def test_paths_start_from_the_root(read):
    records = read(CHOICE, CHOICE | {"path": "/data/x.mp4"}, root=Path("/videos"))
    assert [record.rows[0]["video"] for record in records] == ["/videos/STAR/clip 1.mp4", "/data/x.mp4"]


def test_images_are_counted_and_other_kinds_left_out_of_training(read, tmp_path):
    ocr = COUNT | {"problem_type": "OCR", "solution": "<answer>STOP</answer>"}
    records = read(IMAGE, CHOICE, COUNT, IMAGE, ocr, ocr)
    kinds = [row["problem_type"] for record in records for row in record.rows]
    assert kinds == ["multiple choice", "numerical", "OCR", "OCR"]
    assert [record.left_out for record in records if record.left_out] == [{"image": 1}] * 2, "their type alone is read"
    (tmp_path / "STAR").mkdir()
    (tmp_path / "STAR" / "clip 1.mp4").touch()
    skipped = Skipped()
    rows = load_prompts(TOKENIZER, tmp_path / "train.json", skipped=skipped)
    assert [row["answer"] for row in rows] == ["B"]
    assert skipped.left_out == {"image": 2, "a question of kind 'numerical'": 1, "a question of kind 'OCR'": 2}


@pytest.mark.parametrize(
    ("record", "answer"),
    [
        (CHOICE | {"solution": "<answer>\n C. nothing </answer>"}, "C"),
        (CHOICE | {"solution": "A."}, "A"),
        (CHOICE | {"options": ["(A) yes", "(B) no"], "solution": "<answer>(B)</answer>"}, "B"),
        (COUNT, "1,200"),
        (COUNT | {"problem_type": "regression", "solution": "<answer>-2.5</answer>"}, "-2.5"),
        (COUNT | {"problem_type": "free-form", "solution": "<answer>He\nwaves.</answer>"}, "He\nwaves."),
    ],
)
def test_answers(read, record, answer):
    assert read(record)[0].rows[0]["answer"] == answer


def test_a_question_is_asked_with_its_options_and_the_form_of_the_answer(read, tmp_path, monkeypatch):
    read(CHOICE)
    (tmp_path / "STAR").mkdir()
    (tmp_path / "STAR" / "clip 1.mp4").touch()
    asked = []
    monkeypatch.setattr(prompts, "read_video", lambda *args, **fields: None)
    monkeypatch.setattr(prompts, "chat", lambda processor, video, question: asked.append(question))
    prompts.FilePrompts(None, TOKENIZER, tmp_path / "train.json").choice(0)
    lines = ["What does the child pick up?", *CHOICE["options"], ASKED["multiple choice"]]
    assert asked == ["\n".join(lines)]


def test_every_kind_has_its_prompt(read):
    texts = {}
    for kind in KINDS[1:]:
        (row,) = read(COUNT | {"problem_type": kind, "options": ["A. 1", "B. 2"]})[0].rows
        question, texts[kind] = ask(row, None).text.split("\n")
        assert question == "How many cubes collide?" and texts[kind]
    assert texts["numerical"] == texts["regression"] and len(set(texts.values())) == 3


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"problem": None}, "problem: expected str, got null"),
        ({"problem": " "}, "problem: expected a text that is not empty"),
        ({"solution": 3}, "solution: expected str, got int"),
        ({"path": ["a.mp4"]}, "path: expected str, got array"),
        ({"data_type": "audio"}, "data_type: invalid enum value 'audio', must be one of video, image"),
        (
            {"problem_type": "open"},
            "problem_type: invalid enum value 'open', must be one of multiple choice, numerical,",
        ),
        ({"options": "A. b"}, "options: expected array | null, got str"),
        ({"options": [1, 2]}, "options[0]: expected str, got int"),
        ({"options": ["A. yes", "no"]}, "options: each begins with its own letter, as 'A. …', 'B. …'; got"),
        ({"options": ["A. yes"]}, "options: options must be a list of two or more"),
        ({"options": ["A. yes", "A. no"]}, "each begins with its own letter"),
        ({"options": []}, "options is missing, and problem lists none"),
        ({"options": [], "problem": "Options:\nA. yes\nB. no"}, "problem lists none after a question"),
        ({"options": [], "problem": "Why? Options:\nA. yes\nno"}, "each begins with its own letter"),
        ({"solution": "<answer>D</answer>"}, "solution: must be one of the letters A, B, C, got 'D'"),
        ({"solution": "<answer>Apple</answer>"}, "must be one of the letters"),
        ({"solution": "<answer>B"}, "solution: must hold one <answer>…</answer>, got '<answer>B'"),
        ({"solution": "<answer>A</answer><answer>B</answer>"}, "must hold one"),
        ({"solution": "<answer> </answer>"}, "its answer is empty"),
        ({"problem_type": "numerical", "solution": "<answer>two</answer>"}, "solution: must be a number, got 'two'"),
        ({"problem_type": "regression", "solution": "<answer>nan</answer>"}, "must be a number"),
    ],
)
def test_malformed_records_are_named(read, change, fault):
    good, bad = read(CHOICE, CHOICE | change)
    assert good.rows and not bad.rows and bad.number == 2 and fault in bad.fault and len(bad.fault) < 200


@pytest.mark.parametrize("field", ["data_type", "solution", "path"])
def test_missing_fields_are_named(read, field):
    (record,) = read({key: value for key, value in CHOICE.items() if key != field})
    assert record.fault == f"missing field {field}"


def test_unreadable_files(tmp_path):
    path = tmp_path / "train.json"
    for content, message in [
        (None, "cannot read"),
        (b"\xff\xfe", "first record is not UTF-8"),
        (b"[{]", "breaks off after record 0"),
        (b"", "holds no records"),
        (b"[]", "holds no records"),
    ]:
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(TrainingError, match=message):
            list(read_records(path))
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(COUNT).encode() + b"\n{")
    good, bad = read_records(path)
    assert good.rows and bad.number == 2 and "is not JSON" in bad.fault
