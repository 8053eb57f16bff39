"""Questions of any file: Video-R1's JSON, or JSON lines as training takes them."""

from __future__ import annotations

from pathlib import Path
from typing import cast

from vidsieve.data.layouts import read_all
from vidsieve.data.rows import kind_of, options_of
from vidsieve.data.video_r1 import Kind
from vidsieve.errors import EvaluationError, TrainingError
from vidsieve.eval.items import Benchmark, Item, checked


def read(path: Path) -> list[Item]:
    """Return the questions of a file, each known by its number from 1; captions in it are passed over.

    Options that begin with letters are listed in the prompt; of others each is an answer, word for word.

    Raises
    ------
    EvaluationError
    """
    try:
        rows = read_all(path)
    except TrainingError as error:
        raise EvaluationError(str(error)) from None
    items = []
    for number, row in enumerate((row for row in rows if "question" in row), 1):
        name, kind = f"{number}", cast(Kind, kind_of(row))
        video = path.parent / row["video"]
        groups = {"kind": (str(row.get("group", kind)),)}
        if kind != "multiple choice":
            items.append(Item(name, video, str(row["question"]), (), str(row["answer"]), groups, kind))
            continue
        options = options_of(row)
        right = options.index(str(row["answer"]))
        answer = (options.letters if options.lettered else options.texts)[right]
        items.append(Item(name, video, str(row["question"]), options.texts, answer, groups, listed=options.lettered))
    return checked(items, path)


QUESTIONS = Benchmark(
    "questions", "questions of a file (Video-R1's JSON, or JSON lines)", "Video-R1, arXiv 2503.21776", read, 0, 0
)
