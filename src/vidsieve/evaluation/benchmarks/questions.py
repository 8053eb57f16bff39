"""Questions of any file: Video-R1's JSON, or JSON lines as training takes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

from vidsieve.errors import EvaluationError, TrainingError
from vidsieve.evaluation.items import Benchmark, Item, checked
from vidsieve.training.data.layouts import files_of, read_records
from vidsieve.training.data.rows import Kind, kind_of, labelled, options_of


def read(path: Path) -> list[Item]:
    """Return the questions of a file, each known by its number from 1; captions in it are passed over.

    Options that begin with letters are listed in the prompt; of others each is an answer, word for word. A record that
    is malformed is an item too, with its fault: it counts as answered wrongly.

    Raises
    ------
    EvaluationError
    """
    items: list[Item] = []
    try:
        for record in read_records(path):
            if record.fault:
                where = path.parent / f"record {record.number}"
                items.append(Item(f"record {record.number}", where, "", (), "", fault=record.fault))
            items += [_item(row, str(len(items) + 1), path.parent) for row in record.rows if "question" in row]
    except TrainingError as error:
        raise EvaluationError(str(error)) from None
    return checked(items, path)


def _item(row: dict[str, Any], name: str, folder: Path) -> Item:
    kind, video = cast(Kind, kind_of(row)), folder / files_of(row)[0]
    if "video" not in row:
        return Item(
            name, video, str(row["question"]), (), "", fault="video: is missing, still images are not asked about"
        )
    if not labelled(row):
        return Item(name, video, str(row["question"]), (), "", fault="answer: is missing")
    groups = {"kind": (str(row.get("group", kind)),)}
    if kind != "multiple choice":
        return Item(name, video, str(row["question"]), (), str(row["answer"]), groups, kind)
    options = options_of(row)
    answer = (options.letters if options.lettered else options.texts)[options.index(str(row["answer"]))]
    return Item(name, video, str(row["question"]), options.texts, answer, groups, listed=options.lettered)


QUESTIONS = Benchmark("questions", "Questions of a file", "Video-R1, arXiv 2503.21776", read, 0, 0)
