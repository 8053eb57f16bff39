"""Words of the testbed: what scenes contain, how questions name it, how answers name it."""

from __future__ import annotations

COLOURS = ("red", "green", "blue", "yellow", "purple", "cyan", "orange", "white")
"""Answer words of the eight object colours."""

SHAPES = (
    "circle",
    "square",
    "triangle",
    "star",
    "cross",
    "ring",
    "diamond",
    "heart",
    "moon",
    "arrow",
    "crown",
    "drop",
)
"""Answer words of the shapes that flash or move and that questions ask about."""

FIXTURES = ("house", "tree", "cup", "bell")
"""Answer words of the shapes that stay in place for the whole video."""

GLYPHS = (
    "zigzag",
    "hourglass",
    "ladder",
    "comb",
    "hook",
    "wave",
    "lattice",
    "fork",
    "bolt",
    "anchor",
    "chain",
    "stairs",
    "target",
    "trident",
    "bowtie",
    "funnel",
)
"""Shapes that flash exactly as the asked ones do, and that no question and no caption ever names."""

PLACES = ("northwest", "northeast", "southwest", "southeast")
DIRECTIONS = ("left", "right", "up", "down")

_FIRST, _SECOND = ("old", "new", "high", "low"), ("mark", "sign", "seal")

QUESTION_NAME = {
    "red": "crimson",
    "green": "emerald",
    "blue": "azure",
    "yellow": "golden",
    "purple": "violet",
    "cyan": "teal",
    "orange": "amber",
    "white": "ivory",
    "house": "home",
    "tree": "plant",
    "cup": "mug",
    "bell": "chime",
} | {shape: f"{_FIRST[i // 3]} {_SECOND[i % 3]}" for i, shape in enumerate(SHAPES)}
"""Questions use names of their own, so that word similarity alone does not find an answer's tokens. A shape's
name is two words, each shared with other shapes: no single word of a question says which one is meant."""

ROWS = tuple(f"row{i}" for i in range(6))
COLUMNS = tuple(f"column{i}" for i in range(6))
"""Words no text uses: targets of the projector's alignment stage."""

FUNCTION_WORDS = (
    "user",
    "assistant",
    "what",
    "which",
    "where",
    "way",
    "colour",
    "shape",
    "is",
    "was",
    "the",
    "does",
    "did",
    "move",
    "moves",
    "turn",
    "turns",
    "first",
    "last",
    "and",
    "in",
    "a",
    "?",
    ".",
    "describe",
    "video",
    "answer",
    "with",
    "one",
    "word",
    "of",
    "there",
    "that",
    "stays",
    "it",
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
"""Every word in id order; the tokenizer splits at blanks and knows nothing else."""

NUMBERS = ("none", "one", "two", "three")
TALK_WORDS = ("how", "many", "are", "none", "two", "three")
"""Words that only the model of `workbench.testbed.talking` knows; "one" and "there" are in `VOCABULARY`."""
