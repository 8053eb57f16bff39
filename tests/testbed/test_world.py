"""The frozen world: the same pixels for ever, and questions with exactly one right answer."""

from __future__ import annotations

import hashlib
import multiprocessing
from collections import Counter
from operator import itemgetter

import numpy as np
import pytest

from vidsieve.testbed.questions import KINDS, make_caption, make_questions, place_of
from vidsieve.testbed.sprites import sprite_bank
from vidsieve.testbed.vocabulary import FIXTURES, GLYPHS, QUESTION_NAME, SHAPES, VOCABULARY
from vidsieve.testbed.world import FRAMES, GRID, SIDE, TOKENS, WORLDS, make_cast, render
from workbench.testbed import tower

FROZEN = {
    "dense": "9d4c547d685fab387462ecb31fb742c6",
    "dense-b": "7ee29439ba3acfb60a4601f644b8dee9",
    "sparse": "049cdff157179ddc151a145e34fb82f5",
    "sparse-b": "9ddac24b6af17c61922c23e96f2be9d6",
}


def world_hash(world):
    digest = hashlib.sha256()
    for index in range(100):
        cast = make_cast(world, 1234, index)
        digest.update(render(cast, 1234, index).tobytes())
        digest.update(repr(make_questions(cast, 1234, index)).encode())
        digest.update(make_caption(cast).encode())
    return digest.hexdigest()[:32]


@pytest.mark.parametrize("world", WORLDS)
def test_the_world_is_frozen(world):
    """100 scenes of each world: pixels, questions, captions. Changing them means re-running every number."""
    assert world_hash(world) == FROZEN[world]


def scenes(count=40, world="dense"):
    for index in range(count):
        cast = make_cast(world, 77, index)
        yield cast, make_questions(cast, 77, index)


def test_a_cell_shows_one_thing_at_a_time():
    for cast, _ in scenes():
        used = [cell for thing in cast.objects for cell in thing.track] + list(cast.decoys)
        assert len(used) == len(set(used))
        assert all(0 <= t < FRAMES and 0 <= r < GRID and 0 <= c < GRID for t, r, c in used)


@pytest.mark.parametrize("world", ["dense", "sparse"])
def test_every_question_has_one_right_answer(world):
    for cast, questions in scenes(world=world):
        asked = [o for o in cast.objects if o.kind != "glyph"]
        assert {q.kind for q in questions} >= set(KINDS) - {"order"}
        for question in questions:
            assert len(set(question.options)) == 4 and question.answer in question.options
            (key,) = [thing for thing, name in QUESTION_NAME.items() if name in question.text]
            about = [o for o in asked if key in (o.shape, o.colour)]
            if question.kind == "shape":
                assert [o.shape for o in about] == [question.answer]
            elif question.kind == "colour":
                assert [o.colour for o in about] == [question.answer]
            elif question.kind == "place":
                assert [place_of(o) for o in about] == [question.answer]
            elif question.kind == "motion":
                assert [o.direction for o in about] == [question.answer]
            elif question.kind == "change":
                assert [o.turned[0] for o in about] == [question.answer] and about[0].colour != question.answer
            else:
                order = sorted((o for o in about if o.kind == "flash"), key=lambda o: o.track[0][0])
                pick = order[0] if "first" in question.text else order[-1]
                starts = [o.track[0][0] for o in order]
                assert len(set(starts)) == len(starts)
                assert question.answer == (pick.colour if "colour" in question.text else pick.shape)
            assert set(question.targets) <= {token for o in about for token in o.tokens()}


def test_the_sparse_world_has_few_askable_objects_and_few_questions_about_order():
    for cast, questions in scenes(20, "sparse"):
        kinds = Counter(thing.kind for thing in cast.objects)
        assert kinds == {"fixture": 2, "mover": 2, "flash": 18, "glyph": 140}
        assert Counter(q.kind for q in questions)["order"] <= 4
        colours = [o.colour for o in cast.objects if o.kind != "flash"]
        named = [
            word
            for word in QUESTION_NAME
            if any(QUESTION_NAME[word] in q.text for q in questions if "which shape was" in q.text)
        ]
        assert not set(named) & set(colours)


def test_glyphs_are_never_named():
    for cast, questions in scenes(10):
        text = make_caption(cast) + " ".join(q.text + " ".join(q.options) for q in questions)
        assert not set(text.split()) & set(GLYPHS)


def test_answers_do_not_leak_through_the_text():
    """The right option is equally often first, second, third and fourth, and no word wins by itself."""
    places, answers = Counter(), Counter()
    for _, questions in scenes(120):
        places.update(q.options.index(q.answer) for q in questions)
        answers.update((q.kind, q.answer) for q in questions)
    assert max(places.values()) / min(places.values()) < 1.15
    for kind in ("place", "motion"):
        of_kind = [n for (k, _), n in answers.items() if k == kind]
        assert max(of_kind) / sum(of_kind) < 0.33


@pytest.mark.parametrize("world", ["dense", "sparse"])
def test_captions_state_what_questions_ask(world):
    for cast, questions in scenes(20, world):
        said = make_caption(cast).split()
        for question in questions:
            assert question.answer in said


def test_every_word_is_in_the_vocabulary():
    assert len(set(VOCABULARY)) == len(VOCABULARY)
    for cast, questions in scenes(10):
        used = set(make_caption(cast).split())
        for question in questions:
            used |= {*question.text.split(), *question.options}
        assert used <= set(VOCABULARY)


def test_frames_are_pixels_of_the_right_size():
    frames = render(make_cast("dense", 5, 0), 5, 0)
    assert frames.shape == (FRAMES, SIDE, SIDE, 3) and frames.dtype == np.uint8 and TOKENS == 576
    assert np.array_equal(frames, render(make_cast("dense", 5, 0), 5, 0))
    assert not np.array_equal(frames, render(make_cast("dense", 6, 0), 6, 0))


def test_the_twins_draw_the_same_names_differently():
    a, b = sprite_bank("A"), sprite_bank("B")
    for name in (*SHAPES, *FIXTURES):
        assert np.abs(a[name] - b[name]).mean() > 0.02, name


def test_objects_are_painted_where_the_cast_says():
    cast = make_cast("dense", 9, 3)
    frames = render(cast, 9, 3).astype(int)
    white = [o for o in cast.objects if o.colour == "white" and o.shape == "square"] or [
        o for o in cast.objects if o.shape in ("square", "circle", "diamond", "heart")
    ]
    from vidsieve.testbed.world import _RGB

    for thing in white[:5]:
        t, row, column = thing.track[0]
        centre = frames[t, row * 24 + 12, column * 24 + 12]
        assert np.abs(centre - np.array(_RGB[thing.colour_at(t)])).max() < 70, thing


def test_many_scenes_are_made_by_processes_in_their_order(monkeypatch):
    used = []
    monkeypatch.setattr(tower, "get_context", lambda kind: used.append(kind) or multiprocessing.get_context(kind))
    few, many = (
        list(tower.rendered("dense", 3, 64, work=itemgetter(2))),
        list(tower.rendered("dense", 3, 65, work=itemgetter(2))),
    )
    assert few == list(range(64)) and many == list(range(65)) and used == ["spawn"]
