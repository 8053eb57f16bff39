"""MLVU's multiple-choice tasks: the seven of its development set, and the nine of its test set."""

from __future__ import annotations

from pathlib import Path

from vidsieve.errors import EvaluationError
from vidsieve.evaluation.benchmarks._layout import Videos, one_file, one_folder, read_json, rows_of
from vidsieve.evaluation.items import Benchmark, Item, checked, over_groups

_TASKS = (
    "1_plotQA",
    "2_needle",
    "3_ego",
    "4_count",
    "5_order",
    "6_anomaly_reco",
    "7_topic_reasoning",
)
_CLOSING = "Only give the best option.\nBest option: ("
_FIGURE = "M-Avg: mean over tasks of the mean over questions"


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
        home = path.parent.parent / "video"
        videos = Videos(one_folder(home, task, task.partition("_")[2]))
        for number, row in enumerate(rows_of(path, read_json(path))):
            options = row.texts("candidates")
            answer = row.letter("answer", options)
            items.append(
                Item(
                    f"{task}/{number}",
                    videos.find(row.text("video")),
                    row.text("question"),
                    options,
                    answer,
                    {"task": (task.partition("_")[2],)},
                    bracketed=True,
                )
            )
    return checked(items, folder)


def read_test(folder: Path) -> list[Item]:
    """Return the multiple-choice questions of a folder of MLVU/MLVU_Test, with its answers and videos.

    Raises
    ------
    EvaluationError
    """
    asked = one_file(folder, "test_multi_choice_tasks.json", "MLVU_Test/test_question.json")
    key = one_file(folder, "test-ground-truth/test_mcq_gt.json", "test_mcq_gt.json")
    answers = {row.text("question_id"): row for row in rows_of(key, read_json(key))}
    videos = Videos(one_folder(folder, "MLVU_Test/video", "video"))
    items = []
    for row in rows_of(asked, read_json(asked)):
        name = row.text("question_id")
        if name not in answers:
            raise EvaluationError(f"question {name!r} of {asked} has no answer in {key}: fetch both again")
        options = row.texts("candidates")
        items.append(
            Item(
                name,
                videos.find(row.text("video")),
                row.text("question"),
                options,
                answers[name].letter("answer", options),
                {"task": (row.text("question_type"),)},
                bracketed=True,
            )
        )
    return checked(items, asked)


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
