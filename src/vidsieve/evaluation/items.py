"""One question of a benchmark, whatever file it came from."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from vidsieve.errors import EvaluationError
from vidsieve.options import LETTERS
from vidsieve.training.data.rows import ASKED, Kind


@dataclass(frozen=True)
class Item:
    """A question about a video.

    Parameters
    ----------
    id : str
        Unique within its benchmark.
    video : Path
    question : str
        Without options.
    options : tuple of str
        Without letters; empty unless `kind` is ``"multiple choice"``.
    answer : str
        What is to be said: the letter of the right option, or the answer as the file has it.
    groups : dict
        What tables are split by, such as ``{"duration": ("short",)}``; a question may be in several of one kind.
    kind : str
        How an answer is judged, one of `KINDS`.
    listed : bool
        Whether the prompt lists the options, to be answered by letter; else the answer is one of them, word for word.
    bracketed : bool
        Whether options are listed as "(A) …" instead of "A. …".
    fault : str
        Why the record cannot be asked; it counts as answered wrongly.
    """

    id: str
    video: Path
    question: str
    options: tuple[str, ...]
    answer: str
    groups: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    kind: Kind = "multiple choice"
    listed: bool = True
    bracketed: bool = False
    fault: str = ""

    @property
    def answers(self) -> tuple[str, ...]:
        """The possible answers, one for each option: its letter, or the option itself where none is listed."""
        return tuple(LETTERS[: len(self.options)]) if self.listed else self.options

    def prompt(self, closing: str | None = None) -> str:
        """Return the text to ask beside the video: question, options one a line, and the form of the answer."""
        if not self.listed:
            return self.question
        mark = "({}) {}" if self.bracketed else "{}. {}"
        lines = [mark.format(*pair) for pair in zip(LETTERS, self.options, strict=False)]
        return "\n".join([self.question, *lines, ASKED[self.kind] if closing is None else closing])


Average = Callable[[Sequence[Item], Sequence[float]], float]
"""A benchmark's own figure, from its items and their scores."""


def overall(items: Sequence[Item], scores: Sequence[float]) -> float:
    """Return the mean over questions."""
    return sum(scores) / len(scores)


def over_groups(name: str) -> Average:
    """Return the mean over the values of a group of each one's mean over questions."""

    def average(items: Sequence[Item], scores: Sequence[float]) -> float:
        by: dict[str, list[float]] = {}
        for item, score in zip(items, scores, strict=True):
            for value in item.groups[name]:
                by.setdefault(value, []).append(score)
        return sum(sum(values) / len(values) for values in by.values()) / len(by)

    return average


@dataclass(frozen=True)
class Benchmark:
    """A set of questions in the layout in which it is published.

    Parameters
    ----------
    name, title, paper : str
    read : callable
        Returns the items of a folder; raises `EvaluationError` where files are missing, doubled or malformed. Videos
        are looked for, not opened.
    questions, videos : int
        Published number; 0 if the set has no fixed size.
    closing : str
        What ends a prompt, after the options.
    figure : str
        What the benchmark reports, in words.
    average : callable
        That figure.
    """

    name: str
    title: str
    paper: str
    read: Callable[[Path], list[Item]]
    questions: int
    videos: int
    closing: str = ASKED["multiple choice"]
    figure: str = "mean over questions"
    average: Average = overall


def checked(items: Sequence[Item], where: Path) -> list[Item]:
    """Return items whose ids are their own and whose answers exist.

    Raises
    ------
    EvaluationError
        If not; the text counts what is wrong and names the first.
    """
    if not any(not item.fault for item in items):
        first = f": {items[0].id}: {items[0].fault}" if items else ": fetch it again"
        raise EvaluationError(f"{where} holds no questions that can be asked{first}")
    doubled = [name for name, times in Counter(item.id for item in items).items() if times > 1]
    if doubled:
        raise EvaluationError(
            f"{len(doubled)} questions of {where} are there more than once, first {doubled[0]!r}: fetch it again"
        )
    for item in items:
        if not item.fault and item.kind == "multiple choice" and item.answer not in item.answers:
            raise EvaluationError(
                f"question {item.id!r} of {where}: the answer {item.answer!r} is none of {', '.join(item.answers)}"
            )
    return list(items)


def check_videos(items: Sequence[Item]) -> None:
    """Refuse questions about videos that are not there.

    Raises
    ------
    EvaluationError
        The text counts them and names the first.
    """
    videos = {item.video for item in items if not item.fault}
    missing = sorted(str(video) for video in videos if not os.path.isfile(video))
    if missing:
        raise EvaluationError(
            f"{len(missing)} of {len(videos)} videos are missing, first {missing[0]}: put them there, or count their "
            "questions as failures with --allow-missing"
        )
