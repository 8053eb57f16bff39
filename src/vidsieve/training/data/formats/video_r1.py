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
from pathlib import Path
from typing import Any, Literal

import msgspec

from vidsieve.options import Options, OptionsError, said_letter
from vidsieve.training.data.layouts import Layout, Name, Rows, Text, Words, checked
from vidsieve.training.data.reading import MalformedError
from vidsieve.training.data.rows import Kind

_RELEASE = {"modality_type": "data_type", "video": "path"}
"""Field of CaCoVID's release: the same one of Video-R1."""
_TAGGED = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)


class _Type(msgspec.Struct):
    data_type: Literal["video", "image"]
    problem_type: Kind


class _Question(_Type):
    problem: Text
    solution: Text
    path: Name
    data_source: Any = None


class _Choice(_Question):
    options: list[Words] | None = None


def _matches(record: dict[str, Any]) -> bool:
    return {"problem", "problem_type"} <= record.keys()


def _rows(record: Any, folder: Path, file: Path) -> Rows:
    if isinstance(record, dict):
        record = {_RELEASE[name]: value for name, value in record.items() if name in _RELEASE} | record
    if checked(record, _Type).data_type == "image":
        return [], {"image": 1}
    fields = checked(record, _Question)
    question, options = fields.problem, list[str]()
    if fields.problem_type == "multiple choice":
        options = [option.strip() for option in checked(record, _Choice).options or []]
        if not options:
            question, options = _inside(question)
    row: dict[str, Any] = {"video": str(folder / fields.path), "question": question.strip(), "options": options}
    row |= {"answer": _answer(fields, options), "problem_type": fields.problem_type}
    source = fields.data_source
    return [row | ({"source": source} if isinstance(source, str) and source else {})], {}


def _inside(problem: str) -> tuple[str, list[str]]:
    """Return question and options of a text that holds both."""
    question, mark, rest = problem.rpartition("Options:")
    options = [line.strip() for line in rest.splitlines() if line.strip()]
    if not mark or not question.strip() or not options:
        raise MalformedError("options is missing, and problem lists none after a question and 'Options:'")
    return question, options


def _answer(fields: _Question, options: list[str]) -> str:
    """Return the answer in a solution: the letter of an option, a number as it is written ("1,200"), or a text."""
    several = fields.solution.count("<answer>") > 1
    tagged = [] if several else _TAGGED.findall(fields.solution)
    if several or (not tagged and "answer>" in fields.solution):
        raise MalformedError(f"solution: must hold one <answer>…</answer>, got {fields.solution!r:.80}")
    answer: str = (tagged[0] if tagged else fields.solution).strip()
    if not answer:
        raise MalformedError("solution: its answer is empty")
    if fields.problem_type == "multiple choice":
        letters = _letters(options)
        if said_letter(answer) not in letters:
            raise MalformedError(f"solution: must be one of the letters {', '.join(letters)}, got {answer!r:.80}")
        return said_letter(answer)
    if fields.problem_type in ("numerical", "regression") and not _is_number(answer):
        raise MalformedError(f"solution: must be a number, got {answer!r:.80}")
    return answer


def _letters(options: list[str]) -> tuple[str, ...]:
    try:
        parsed = Options.parse(options)
    except OptionsError as error:
        raise MalformedError(f"options: {error}") from None
    if not parsed.lettered:
        raise MalformedError(f"options: each begins with its own letter, as 'A. …', 'B. …'; got {options!s:.80}")
    return parsed.letters


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text.replace(",", "")))
    except ValueError:
        return False


LAYOUT = Layout("video-r1", "Video-R1-260k", _matches, _rows)
