"""Functions of the task `vidsieve_testbed` of lmms-eval, whose answers are words."""

from __future__ import annotations

from pathlib import Path


def with_question(dataset):
    """Drop the captions, which are in the same file."""
    return dataset.filter(lambda row: row["question"] is not None)


def doc_to_visual(doc):
    return [str(Path(doc["video"]).resolve())]


def process_results(doc, results):
    return {"accuracy": float(results[0].split()[:1] == [doc["answer"]])}
