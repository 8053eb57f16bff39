"""Questions on videos from Video-R1-260k, and from the subset on which CaCoVID was trained.

Two layouts of one record are read, each from a JSON list or from JSON lines:

====================  =========================================  ======================================
what                  Video-R1 (``Video-R1-260k.json``)          the release of CaCoVID
====================  =========================================  ======================================
video or image        ``data_type``                              ``modality_type``
file                  ``path``                                   ``video``
question              ``problem``                                ``problem``
options               ``options``, as "A. …"                     in ``problem``, after "Options:", one a line
answer                ``solution``: ``<answer>…</answer>``       the same
kind of question      ``problem_type``                           the same
====================  =========================================  ======================================

References
----------
Video-R1 (arXiv 2503.21776), data set Video-R1/Video-R1-data; CaCoVID's `grpo_video.py`, LivingFutureLab/CaCoVID @
384752da, which names the fields it reads. The file itself was not at hand: that its options stand inside ``problem``
is inferred from its code, which reads no other field, and from a public conversion of Video-R1 with the same fields.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from vidsieve.errors import TrainingError, UnknownNameError
from vidsieve.options import Options, OptionsError, said_letter
from vidsieve.training.data.layouts import Layout
from vidsieve.training.data.reading import MalformedError, raw_records

Kind = Literal["multiple choice", "numerical", "OCR", "free-form", "regression"]
KINDS: tuple[Kind, ...] = get_args(Kind)

ASKED: dict[Kind, str] = {
    "multiple choice": "Answer with the option's letter from the given choices directly.",
    "numerical": "Answer with a number only.",
    "regression": "Answer with a number only.",
    "OCR": "Answer with the text to be read only.",
    "free-form": "Answer in words.",
}
"""What closes a prompt, by kind of question; rows of any file are asked alike."""
_TAGGED = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)


@dataclass(frozen=True)
class VideoR1Record:
    """One question on one video.

    Parameters
    ----------
    question : str
        Without its options.
    options : tuple of str
        Lettered ("A. a dog"); empty unless `kind` is ``"multiple choice"``.
    answer : str
        The letter of the right option, or the text of the answer; numbers as they are written ("1,200").
    kind : str
        ``"multiple choice"``, ``"numerical"``, ``"OCR"``, ``"free-form"`` or ``"regression"``: how an answer is judged.
    video : Path
    source : str
        The data set it was taken from, where the file says so.
    """

    question: str
    options: tuple[str, ...]
    answer: str
    kind: Kind
    video: Path
    source: str = ""

    def prompt(self) -> str:
        """Return the text to ask beside the video: the question, its options one a line, the form of the answer."""
        return "\n".join([self.question, *self.options, ASKED[self.kind]])


class VideoR1Records(list[VideoR1Record]):
    """The records of a file, in its order.

    Attributes
    ----------
    skipped : dict
        How many records were left out, by reason: ``"image"`` or the kind of question.
    """

    def __init__(self, records: Iterable[VideoR1Record], skipped: dict[str, int]) -> None:
        super().__init__(records)
        self.skipped = skipped


def read_video_r1(
    path: str | Path, root: str | Path | None = None, *, kinds: Kind | Collection[Kind] | None = None
) -> VideoR1Records:
    """Return the questions on videos in a file of Video-R1's form; `skipped` counts the others.

    Parameters
    ----------
    path : str or Path
        A JSON list, or JSON lines, as ``Video-R1-llava_onevision_filtered.json``.
    root : str or Path, optional
        The folder that the records' paths start from; default: the folder of the file. Videos are not opened here.
    kinds : str or collection of str, optional
        Kinds of question to keep; default: all. Of a record that is left out nothing but its type is checked.

    Raises
    ------
    TrainingError
        If the file is unreadable, or records are malformed: the text counts them and names the first ones, by their
        number from 1, with the field.
    UnknownNameError
        If `kinds` names an unknown kind.
    """
    path = Path(path)
    folder = path.parent if root is None else Path(root)
    wanted = {kinds} if isinstance(kinds, str) else set(KINDS if kinds is None else kinds)
    for kind in sorted(wanted - set(KINDS)):
        raise UnknownNameError("kind of question", kind, KINDS)
    records: list[VideoR1Record] = []
    skipped: Counter[str] = Counter()
    wrong: list[str] = []
    count = 0
    for number, entry in raw_records(path):
        count += 1
        try:
            if isinstance(entry, MalformedError):
                raise entry
            reason = _left_out(entry, wanted)
            if reason is None:
                records.append(_record(entry, folder))
            else:
                skipped[reason] += 1
        except MalformedError as error:
            wrong.append(f"record {number}: {error}")
    if not count:
        raise TrainingError(f"{path} holds no records; fetch it again")
    if wrong:
        first = "; ".join(wrong[:3]) + ("; …" if len(wrong) > 3 else "")
        raise TrainingError(f"{len(wrong)} of {count} records in {path} are malformed, correct or remove: {first}")
    return VideoR1Records(records, dict(skipped))


def _left_out(entry: Any, wanted: set[Any]) -> str | None:
    """Return why a record is not for us, or None if it is."""
    if not isinstance(entry, dict):
        raise MalformedError(f"is {type(entry).__name__}, not an object with fields")
    medium = _text(entry, "data_type", "modality_type")
    if medium not in ("video", "image"):
        raise MalformedError(f"data_type or modality_type is {_short(medium)}, must be 'video' or 'image'")
    kind = _text(entry, "problem_type")
    if kind not in KINDS:
        raise MalformedError(f"problem_type is {_short(kind)}, must be one of {', '.join(KINDS)}")
    if medium == "image":
        return medium
    return None if kind in wanted else kind


def _record(entry: dict[str, Any], folder: Path) -> VideoR1Record:
    kind: Kind = entry["problem_type"]
    question, options = _text(entry, "problem"), _options(entry) if kind == "multiple choice" else ()
    if kind == "multiple choice" and not options:
        question, options = _inside(question)
    source = entry.get("data_source")
    return VideoR1Record(
        question.strip(),
        options,
        _answer(_text(entry, "solution"), kind, options),
        kind,
        folder / _text(entry, "path", "video"),
        source if isinstance(source, str) else "",
    )


def _text(entry: dict[str, Any], *names: str) -> str:
    """Return the first of the fields `names` that is there."""
    name = next((name for name in names if name in entry), None)
    if name is None:
        raise MalformedError(f"{' or '.join(names)} is missing")
    value = entry[name]
    if not isinstance(value, str) or not value.strip():
        raise MalformedError(f"{name} is {_short(value)}, must be a text")
    return value


def _options(entry: dict[str, Any]) -> tuple[str, ...]:
    options = entry.get("options") or []
    if not isinstance(options, list) or not all(isinstance(option, str) for option in options):
        raise MalformedError(f"options is {_short(options)}, must be a list of texts")
    return _lettered([option.strip() for option in options], "options")


def _inside(problem: str) -> tuple[str, tuple[str, ...]]:
    """Return question and options of a text that holds both."""
    question, mark, rest = problem.rpartition("Options:")
    options = [line.strip() for line in rest.splitlines() if line.strip()]
    if not mark or not question.strip() or not options:
        raise MalformedError("options is missing, and problem lists none after a question and 'Options:'")
    return question, _lettered(options, "problem")


def _lettered(options: list[str], field: str) -> tuple[str, ...]:
    if options:
        try:
            lettered = Options.parse(options).lettered
        except OptionsError as error:
            raise MalformedError(f"{field} has {_short(options)}: {error}") from None
        if not lettered:
            raise MalformedError(f"{field} has {_short(options)}: each begins with its own letter, as 'A. …', 'B. …'")
    return tuple(options)


def _answer(solution: str, kind: Kind, options: tuple[str, ...]) -> str:
    """Return the answer in a solution, checked to be one that an answer can equal."""
    tagged = _TAGGED.findall(solution)
    if len(tagged) > 1 or (not tagged and "answer>" in solution):
        raise MalformedError(f"solution is {_short(solution)}, must hold one <answer>…</answer>")
    answer = (tagged[0] if tagged else solution).strip()
    if not answer:
        raise MalformedError(f"solution is {_short(solution)}, its answer is empty")
    if kind == "multiple choice":
        parsed = Options.parse(options)
        if said_letter(answer) not in parsed.letters:
            raise MalformedError(
                f"solution is {_short(answer)}, must be one of the options' letters {', '.join(parsed.letters)}"
            )
        return said_letter(answer)
    if kind in ("numerical", "regression") and not _is_number(answer):
        raise MalformedError(f"solution is {_short(answer)}, must be a number for problem_type {kind!r}")
    return answer


def _short(value: object) -> str:
    said = repr(value)
    return said if len(said) <= 80 else f"{said[:79]}…"


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text.replace(",", "")))
    except ValueError:
        return False


def _matches(record: Any) -> bool:
    return isinstance(record, dict) and {"problem", "problem_type"} <= record.keys()


def _rows(record: Any, folder: Path, file: Path) -> tuple[list[dict[str, Any]], dict[str, int]]:
    reason = _left_out(record, set(KINDS))
    if reason is not None:
        return [], {reason: 1}
    found = _record(record, folder)
    row: dict[str, Any] = {"video": str(found.video), "question": found.question, "options": list(found.options)}
    row |= {"answer": found.answer, "problem_type": found.kind} | ({"source": found.source} if found.source else {})
    return [row], {}


LAYOUT = Layout("video-r1", "Video-R1-260k", _matches, _rows)
