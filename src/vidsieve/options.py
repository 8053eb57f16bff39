"""Options of a question and their letters, in files and in generated answers.

The rule for files: options are *lettered* if each begins with its own letter, "A. a dog" or "(A) a dog", in ascending
order from A; names with initials ("J. Smith", "J. Jones") are not. Compared without case, an answer is

1. the letter alone ("B", "(B)", "b."), if the options are lettered,
2. a whole option ("B. a cat"),
3. the text of an option without its letter ("a cat").

Options whose texts are equal, or that no answer can tell apart, are refused. The rule for generated answers is
`said_letter`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_LETTERED = re.compile(r"\s*\(?([A-Z])[.):]\s*(?=\S)")
_ALONE = re.compile(r"\(?([A-Za-z])[.):]?")


class OptionsError(ValueError):
    """The options or the answer of a question cannot be used."""


@dataclass(frozen=True)
class Options:
    """The options of one question.

    Parameters
    ----------
    texts : tuple of str
        Without letters, all different.
    letters : tuple of str
        Their own, or A, B, C, … if they had none.
    lettered : bool
        True if they had letters.
    """

    texts: tuple[str, ...]
    letters: tuple[str, ...]
    lettered: bool

    @classmethod
    def parse(cls, options: Sequence[str]) -> Options:
        """Return the options in a file.

        Raises
        ------
        OptionsError
            If there are fewer than two or more than 26, one is empty, or two are equal.
        """
        if not 2 <= len(options) <= len(LETTERS):
            raise OptionsError(f"options must be a list of two or more, at most {len(LETTERS)}; got {len(options)}")
        matches = [_LETTERED.match(option) for option in options]
        letters = [match[1] for match in matches if match]
        lettered = len(letters) == len(options) and letters == sorted(set(letters)) and letters[0] == "A"
        texts = [
            option[match.end() :].strip() if lettered and match else option.strip()
            for option, match in zip(options, matches, strict=True)
        ]
        seen: dict[str, int] = {}
        for place, text in enumerate(map(str.casefold, texts)):
            if not text:
                raise OptionsError(f"option {place + 1} is empty")
            if text in seen:
                raise OptionsError(f"options {seen[text] + 1} and {place + 1} are the same: {texts[place]!r}")
            seen[text] = place
        return cls(tuple(texts), tuple(letters) if lettered else tuple(LETTERS[: len(texts)]), lettered)

    def index(self, answer: str) -> int:
        """Return the number, from 0, of the option that is an answer in a file.

        Raises
        ------
        OptionsError
            If it is none of them.
        """
        wanted = answer.strip().casefold()
        alone = _ALONE.fullmatch(wanted)
        if self.lettered and alone and alone[1].upper() in self.letters:
            return self.letters.index(alone[1].upper())
        match = _LETTERED.match(answer)
        texts = [text.casefold() for text in self.texts]
        if self.lettered and match and match[1] in self.letters:
            place = self.letters.index(match[1])
            if answer[match.end() :].strip().casefold() == texts[place]:
                return place
        if wanted not in texts:
            raise OptionsError(f"the answer {answer!r} is none of its options {list(self.texts)}")
        return texts.index(wanted)

    def lines(self) -> list[str]:
        """Return the options as a prompt lists them, "A. a dog"."""
        return [f"{letter}. {text}" for letter, text in zip(self.letters, self.texts, strict=True)]


# -- generated answers ------------------------------------------------------------------------------------------------

_TAGGED = re.compile(r"<answer>(.*?)(?:</answer>|$)", re.DOTALL | re.IGNORECASE)
_BOXED = re.compile(r"\\boxed\{(?:\\text\{)?([^{}]*)\}")
_WRAPPING = " \t\r\n\"'`“”‘’*_()[]{}<>.:,;!。：，、"
_MARK = r"[\"'`“”‘’*_()\[\]]*"
_END = r"(?:[.,:;!?)\]}*\"'”’。，：；、\n]|\s*$)"
# A letter at the start of an answer, and punctuation after it: "(B)", "b.", "B: a cat".
_LEADING = re.compile(rf"{_MARK}([A-Za-z]){_MARK}(?:[.):,;\]。：，、]|\s*\n|\s+(?:because|since|as|is|–|—|-)\s)")
_SAYS = r"(?:\s*(?:is|was|would be|should be|must be|[=:：–—-]|是|为|選|选)\s*)*\s*"
_HEAD = rf"(?:option|choice|letter)?\s*{_MARK}"
# "A" and "I" are words of their own: there, what follows must close the sentence or give a reason.
_TAIL = rf"(?={_END}|\s+(?:because|since|as|for|not|and not|–|—|-|\()|{_MARK}\s*$)"
_SAID = r"(?:\s*(?:is|was|would be|should be|must be|[=:：–—-]|是|为)\s*)+"
_ANSWERED = re.compile(
    rf"(?i:\b(?:final |correct |right |best )?(?:(?:answer|solution){_SAYS}|(?:option|choice){_SAID})|答案{_SAYS})"
    rf"(?i:{_HEAD})([A-Za-z])\b(?!')(?:{_TAIL}|(?<=[B-HJ-Z])\s)"
)
_OPTION = re.compile(rf"(?i:\b(?:correct |right |best )?(?:option|choice)){_SAYS}{_MARK}([A-Z])\b(?!')")
_IS_RIGHT = re.compile(
    rf"\b{_MARK}([A-Z]){_MARK}\s+is\s+(?:the\s+)?(?:final\s+|best\s+)?(?:correct|right|answer|best)\b", re.IGNORECASE
)
_NEGATED_AFTER = re.compile(
    rf"{_MARK}(?:\s+(?:is|are|was|can|could|does|do|would|seems?)\s*(?:not\b|n't\b)|n't\b"
    r"|(?:\s+(?:is|are|was|seems?))?\s+(?:wrong|incorrect|false|ruled out|excluded|eliminated)\b)",
    re.IGNORECASE,
)
_NEGATED_BEFORE = re.compile(
    r"(?:\bnot|n't|\bneither|\bnor|\brather than|\binstead of|\bexcept|\bexcluding|\bother than|不是|不选)"
    r"\s*(?:be\s+|the\s+|an?\s+|answer\s+|option\s+|choice\s+)*[\"'(\[*]*$",
    re.IGNORECASE,
)
_BEFORE = 200
"""Characters before a letter in which it can be denied."""
_SEVERAL = re.compile(rf"{_MARK}\s*(?:,|/|&|\+|and|or|和|或)\s*{_MARK}[A-Z]\b{_MARK}(?![a-z])")


def said_letter(answer: str) -> str:
    r"""Return the capital letter that a generated answer gives; empty if it gives none, or more than one.

    Only the part in ``<answer>`` tags or ``\boxed{}`` counts, if there is one. A letter is given, in this order, by

    1. standing alone: "B", "(B)", "**b**",
    2. starting the answer, with punctuation after it: "B. a cat", "(B) because …",
    3. the last declaration "the answer is B", "Answer: b", "答案是B",
    4. "B is correct",
    5. the only option declared: "option B", "choice: B".

    Letters that are denied ("not A", "A is wrong") do not count. "A man enters", "Based on the video" and "A or B" give
    none: no letter is better than a wrong one.
    """
    text = answer
    for pattern in (_TAGGED, _BOXED):
        parts = pattern.findall(text)
        if parts:
            text = parts[-1]
    text = text.strip()
    bare = text.strip(_WRAPPING)
    if len(bare) == 1 and bare.isascii() and bare.isalpha():
        return bare.upper()
    leading = _LEADING.match(text)
    declared = [match for match in _ANSWERED.finditer(text) if not _denied(text, match)]
    if leading and not _denied(text, leading):
        letter = leading[1].upper()
        several = _SEVERAL.match(text, leading.end(1)) or (declared and declared[-1][1].upper() != letter)
        return "" if several else letter
    if declared:
        last = declared[-1]
        return "" if _SEVERAL.match(text, last.end(1)) else last[1].upper()
    for pattern in (_IS_RIGHT, _OPTION):
        matches = [match for match in pattern.finditer(text) if not _denied(text, match)]
        if matches:
            letters = {match[1].upper() for match in matches}
            several = len(letters) > 1 or any(_SEVERAL.match(text, match.end(1)) for match in matches)
            return "" if several else letters.pop()
    return ""


def _denied(text: str, match: re.Match[str]) -> bool:
    """True if a text denies that the letter in a match is the answer."""
    start, after = match.start(1), match.end(1)
    before = text[max(0, start - _BEFORE) : start]
    return bool(_NEGATED_AFTER.match(text, after) or _NEGATED_BEFORE.search(before))


def chosen(answer: str, texts: Sequence[str], answers: Sequence[str]) -> str:
    """Return the one of the possible answers that a generated answer gives; empty if it gives none.

    Parameters
    ----------
    answer : str
    texts : of the options, without letters
    answers : the answer for each option: its letter, or its text if none was listed
        Letters are read by `said_letter`; an option's text, but for case and full stops, counts too.
    """
    listed = all(len(word) == 1 and word in LETTERS for word in answers)
    letter = said_letter(answer) if listed else ""
    if letter:
        return letter if letter in answers else ""
    tagged = _TAGGED.findall(answer)
    text, plain = (tagged[-1] if tagged else answer).strip(), [_plain(option) for option in texts]
    lead = re.match(r"([A-Z])\s+(.*)$", text, re.DOTALL)  # "B a red cup"
    if listed and lead and lead[1] in answers and _plain(lead[2]) == plain[list(answers).index(lead[1])]:
        return lead[1]
    return answers[plain.index(_plain(text))] if _plain(text) in plain else ""


def _plain(text: str) -> str:
    return " ".join(text.casefold().strip(" .\n").split())
