"""MLVU's multiple-choice tasks: the seven of its development set, and the nine of its test set."""

from __future__ import annotations

from pathlib import Path

import msgspec

from vidsieve.errors import EvaluationError
from vidsieve.evaluation.benchmarks._layout import Options, Text, Videos, letter_of, one_file, one_folder, rows_of
from vidsieve.evaluation.items import Benchmark, Item, checked, over_groups

_TASKS = ("1_plotQA", "2_needle", "3_ego", "4_count", "5_order", "6_anomaly_reco", "7_topic_reasoning")
_CLOSING = "Only give the best option.\nBest option: ("
_FIGURE = "M-Avg: mean over tasks of the mean over questions"


class MLVUQuestion(msgspec.Struct):
    """A question of the development set."""

    video: Text
    question: Text
    candidates: Options
    answer: Text


class MLVUTestQuestion(msgspec.Struct):
    """A question of the test set, without its answer."""

    question_id: Text
    video: Text
    question: Text
    candidates: Options
    question_type: Text


class MLVUTestAnswer(msgspec.Struct):
    """An answer of the test set."""

    question_id: Text
    answer: Text


def read_dev(folder: Path) -> list[Item]:
    """Return the questions of a folder of MLVU/MVLU: ``json/1_plotQA.json`` … and ``video/1_plotQA/`` ….

    Rows have no ids: a question is known by its file and number.

    Raises
    ------
    EvaluationError
    """
    items = []
    for task in _TASKS:
        path = one_file(folder, f"json/{task}.json", f"MLVU/json/{task}.json")
        short = task.partition("_")[2]
        videos = Videos(one_folder(path.parent.parent / "video", task, short))
        for number, row in enumerate(rows_of(path, MLVUQuestion)):
            items.append(_item(f"{task}/{number}", row, row.answer, videos, short))
    return checked(items, folder)


def read_test(folder: Path) -> list[Item]:
    """Return the multiple-choice questions of a folder of MLVU/MLVU_Test, with its answers and videos.

    Raises
    ------
    EvaluationError
    """
    path = one_file(folder, "test_multi_choice_tasks.json", "MLVU_Test/test_question.json")
    key = one_file(folder, "test-ground-truth/test_mcq_gt.json", "test_mcq_gt.json")
    answers = {row.question_id: row.answer for row in rows_of(key, MLVUTestAnswer)}
    videos = Videos(one_folder(folder, "MLVU_Test/video", "video"))
    items = []
    for row in rows_of(path, MLVUTestQuestion):
        if row.question_id not in answers:
            raise EvaluationError(f"question {row.question_id!r} of {path} has no answer in {key}: fetch both again")
        items.append(_item(row.question_id, row, answers[row.question_id], videos, row.question_type))
    return checked(items, path)


def _item(name: str, row: MLVUQuestion | MLVUTestQuestion, answer: str, videos: Videos, task: str) -> Item:
    letter = letter_of(answer, row.candidates, name)
    groups = {"task": (task,)}
    return Item(name, videos.find(row.video), row.question, row.candidates, letter, groups, bracketed=True)


_PAPER = "Zhou et al., CVPR 2025, arXiv 2406.04264"
MLVU = Benchmark(
    "mlvu",
    "MLVU (development, multiple choice)",
    _PAPER,
    read_dev,
    2174,
    1122,
    _CLOSING,
    _FIGURE,
    over_groups("task"),
)
MLVU_TEST = Benchmark(
    "mlvu-test", "MLVU (test, multiple choice)", _PAPER, read_test, 502, 349, _CLOSING, _FIGURE, over_groups("task")
)
