"""Words of the testbed: the contents of scenes, their names in questions, and their names in answers."""

from __future__ import annotations


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


COLOURS = _words("red green blue yellow purple cyan orange white")
"""Answer words of the eight object colours."""

SHAPES = _words("circle square triangle star cross ring diamond heart moon arrow crown drop")
"""Answer words of the shapes that flash or move and that questions ask about."""

FIXTURES = _words("house tree cup bell")
"""Answer words of the shapes that stay in place for the whole video."""

GLYPHS = _words(
    "zigzag hourglass ladder comb hook wave lattice fork bolt anchor chain stairs target trident bowtie funnel"
)
"""Shapes that flash exactly as the others do, and that no question and no caption ever names."""

PLACES = _words("northwest northeast southwest southeast")
DIRECTIONS = _words("left right up down")

_FIRST, _SECOND = _words("old new high low"), _words("mark sign seal")

_COLOUR_NAMES = _words("crimson emerald azure golden violet teal amber ivory")
_FIXTURE_NAMES = _words("home plant mug chime")

QUESTION_NAME = (
    dict(zip(COLOURS, _COLOUR_NAMES, strict=True))
    | dict(zip(FIXTURES, _FIXTURE_NAMES, strict=True))
    | {shape: f"{_FIRST[i // 3]} {_SECOND[i % 3]}" for i, shape in enumerate(SHAPES)}
)
"""Names in questions. They differ from the answer words, so that word similarity alone does not find an answer's
tokens. A shape's name is two words, each shared with other shapes: no single word of a question identifies it."""

ROWS = tuple(f"row{i}" for i in range(6))
COLUMNS = tuple(f"column{i}" for i in range(6))
"""Words in no text: targets of the projector's alignment stage."""

FUNCTION_WORDS = _words(
    "user assistant what which where way colour shape is was the does did move moves turn turns first last and in a"
    " ? . describe video answer with one word of there that stays it"
)

SPECIAL = ("<pad>", "<unk>", "<|im_start|>", "<|im_end|>", "<video>", "<image>")

VOCABULARY: tuple[str, ...] = (
    *SPECIAL,
    *COLOURS,
    *SHAPES,
    *FIXTURES,
    *GLYPHS,
    "decoy",
    "ground",
    *PLACES,
    *DIRECTIONS,
    *(name for name in QUESTION_NAME.values() if " " not in name),
    *_FIRST,
    *_SECOND,
    *ROWS,
    *COLUMNS,
    *FUNCTION_WORDS,
)
"""Every word in id order; the tokenizer splits at blanks and knows no others."""

NUMBERS = ("none", "one", "two", "three")
TALK_WORDS = _words("how many are none two three")
"""Words that only the model of `workbench.testbed.talking` knows; "one" and "there" are in `VOCABULARY`."""
