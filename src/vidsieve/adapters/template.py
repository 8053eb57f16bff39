"""The chat template of a processor: where the question of a prompt is, found by rendering conversations."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jinja2 import TemplateError
from torch import Tensor

from vidsieve.errors import NeedError, PromptError

Ids = tuple[int, ...]
Turn = tuple[str, str, dict[str, Any]]
SYSTEM, EARLIER, ANSWER, RESULT, QUESTION = "wombat", "quokka", "narwhal", "pangolin", "axolotl"
"""What is said in the conversations that are rendered."""


@dataclass(frozen=True)
class Template:
    """The ids around a user's words: enough to find the question of a prompt.

    Parameters
    ----------
    openings, closings : tuple of tuple of int
        Ids that stand before and after what a user says: one of each in every user's turn.
    ignore : frozenset of int
        Ids that are never part of a question: blanks, special tokens, placeholders.
    results : tuple of tuple of int
        Openings of turns that begin as a user's and hold the results of tools.
    numbers : frozenset of int
        Ids of digits and numbers, by which the times of a video's frames differ.
    """

    openings: tuple[Ids, ...]
    closings: tuple[Ids, ...]
    ignore: frozenset[int] = frozenset()
    results: tuple[Ids, ...] = ()
    numbers: frozenset[int] = frozenset()

    @classmethod
    def of(cls, processor: Any) -> Template:
        """Return the template of a processor, or of a tokenizer with a chat template.

        Conversations with and without a system prompt, earlier turns, tools and a video are rendered, and what stands
        around their words is read off. Where a template writes the system prompt into the user's turn (Gemma 3), it
        counts as part of the question.

        Raises
        ------
        NeedError
            If it renders no user text (the error shows what was rendered), if nothing tells a user's words from
            others, or if the tokenizer is not a fast one, which alone says where its tokens are in the text.
        """
        rendering = _Rendering(processor)
        probes = list(rendering.probes())
        asked = [(p, n) for p in probes for n, word in enumerate(p.words) if word.startswith((EARLIER, QUESTION))]
        told = [(p, n) for p in probes for n, word in enumerate(p.words) if word == RESULT]

        def foreign(opening: Ids) -> bool:
            """True if it stands before an answer, or behind the last question."""
            places = (
                (p, i)
                for p in probes
                for n, word in enumerate((*p.words, ANSWER))
                if word == ANSWER
                for i in p.between(n)
            )
            return any(_at(p.ids, i, opening) for p, i in places)

        openings = {rendering.opening(p.part(n), foreign) for p, n in asked} - {()}
        closings = {rendering.closing(p.part(n + 1)) for p, n in asked} - {()}
        parts = [rendering.stripped(p.part(n)) for p, n in told]
        results = {
            ids[i:] for ids in parts for i in range(len(ids)) for o in openings if _at(ids, i, o) and ids[i:] != o
        }
        longest = partial(sorted, key=len, reverse=True)
        kinds = rendering.ignore, tuple(longest(results)), rendering.numbers
        template = cls(tuple(longest(openings)), tuple(longest(closings)), *kinds)
        for probe in (*probes, *rendering.with_video()):
            first, last = template._turn(probe.ids) or (0, 0)
            begin, end = probe.spans[-1]
            if not first <= begin < end <= last:
                raise NeedError(
                    f"the chat template of {rendering.name} has nothing by which a user's words are told from others: "
                    f"it rendered {probe.text!r}"
                )
        return template

    def question_mask(self, input_ids: Tensor, videos: Iterable[Tensor] = ()) -> Tensor:
        """Return (L,) bool: the words of the last user turn of one prompt (L,) int64, options included.

        Parameters
        ----------
        input_ids : Tensor, (L,), int64
        videos : iterable of Tensor, (N,), int64
            The places of each video's placeholders, in order. What stands between them is no question: times, words
            for frames; nor the same words before the first of them, with other numbers.

        Raises
        ------
        NeedError
            If the prompt holds no user turn in this template.
        PromptError
            If its turn has no word: nothing but blanks, markers and words unknown to the tokenizer.
        """
        ids = input_ids.tolist()
        turn = self._turn(ids)
        if turn is None:
            raise NeedError("the prompt has no user turn of the model's chat template: render it with the template")
        first, last = turn
        words = [i for i in range(first, last) if ids[i] not in self.ignore]
        for columns in videos:
            begin, end = self._extent(ids, first, columns)
            words = [i for i in words if not begin <= i <= end]
        if not words:
            raise PromptError("the question has no word that the model knows: a method that reads it cannot choose")
        mask = torch.zeros(len(ids), dtype=torch.bool, device=input_ids.device)
        mask[words] = True
        return mask

    def _turn(self, ids: Sequence[int]) -> tuple[int, int] | None:
        """Return where the last turn in which the user speaks begins and ends, without its opening and closing."""
        starts, ends = ({part[0] for part in parts} for parts in (self.openings, self.closings))
        first = next(
            (
                i + len(opening)
                for i in reversed(range(len(ids)))
                if ids[i] in starts and not any(_at(ids, i, result) for result in self.results)
                for opening in self.openings
                if _at(ids, i, opening)
            ),
            None,
        )
        if first is None:
            return None
        closed = (i for i in range(first, len(ids)) if ids[i] in ends and any(_at(ids, i, c) for c in self.closings))
        return first, next(closed, len(ids))

    def _extent(self, ids: Sequence[int], first: int, columns: Tensor) -> tuple[int, int]:
        """Return the first and last place of a video with the words of its frames, in a turn that begins at `first`."""
        start, end = int(columns[0]), int(columns[-1])
        begin, jumps = start, (columns.diff() > 1).nonzero().flatten()
        gaps = (self._pattern(ids[a + 1 : b]) for a, b in columns[torch.stack([jumps, jumps + 1], 1)].tolist())
        pattern = next(filter(None, gaps), [])
        for i in reversed(range(first, start)) if pattern else ():
            before = self._pattern(ids[i:start])
            if len(before) > len(pattern):
                break
            if before in (pattern, pattern[1:]):  # a tokenizer may join the first sign to the user's last
                begin = i
        return begin, end

    def _pattern(self, ids: Sequence[int]) -> list[int]:
        """Return the words among ids, every number as one -1."""
        words = [-1 if i in self.numbers else i for i in ids if i not in self.ignore]
        return [word for i, word in enumerate(words) if i == 0 or word != -1 or words[i - 1] != -1]


def _at(ids: Sequence[int], place: int, part: Ids) -> bool:
    """True if ids have `part` at a place."""
    return tuple(ids[place : place + len(part)]) == part


def template_or_reason(processor: Any) -> Template | NeedError:
    """Return the template of a processor, or the error of `Template.of`: to be raised when a method needs it."""
    try:
        return Template.of(processor)
    except NeedError as error:
        return error


@dataclass(frozen=True)
class _Probe:
    """A rendered conversation: its ids, and the places (first, behind the last) of each thing said in it."""

    text: str
    ids: Ids
    words: tuple[str, ...]
    spans: tuple[tuple[int, int], ...]

    def between(self, number: int) -> range:
        """Return the places between a thing said and the one before it, or the ends of the prompt."""
        first = self.spans[number - 1][1] if number else 0
        return range(first, self.spans[number][0] if number < len(self.spans) else len(self.ids))

    def part(self, number: int) -> Ids:
        """Return the ids at `between`."""
        return tuple(self.ids[i] for i in self.between(number))


class _Rendering:
    """Renders conversations by a processor's chat template, and knows its tokenizer's ids by kind."""

    def __init__(self, processor: Any) -> None:
        self.tokenizer = getattr(processor, "tokenizer", processor)
        self.name = type(processor).__name__
        self._processor = processor if getattr(processor, "chat_template", None) else self.tokenizer
        if not getattr(self.tokenizer, "is_fast", False):
            raise NeedError(
                f"{type(self.tokenizer).__name__} does not say where its tokens are in a text: pass "
                "template=vidsieve.Template(openings=…, closings=…) with the ids around a user's words"
            )
        added = self.tokenizer.added_tokens_decoder
        special = set(self.tokenizer.all_special_ids) | {i for i, token in added.items() if token.special}
        names = ("image_token_id", "video_token_id", "audio_token_id")
        special |= {i for name in names if isinstance(i := getattr(processor, name, None), int)}
        self._markers = special | set(added)
        vocabulary = self.tokenizer.get_vocab()
        # Byte-level vocabularies write blank, newline, tab and return as letters.
        bare = {i for word, i in vocabulary.items() if not word.strip("ĠĊĉč▁ \n\t\r")}
        bare |= {vocabulary[byte] for byte in ("<0x09>", "<0x0A>", "<0x0D>", "<0x20>") if byte in vocabulary}
        self._blank = {i for i in bare if not self.tokenizer.decode([i]).strip()}
        self.ignore = frozenset(special | self._blank)
        self.numbers = frozenset(i for word, i in vocabulary.items() if word.strip("Ġ▁ ").isdecimal())
        self._said = self._form()

    def render(self, messages: list[dict[str, Any]], **options: Any) -> str | None:
        """Return the text of a conversation, None where the template refuses it."""
        try:
            text: str = self._processor.apply_chat_template(
                messages, **({"add_generation_prompt": True, "tokenize": False} | options)
            )
        except (TemplateError, TypeError, ValueError):
            return None
        return text

    def _form(self) -> Callable[[str], Any]:
        """Return what makes the content of a message from a text: a list of parts, or the text itself.

        Raises
        ------
        NeedError
            If neither is rendered.
        """
        tried = []
        for form in (lambda text: [{"type": "text", "text": text}], str):
            text = self.render([{"role": "user", "content": form(QUESTION)}])
            if text is not None and QUESTION in text and "'type'" not in text and '"type"' not in text:
                return form
            tried.append("an error" if text is None else repr(text[:300]))
        raise NeedError(
            f"the chat template of {self.name} renders no user text: a message that says {QUESTION!r} became "
            f"{' or '.join(dict.fromkeys(tried))}; give the processor the chat template of its model"
        )

    def stripped(self, ids: Ids) -> Ids:
        """Return ids without blanks at either end."""
        places = [i for i, word in enumerate(ids) if word not in self._blank]
        return ids[places[0] : places[-1] + 1] if places else ()

    def opening(self, before: Ids, foreign: Callable[[Ids], bool]) -> Ids:
        """Return the end of what stands before a user's words that stands nowhere else, from a marker where one is."""
        ids = self.stripped(before)
        starts = [i for i in reversed(range(len(ids))) if ids[i] in self._markers]
        return next((ids[i:] for i in (*starts, 0) if ids and not foreign(ids[i:])), ())

    def closing(self, behind: Ids) -> Ids:
        """Return the beginning of what stands behind a user's words, up to a marker where one is."""
        ids = self.stripped(behind)
        return ids[: next((i + 1 for i, word in enumerate(ids) if word in self._markers), len(ids))]

    def probes(self) -> Iterator[_Probe]:
        """Yield conversations that end with a question; those that a template refuses are left out."""
        call = {"type": "function", "function": {"name": "look", "arguments": {}}}
        answer: Turn = ("assistant", ANSWER, {})
        system: Turn = ("system", SYSTEM, {})
        earlier: Turn = ("user", EARLIER, {})
        asked: Turn = ("user", QUESTION, {})
        tool: Turn = ("tool", RESULT, {"name": "look"})
        yield from self._probed([asked])
        for text in (f"{QUESTION}?", f"{QUESTION}.\n", f"{QUESTION}?\nA. one\nB. two"):
            yield from self._probed([("user", text, {})])
        yield from self._probed([asked], add_generation_prompt=False)
        if "enable_thinking" in str(self._processor.chat_template):
            yield from self._probed([asked], enable_thinking=False)
        yield from self._probed([system, asked])
        yield from self._probed([earlier, answer, asked])
        yield from self._probed([system, earlier, answer, asked])
        yield from self._probed([earlier, ("assistant", ANSWER, {"tool_calls": [call]}), tool, answer, asked])

    def with_video(self) -> Iterator[_Probe]:
        """Yield conversations with a video before and behind the question, where a message can hold one."""
        text = self._said(QUESTION)
        for parts in ([{"type": "video"}, *text], [*text, {"type": "video"}]) if text != QUESTION else ():
            yield from self._probed([("user", QUESTION, {"content": parts})])

    def _probed(self, turns: Sequence[Turn], **options: bool) -> Iterator[_Probe]:
        """Yield a conversation of (role, text, further fields), unless the template refuses it or leaves a text out."""
        messages = [{"role": role, "content": self._said(text)} | more for role, text, more in turns]
        text = self.render(messages, **options)
        if text is None:
            return
        tokens = self.tokenizer(text, return_offsets_mapping=True)
        offsets, spans, start = tokens["offset_mapping"], [], 0
        said = tuple(text.strip() for _, text, _ in turns)  # as some templates do
        for word in said:
            start = text.find(word, start)
            if start < 0:
                return
            end = start + len(word)
            inside = [i for i, (a, b) in enumerate(offsets) if a < end and b > start and text[a:b].strip()]
            if not inside:
                raise NeedError(
                    f"the tokenizer of {self.name}, {type(self.tokenizer).__name__}, has no token for {word!r}: it "
                    "does not belong to this chat template"
                )
            spans.append((inside[0], inside[-1] + 1))
            start = end
        yield _Probe(text, tuple(tokens["input_ids"]), said, tuple(spans))
