"""Questions with four options, and captions, about a scene of the testbed."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from vidsieve.testbed.vocabulary import COLOURS, DIRECTIONS, PLACES, QUESTION_NAME, SHAPES
from vidsieve.testbed.world import GRID, Cast, SceneObject, scene_rng, world_of

KINDS = ("colour", "shape", "place", "motion", "order", "change")
CAPTION_PROMPT = "describe the video ."


@dataclass(frozen=True)
class Question:
    """A question with four one-word options of one type.

    `targets` are raster indices of the video tokens that show the objects in question, most informative first.
    """

    kind: str
    text: str
    options: tuple[str, str, str, str]
    answer: str
    targets: tuple[int, ...]


def place_of(thing: SceneObject) -> str:
    """Return the quarter of the frame that shows an object that does not move."""
    _, row, column = thing.track[0]
    return PLACES[2 * int(row >= GRID // 2) + int(column >= GRID // 2)]


def best_order(thing: SceneObject) -> tuple[int, ...]:
    """Return an object's tokens with evenly spread frames first, as an oracle would spend a small budget."""
    tokens = thing.tokens()
    if thing.turned:
        near = [t for t in range(len(tokens)) if min(abs(t - turn) for turn in thing.turned[1]) <= 2]
        rest = [t for t in range(len(tokens)) if t not in near]
        return tuple(tokens[t] for t in (*near, *rest))
    order = sorted(range(len(tokens)), key=lambda i: bin(i)[:1:-1].ljust(6, "0"))
    return tuple(tokens[i] for i in order)


def _members(cast: Cast, *, shape: str | None = None, colour: str | None = None) -> list[SceneObject]:
    """Return the flashes of one shape or colour in the order of their first frame."""
    flashes = [o for o in cast.objects if o.kind == "flash"]
    members = [o for o in flashes if shape in (None, o.shape) and colour in (None, o.colour)]
    return sorted(members, key=lambda o: o.track[0][0])


def _orderable(members: list[SceneObject], attribute: str) -> bool:
    """True if a class of 2 or 3 members has one first and one last member that differ in `attribute`."""
    if not 2 <= len(members) <= 3:
        return False
    starts = [o.track[0][0] for o in members]
    looks = [getattr(o, attribute) for o in members]
    return len(set(starts)) == len(starts) and len(set(looks)) == len(looks)


def _own_colour(cast: Cast, colour: str) -> bool:
    """True if flashes alone wear a colour: else "the first crimson" might be a glyph, a mover or a fixture."""
    return all(o.kind == "flash" for o in cast.objects if o.colour == colour)


def _options(
    rng: np.random.Generator, answer: str, preferred: Iterable[str], others: Iterable[str]
) -> tuple[str, str, str, str]:
    """Return four different words in random order: the answer, then preferred distractors, then others."""
    pool = [w for w in dict.fromkeys(preferred) if w != answer]
    wrong = [str(w) for w in rng.permutation(pool)] if pool else []
    rest = [w for w in others if w != answer and w not in wrong]
    wrong = (wrong + [str(w) for w in rng.permutation(rest)])[:3]
    a, b, c, d = (str(w) for w in rng.permutation([answer, *wrong]))
    return a, b, c, d


def make_questions(cast: Cast, seed: int, index: int) -> list[Question]:
    """Return every question that has exactly one right answer in a scene, in random order (about 20)."""
    rng = scene_rng(cast.world, seed, index, salt=2)
    questions: list[Question] = []
    seen_colours = {o.colour for o in cast.objects if o.kind in ("fixture", "mover")}
    common = [c for c in COLOURS if len([o for o in cast.objects if o.colour == c]) > 3 or c in seen_colours]
    crowded = [s for s in SHAPES if len(_members(cast, shape=s)) > 3]

    def ask(
        kind: str, text: str, answer: str, preferred: Iterable[str], others: Iterable[str], about: Iterable[int]
    ) -> None:
        questions.append(Question(kind, text, _options(rng, answer, preferred, others), answer, tuple(about)))

    for thing in cast.objects:
        name = QUESTION_NAME.get(thing.shape, "")
        lone = thing.kind == "flash" and thing.shape in cast.unique_shapes
        if lone or thing.kind in ("fixture", "mover"):
            if thing.turned is None:
                ask("colour", f"what colour is the {name} ?", thing.colour, common, COLOURS, best_order(thing))
            if thing.kind != "mover":
                ask("place", f"where is the {name} ?", place_of(thing), PLACES, PLACES, best_order(thing))
        if thing.kind == "flash" and thing.colour in cast.unique_colours:
            word = QUESTION_NAME[thing.colour]
            ask("shape", f"which shape is {word} ?", thing.shape, crowded, SHAPES, best_order(thing))
        if thing.direction:
            ask("motion", f"which way does the {name} move ?", thing.direction, DIRECTIONS, DIRECTIONS, thing.tokens())
        if thing.turned:
            wrong = [c for c in common if c != thing.colour]
            rest = [c for c in COLOURS if c != thing.colour]
            ask("change", f"what colour does the {name} turn ?", thing.turned[0], wrong, rest, best_order(thing))

    for named, attribute, words, others in (("shape", "colour", SHAPES, COLOURS), ("colour", "shape", COLOURS, SHAPES)):
        start = "what colour was the" if attribute == "colour" else "which shape was the"
        for word in words:
            members = _members(cast, **{named: word})
            if _orderable(members, attribute) and (named == "shape" or _own_colour(cast, word)):
                looks = [getattr(o, attribute) for o in members]
                about = [token for o in members for token in o.tokens()]
                for end, which in ((0, "first"), (-1, "last")):
                    ask("order", f"{start} {which} {QUESTION_NAME[word]} ?", looks[end], looks, others, about)
    mixed = [questions[i] for i in rng.permutation(len(questions))]
    most = world_of(cast.world).settings.order_questions
    if most is None:
        return mixed
    beyond = [i for i, question in enumerate(mixed) if question.kind == "order"][most:]
    return [question for i, question in enumerate(mixed) if i not in beyond]


def make_caption(cast: Cast) -> str:
    """Return sentences that state, in a fixed order of topics, everything that questions ask about a scene."""
    lines: list[str] = []
    for thing in cast.objects:
        if thing.kind == "fixture":
            turn = f" and turns {thing.turned[0]}" if thing.turned else ""
            lines.append(f"the {thing.shape} that stays in the {place_of(thing)} is {thing.colour}{turn} .")
    by_start = sorted(cast.objects, key=lambda o: o.track[0])
    for thing in by_start:
        if thing.kind == "mover":
            lines.append(f"the {thing.shape} that moves {thing.direction} is {thing.colour} .")
    for thing in by_start:
        if thing.kind == "flash" and thing.shape in cast.unique_shapes:
            lines.append(f"the {thing.shape} in the {place_of(thing)} is {thing.colour} .")
    for thing in by_start:
        if thing.kind == "flash" and thing.colour in cast.unique_colours:
            lines.append(f"there is a {thing.colour} {thing.shape} .")
    for shape in SHAPES:
        members = _members(cast, shape=shape)
        if _orderable(members, "colour"):
            lines.append(f"the first {shape} is {members[0].colour} and the last {shape} is {members[-1].colour} .")
    for colour in COLOURS:
        members = _members(cast, colour=colour)
        if _orderable(members, "shape") and _own_colour(cast, colour):
            lines.append(f"the first {colour} shape is {members[0].shape} and the last is {members[-1].shape} .")
    return " ".join(lines)
