"""Published folders, made up row by row: what is read, and what is said of files that are missing or wrong."""

from __future__ import annotations

import json

import pyarrow
import pyarrow.parquet
import pytest

from vidsieve import registry
from vidsieve.errors import EvaluationError
from vidsieve.evaluation.items import check_videos

MLVU_TASKS = ("1_plotQA", "2_needle", "3_ego", "4_count", "5_order", "6_anomaly_reco", "7_topic_reasoning")


def _write(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(value if isinstance(value, str) else json.dumps(value))
    return path


def _video(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"-")


def longvideobench(folder):
    row = {
        "video_id": "ab",
        "question": "What changes?",
        "candidates": ["a cup", "a hat", "a map", "a key", "a dog"],
        "correct_choice": 4,
        "question_category": "SSS",
        "id": "ab_0",
        "video_path": "ab.mp4",
        "duration_group": 600,
    }
    _write(folder / "lvb_val.json", [row, row | {"id": "ab_1", "correct_choice": 0, "candidates": ["x", "y"]}])
    _video(folder / "videos/ab.mp4")


def mlvu(folder):
    for task in MLVU_TASKS:
        row = {
            "video": f"{task}.mp4",
            "duration": 9.5,
            "question": " How many? \n",
            "candidates": ["1", "2", "2", "3"],
            "answer": "2",
            "question_type": "findNeedle",
        }
        _write(folder / f"json/{task}.json", [row] * (2 if task == "4_count" else 1))
        _video(folder / f"video/{task}/{task}.mp4")


def mlvu_test(folder):
    asked = {
        "video": "t.mp4",
        "duration": 88,
        "question": "What?",
        "candidates": list("uvwxyz"),
        "question_type": "ego",
        "question_id": "ER_0",
    }
    _write(folder / "test_multi_choice_tasks.json", [asked])
    _write(folder / "test-ground-truth/test_mcq_gt.json", [asked | {"answer": "z"}])
    _video(folder / "MLVU_Test/video/t.mp4")


def videomme(folder):
    row = {
        "video_id": "001",
        "duration": "short",
        "domain": "Knowledge",
        "sub_category": "Astronomy",
        "url": "u",
        "videoID": "-aB_",
        "question_id": "001-1",
        "task_type": "OCR Problems",
        "question": "What does it say?",
        "options": ["A. One.", "B. Two.", "C. Three.", "D. Four."],
        "answer": "C",
    }
    (folder / "videomme").mkdir(parents=True)
    rows = [row, row | {"question_id": "001-2", "answer": "A"}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "videomme/test-00000-of-00001.parquet")
    _video(folder / "data/-aB_.MP4")


def lvbench(folder):
    question = {
        "uid": "55",
        "question": "What is on the table?\n(A) a hat\n(B) a map\n(C) a key\n(D) a cup",
        "answer": "B",
        "question_type": ["entity recognition", "reasoning"],
        "time_reference": "01:02-01:40",
    }
    other = question | {"uid": "56", "question_type": ["reasoning"]}
    lines = [{"key": "k0", "type": "tv", "qa": [question]}, {"key": "k1", "type": "cartoon", "qa": [other]}]
    _write(folder / "video_info.meta.jsonl", "\n".join(json.dumps(line) for line in lines) + "\n")
    _video(folder / "all_videos/k0.mp4")
    _video(folder / "scripts/videos/00000/00000001.mp4")


MADE = {
    "longvideobench": longvideobench,
    "mlvu": mlvu,
    "mlvu-test": mlvu_test,
    "videomme": videomme,
    "lvbench": lvbench,
}


def read(name, folder):
    return registry.benchmarks.get(name).read(folder)


@pytest.mark.parametrize(
    ("name", "count", "answer", "prompt", "groups"),
    [
        (
            "longvideobench",
            2,
            "E",
            "What changes?\nA. a cup\nB. a hat\nC. a map\nD. a key\nE. a dog\n",
            {"duration": ("180–600 s",), "question": ("SSS",)},
        ),
        ("mlvu", 8, "C", "How many?\n(A) 1\n(B) 2\n(C) 2\n(D) 3\n", {"task": ("plotQA",)}),
        ("mlvu-test", 1, "F", "What?\n(A) u\n(B) v\n(C) w\n(D) x\n(E) y\n(F) z\n", {"task": ("ego",)}),
        (
            "videomme",
            2,
            "C",
            "What does it say?\nA. One.\nB. Two.\nC. Three.\nD. Four.\n",
            {"duration": ("short",), "domain": ("Knowledge",), "task": ("OCR Problems",)},
        ),
        (
            "lvbench",
            2,
            "B",
            "What is on the table?\n(A) a hat\n(B) a map\n(C) a key\n(D) a cup\n",
            {"question": ("entity recognition", "reasoning"), "video": ("tv",)},
        ),
    ],
)
def test_published_folders_are_read(tmp_path, name, count, answer, prompt, groups):
    MADE[name](tmp_path)
    items = read(name, tmp_path)
    benchmark = registry.benchmarks.get(name)
    assert len(items) == count and items[0].answer == answer and items[0].groups == groups
    assert items[0].prompt(benchmark.closing) == prompt + benchmark.closing
    assert len({item.id for item in items}) == count
    check_videos(items)


def test_mlvus_figure_is_the_mean_over_tasks(tmp_path):
    mlvu(tmp_path)
    items, benchmark = read("mlvu", tmp_path), registry.benchmarks.get("mlvu")
    scores = [float(item.groups["task"] == ("count",)) for item in items]
    assert benchmark.average(items, scores) == pytest.approx(1 / 7) and sum(scores) / len(scores) == 2 / 8


@pytest.mark.parametrize(
    ("name", "moved", "said"),
    [
        ("longvideobench", "lvb_val.json", "has no lvb_val.json; lvb_val2.json is there: was it renamed"),
        ("mlvu", "json/3_ego.json", "has no json/3_ego.json or MLVU/json/3_ego.json; json/3_ego2.json is there"),
        ("videomme", "videomme/test-00000-of-00001.parquet", "has no videomme/test-*.parquet"),
        ("lvbench", "video_info.meta.jsonl", "has no video_info.meta.jsonl"),
    ],
)
def test_a_renamed_file_is_named(tmp_path, name, moved, said):
    MADE[name](tmp_path)
    path = tmp_path / moved
    path.rename(path.with_name(f"{'x' * name.startswith('v')}{path.stem}2{path.suffix}"))
    with pytest.raises(EvaluationError) as error:
        read(name, tmp_path)
    assert said in str(error.value)


@pytest.mark.parametrize("name", MADE)
def test_a_missing_video_is_named(tmp_path, name):
    MADE[name](tmp_path)
    items = read(name, tmp_path)
    items[0].video.unlink()
    with pytest.raises(EvaluationError, match=f"1 of {len({i.video for i in items})} videos are missing, first .*mp4"):
        check_videos(read(name, tmp_path))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"correct_choice": 5}, "correct_choice of .* is 5, with 5 candidates"),
        ({"correct_choice": True}, "row 1 of .*lvb_val.json: Expected `int`, got `bool` - at `.*correct_choice`"),
        ({"correct_choice": "E"}, "Expected `int`, got `str`"),
        ({"candidates": ["one"]}, "Expected `array` of length >= 2 - at `.*candidates`"),
        ({"question": "  "}, "Expected `str` of length >= 1 - at `.*question`"),
        ({"id": "ab_1"}, "'ab_1'"),
        ({"id": None}, "Expected `str`, got `null`"),
    ],
)
def test_wrong_rows_are_named(tmp_path, change, said):
    longvideobench(tmp_path)
    path = tmp_path / "lvb_val.json"
    rows = json.loads(path.read_text())
    _write(path, [rows[0] | change, rows[1]])
    with pytest.raises(EvaluationError, match=said):
        read("longvideobench", tmp_path)


def test_two_files_for_one_thing_are_refused(tmp_path):
    mlvu_test(tmp_path)
    _write(tmp_path / "MLVU_Test/test_question.json", [])
    with pytest.raises(EvaluationError, match="of which one is expected"):
        read("mlvu-test", tmp_path)
    videomme(tmp_path / "v")
    _video(tmp_path / "v/data/-aB_.mkv")
    with pytest.raises(EvaluationError, match="may both be the video '-aB_'"):
        read("videomme", tmp_path / "v")


def test_answers_outside_the_options_and_broken_files_are_refused(tmp_path):
    mlvu(tmp_path)
    path = tmp_path / "json/5_order.json"
    row = json.loads(path.read_text())[0]
    _write(path, [row | {"answer": "four"}])
    with pytest.raises(EvaluationError, match=r"the answer 'four' of question '5_order/0' is none of"):
        read("mlvu", tmp_path)
    _write(path, "[{]")
    with pytest.raises(EvaluationError, match=r"cannot read .*5_order.json"):
        read("mlvu", tmp_path)
    lvbench(tmp_path / "l")
    text = (tmp_path / "l/video_info.meta.jsonl").read_text()
    _write(tmp_path / "l/video_info.meta.jsonl", text.replace('"answer": "B"', '"answer": "E"', 1))
    with pytest.raises(EvaluationError, match=r"'55' of .* the answer 'E' is none of A, B, C, D"):
        read("lvbench", tmp_path / "l")
    _write(tmp_path / "l/video_info.meta.jsonl", text.replace("(B) a map", "B a map", 1))
    with pytest.raises(EvaluationError, match="lists no options"):
        read("lvbench", tmp_path / "l")
    with pytest.raises(EvaluationError, match="is not a folder"):
        read("videomme", tmp_path / "none")


def test_malformed_records_of_a_file_of_questions_are_items_with_their_faults(tmp_path):
    good = {"video": "a.mp4", "question": "Colour?", "options": ["red", "blue"], "answer": "blue"}
    bad = [good | {"question": " "}, good | {"answer": "pink"}, {"video": 3}, good | {"options": ["red", "Red"]}]
    path = _write(tmp_path / "q.jsonl", "\n".join([json.dumps(good), *map(json.dumps, bad), "{no", json.dumps(good)]))
    items = read("questions", path)
    assert [item.id for item in items] == ["1", *(f"record {n}" for n in range(2, 7)), "7"]
    assert [bool(item.fault) for item in items] == [False, *[True] * 5, False]
    assert "question: expected a text that is not empty" in items[1].fault and "is not JSON" in items[5].fault
    with pytest.raises(EvaluationError, match="no questions that can be asked: record 1: question: expected a text"):
        read("questions", _write(tmp_path / "bad.jsonl", json.dumps(bad[0])))


def test_questions_of_a_file(tmp_path):
    rows = [
        {"video": "a.mp4", "question": "Which?", "options": ["A. one", "B. two"], "answer": "two"},
        {"video": "a.mp4", "question": "Colour?", "options": ["red", "blue"], "answer": "blue"},
        {"video": "a.mp4", "question": "How many?", "answer": "3", "problem_type": "numerical"},
        {"video": "a.mp4", "caption": "a cat"},
    ]
    path = _write(tmp_path / "q.jsonl", "\n".join(json.dumps(row) for row in rows))
    first, second, third = read("questions", path)
    assert (first.answer, first.prompt("!")) == ("B", "Which?\nA. one\nB. two\n!")
    assert (second.answer, second.prompt("!"), second.answers) == ("blue", "Colour?", ("red", "blue"))
    assert (third.answer, third.kind, third.options) == ("3", "numerical", ())
