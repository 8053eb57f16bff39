"""Questions of Video-R1's form: both layouts, what is left out, and what a malformed file is told."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from types import SimpleNamespace

import pytest

from vidsieve.errors import TrainingError, UnknownNameError
from vidsieve.training.data import prompts
from vidsieve.training.data.video_r1 import KINDS, VideoR1Record, read_video_r1

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
IMAGE = COUNT | {"data_type": "image", "path": "./Math/a.png"}
RELEASE = {
    "modality_type": "video",
    "problem_type": "multiple choice",
    "solution": "<answer>B</answer>",
    "problem": "What does the child pick up? Options:\nA. a red ball\nB. a spoon\nC. nothing\n",
    "video": "STAR/clip 1.mp4",
}


@pytest.fixture
def write(tmp_path):
    def written(*records, lines=False, name="train.json"):
        text = "\n\n".join(map(json.dumps, records)) if lines else json.dumps(records, indent=1)
        (tmp_path / name).write_text(text, encoding="utf-8")
        return tmp_path / name

    return written


@pytest.mark.parametrize("lines", [False, True])
def test_a_record_in_both_layouts(write, tmp_path, lines):
    """The answer without its tags, options apart from the question, the path from the file's folder."""
    ours, theirs = read_video_r1(write(CHOICE, RELEASE, lines=lines))
    assert ours == VideoR1Record(
        "What does the child pick up?",
        ("A. a red ball", "B. a spoon", "C. nothing"),
        "B",
        "multiple choice",
        tmp_path / "STAR" / "clip 1.mp4",
        "STAR",
    )
    assert (theirs.question, theirs.options, theirs.answer) == (ours.question, ours.options, ours.answer)
    assert (theirs.video, theirs.source) == (ours.video, "")


def test_paths_start_from_the_root(write, tmp_path):
    path = write(CHOICE, CHOICE | {"path": "/data/x.mp4"})
    assert [r.video for r in read_video_r1(path, "/videos")] == [Path("/videos/STAR/clip 1.mp4"), Path("/data/x.mp4")]
    (tmp_path / "bom.json").write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert len(read_video_r1(tmp_path / "bom.json")) == 2


def test_images_and_other_kinds_are_counted(write):
    ocr = COUNT | {"problem_type": "OCR", "solution": "<answer>STOP</answer>"}
    path = write(IMAGE, CHOICE, COUNT, IMAGE, ocr, ocr)
    everything = read_video_r1(path)
    assert [record.kind for record in everything] == ["multiple choice", "numerical", "OCR", "OCR"]
    assert everything.skipped == {"image": 2}
    for kinds in ("multiple choice", ["multiple choice"]):
        some = read_video_r1(path, kinds=kinds)
        assert [record.answer for record in some] == ["B"]
        assert some.skipped == {"image": 2, "numerical": 1, "OCR": 2}
    assert pickle.loads(pickle.dumps(some)).skipped == copy.copy(some).skipped == some.skipped
    with pytest.raises(UnknownNameError, match="unknown kind of question 'ocr'"):
        read_video_r1(path, kinds={"ocr"})


def test_only_the_type_of_what_is_left_out_is_checked(write):
    path = write(IMAGE | {"solution": 5}, COUNT | {"solution": "many"}, CHOICE)
    assert len(read_video_r1(path, kinds="multiple choice")) == 1
    with pytest.raises(TrainingError, match=r"1 of 3 records .* record 2: solution is 'many'"):
        read_video_r1(path)


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
def test_answers(write, record, answer):
    assert read_video_r1(write(record))[0].answer == answer


def test_prompts_are_those_of_a_file_of_prompts(write, tmp_path, monkeypatch):
    """A question with options is asked word for word as `data/prompts.py` asks it."""
    (record,) = read_video_r1(write(CHOICE))
    (tmp_path / "STAR").mkdir()
    record.video.touch()
    row = {"video": "STAR/clip 1.mp4", "question": record.question, "options": record.options, "answer": record.answer}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    asked = []
    monkeypatch.setattr(prompts, "read_video", lambda *args, **fields: None)
    monkeypatch.setattr(prompts, "chat", lambda processor, video, question: asked.append(question))
    processor = SimpleNamespace(tokenizer=lambda word, **_: {"input_ids": [ord(word)]})
    prompts.FilePrompts(None, processor, tmp_path / "rows.jsonl").choice(0)
    assert asked == [record.prompt()]


def test_every_kind_has_its_prompt(write):
    texts = {}
    for kind in KINDS[1:]:
        (record,) = read_video_r1(write(COUNT | {"problem_type": kind, "options": ["A. 1", "B. 2"]}))
        texts[kind] = record.prompt()
        question, asked = texts[kind].split("\n")
        assert question == "How many cubes collide?" and asked
    assert texts["numerical"] == texts["regression"] and len(set(texts.values())) == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"problem": None}, "problem is None, must be a text"),
        ({"problem": " "}, "problem is ' ', must be a text"),
        ({"solution": 3}, "solution is 3, must be a text"),
        ({"path": ["a.mp4"]}, r"path is \['a\.mp4'\], must be a text"),
        ({"data_type": "audio"}, "data_type or modality_type is 'audio', must be 'video' or 'image'"),
        ({"problem_type": "open"}, "problem_type is 'open', must be one of multiple choice, numerical, OCR, free"),
        ({"options": "A. b"}, r"options is 'A\. b', must be a list of texts"),
        ({"options": [1, 2]}, r"options is \[1, 2\], must be a list of texts"),
        ({"options": ["A. yes", "no"]}, r"options has .*: each begins with its own letter, as 'A\. …'"),
        ({"options": ["A. yes"]}, r"options has \['A\. yes'\]: options must be a list of two or more"),
        ({"options": ["A. yes", "A. no"]}, "each begins with its own letter"),
        ({"options": []}, "options is missing, and problem lists none"),
        ({"options": [], "problem": "Options:\nA. yes\nB. no"}, "problem lists none after a question"),
        ({"options": [], "problem": "Why? Options:\nA. yes\nno"}, "problem has .*: each begins with its own letter"),
        ({"solution": "<answer>D</answer>"}, "solution is 'D', must be one of the options' letters A, B, C"),
        ({"solution": "<answer>Apple</answer>"}, "solution is 'Apple', must be one of"),
        ({"solution": "<answer>B"}, "solution is '<answer>B', must hold one <answer>…</answer>"),
        ({"solution": "<answer>A</answer><answer>B</answer>"}, "must hold one"),
        ({"solution": "<answer> </answer>"}, "its answer is empty"),
        ({"problem_type": "numerical", "solution": "<answer>two</answer>"}, "must be a number for problem_type 'num"),
        (
            {"problem_type": "regression", "solution": "<answer>nan</answer>"},
            "must be a number for problem_type 'regress",
        ),
        ({"options": "x" * 200}, "options is 'x{78}…, must be a list"),
    ],
)
def test_malformed_records_are_named(write, change, message):
    with pytest.raises(TrainingError, match=rf"1 of 2 records in .*, correct or remove: record 2: .*{message}"):
        read_video_r1(write(CHOICE, CHOICE | change))


@pytest.mark.parametrize(
    ("field", "said"),
    [
        ("problem", "problem"),
        ("data_type", "data_type or modality_type"),
        ("problem_type", "problem_type"),
        ("solution", "solution"),
        ("path", "path or video"),
    ],
)
def test_missing_fields_are_named(write, field, said):
    with pytest.raises(TrainingError, match=f"record 1: {said} is missing"):
        read_video_r1(write({key: value for key, value in CHOICE.items() if key != field}))


def test_several_malformed_records(write):
    bad = COUNT | {"solution": "?"}
    with pytest.raises(TrainingError, match=r"5 of 6 records .*record 2: is list, .*record 3: .*record 4: [^;]*; …$"):
        read_video_r1(write(COUNT, [], bad, bad, bad, bad))


def test_unreadable_files(tmp_path):
    path = tmp_path / "train.json"
    with pytest.raises(TrainingError, match="cannot read"):
        read_video_r1(path)
    for content, message in [
        (b"\xff\xfe", "record 1: is not UTF-8"),
        (b"[{]", "is not JSON in record 1"),
        (b"", "holds no records"),
        (b"[]", "holds no records"),
        (json.dumps(COUNT).encode() + b"\n{", "record 2: is not JSON"),
    ]:
        path.write_bytes(content)
        with pytest.raises(TrainingError, match=message):
            read_video_r1(path)
