"""What the task `vidsieve_testbed` of lmms-eval is made of; its answers are words, and it judges them by itself."""

from __future__ import annotations

from pathlib import Path


def with_question(dataset):
    """Leave out captions, which the same file holds."""
    return dataset.filter(lambda row: row["question"] is not None)


def doc_to_visual(doc):
    return [str(Path(doc["video"]).resolve())]


def process_results(doc, results):
    return {"accuracy": float(results[0].split()[:1] == [doc["answer"]])}
