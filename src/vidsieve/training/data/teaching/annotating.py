"""Captions written anew by a teacher: rows in, the same rows with other captions out, and nothing lost on the way.

What was asked and answered is in a journal beside the output, so that a run that was stopped or killed goes on where
it was. The output is written when every row is accounted for: rewritten, set aside with a reason, or unchanged as it
has no caption.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vidsieve.errors import TrainingError
from vidsieve.io.files import writing
from vidsieve.training.data.teaching.asking import Server, TeacherSettings
from vidsieve.training.data.teaching.captions import Captions
from vidsieve.training.data.teaching.journal import AnnotationJournal
from vidsieve.training.data.teaching.teacher import Prices, Teacher, check_url


@dataclass(frozen=True)
class AnnotationPlan:
    """What is to be asked, at most: answers are mostly shorter than they may be, and equal rows are asked about once.

    `settled` rows were asked about in earlier runs; `faulty` ones cannot be asked about.
    """

    rows: int
    unchanged: int
    settled: int
    faulty: int
    requests: int
    images: int
    tokens_in: int
    tokens_out: int
    dollars: float | None


@dataclass(frozen=True)
class AnnotationReport:
    """What became of the rows, over all runs: ``rows == rewritten + unchanged + left + sum(aside.values())``.

    Parameters
    ----------
    aside : dict
        Rows set aside, by reason.
    left : int
        Rows that are still to be asked about; the output is written where there are none.
    requests, retries : int
        Retries are those that were not the first for their row, whichever run sent it.
    tokens_in, tokens_out, unmetered : int
        Tokens of all answers; those that told no number, `unmetered` of them, are counted at most.
    dollars : float or None
        None without prices.
    stopped : str
        Why rows are left: "interrupted", "budget", "limit".
    left_out : dict
        Parts of records that are no rows, by reason.
    """

    rows: int
    rewritten: int
    unchanged: int
    aside: dict[str, int]
    left: int
    requests: int
    retries: int
    tokens_in: int
    tokens_out: int
    unmetered: int
    dollars: float | None
    stopped: str
    left_out: dict[str, int]


def plan_file(
    source: Path,
    target: Path,
    teacher: Teacher,
    *,
    root: Path | None = None,
    prices: Prices | None = None,
    again: bool = False,
) -> AnnotationPlan:
    """Return what `annotate_file` would ask, without asking, writing or opening a video.

    Raises
    ------
    TrainingError
        As `annotate_file`.
    """
    captions = Captions(source, target, teacher, root)
    journal = captions.journal(again)
    journal.read()
    count: Counter[str] = Counter()
    for item in captions.items():
        count["rows"] += 1
        if item.reason:
            count["faulty"] += 1
        elif not item.key:
            count["unchanged"] += 1
        elif item.key in journal.places:
            count["settled"] += 1
        else:
            images = teacher.frames if "video" in item.row else 1
            if "frames" in item.row:
                images = min(teacher.frames, sum(times for _, times in item.row["frames"]))
            tokens_in, tokens_out = teacher.most_tokens(images, teacher.instruction(item.row["caption"]))
            count.update(requests=1, images=images, tokens_in=tokens_in, tokens_out=tokens_out)
    dollars = None if prices is None else prices.dollars(count["tokens_in"], count["tokens_out"])
    names = ("rows", "unchanged", "settled", "faulty", "requests", "images", "tokens_in", "tokens_out")
    return AnnotationPlan(**{name: count[name] for name in names}, dollars=dollars)


def annotate_file(
    source: Path,
    target: Path,
    teacher: Teacher,
    server: Server,
    *,
    root: Path | None = None,
    limit: int | None = None,
    again: bool = False,
    progress: Callable[[int], None] | None = None,
    note: Callable[[str], None] | None = None,
) -> AnnotationReport:
    """Have the captions of a file's rows written anew, and write the rows as JSON lines with paths from `target`.

    Parameters
    ----------
    source, root : Path
        As `read_records` takes them.
    target : Path
        Beside it are the journal and the list of rows set aside.
    teacher : Teacher
        A run goes on only with the same one.
    server : Server
    limit : int, optional
        Ask about so many rows in this run at most.
    again : bool
        Ask once more about rows that were set aside without an answer, as broken videos and refused requests.
    progress : callable, optional
        Called with the number of rows settled so far in this run.
    note : callable, optional
        Called with what a person should know at once.

    Raises
    ------
    TrainingError
        If the input is unreadable, the journal was begun with other settings, or the server answers nobody.
    OutputError
        If a file cannot be written.
    """
    check_url(server.url)
    if server.budget is not None and server.prices is None:
        raise TrainingError("a budget needs the prices of a million tokens, in and out")
    captions, stopped = Captions(source, target, teacher, root), ""

    def rows() -> Iterator[tuple[str, dict[str, Any]] | None]:
        nonlocal stopped
        count = 0
        for item in captions.waiting(journal):
            if item is not None and count == limit:
                stopped = "limit"
                return
            count += item is not None
            yield None if item is None else (item.key, item.shown)

    with captions.journal(again) as journal:
        asking = TeacherSettings(teacher, server, journal, rows(), progress, note)
        asking.run()
        report = _account(captions, journal, server.prices, asking.stopped or stopped)
        if not report.left:
            _write(captions, journal)
    return report


def _account(captions: Captions, journal: AnnotationJournal, prices: Prices | None, stopped: str) -> AnnotationReport:
    count, aside, left_out = Counter[str](), Counter[str](), Counter[str]()
    for _, outcome in captions.outcomes(journal, left_out):
        count["rows"] += 1
        count[next(iter(outcome)) if outcome else "left"] += 1
        if outcome and "aside" in outcome:
            aside[outcome["reason"]] += 1
    return AnnotationReport(
        count["rows"],
        count["done"],
        count["unchanged"],
        dict(aside),
        count["left"],
        journal.requests,
        journal.retries,
        journal.tokens_in,
        journal.tokens_out,
        journal.unmetered,
        None if prices is None else prices.dollars(journal.tokens_in, journal.tokens_out),
        stopped if count["left"] else "",
        dict(left_out),
    )


def _write(captions: Captions, journal: AnnotationJournal) -> None:
    """Write the rows, and those that were set aside, in the order of the input."""
    with (
        writing(captions.beside("aside")) as other,
        other.open("w", encoding="utf-8") as aside,
        writing(captions.target) as temporary,
        temporary.open("w", encoding="utf-8") as file,
    ):
        for item, outcome in captions.outcomes(journal):
            if outcome is None:
                raise TrainingError(f"{captions.source} or its videos changed meanwhile: run the same command again")
            if "aside" in outcome:
                why = {"record": item.number, "reason": outcome["reason"], "detail": outcome["detail"]}
                aside.write(_line(why | {"row": item.row}))
            elif "done" in outcome:
                new = {"caption": outcome["caption"], "original_caption": item.row["caption"]}
                file.write(_line(item.row | new | {"teacher": captions.teacher.model}))
            else:
                file.write(_line(item.row))


def _line(value: dict[str, Any]) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)  # columns of Parquet may be dates
    try:
        text.encode()
    except UnicodeEncodeError:  # half of a surrogate pair, which JSON can hold and UTF-8 cannot
        text = json.dumps(value, default=str)
    return text + "\n"
