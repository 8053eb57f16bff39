"""Counting and what is not there: questions against the scene itself, and the model that answers them."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch

from vidsieve.loading import load_model
from vidsieve.testbed.model import WORD_ID
from vidsieve.testbed.vocabulary import NUMBERS, QUESTION_NAME, TALK_WORDS, VOCABULARY
from vidsieve.testbed.world import make_cast, render
from workbench.testbed import talking
from workbench.testbed.commands import TALKER
from workbench.testbed.model import TALK_ID
from workbench.testbed.talking import NOTHING, absent_questions, counting_questions, describe_open, open_cast

NAMES = {name: shape for shape, name in QUESTION_NAME.items()}


@pytest.mark.parametrize("index", range(6))
def test_counts_are_those_of_the_scene(index):
    cast, gone = open_cast("dense", 5, index)
    asked = counting_questions(cast, 5, index)
    seen = Counter(o.shape for o in cast.objects if o.kind == "flash")
    assert len(gone) == 2 and not set(gone) & set(cast.objects)
    for question in asked:
        shape = NAMES[question.text.removeprefix("how many ").removesuffix(" are there ?")]
        assert question.answer == NUMBERS[seen[shape]]
        tokens = {t for o in cast.objects if o.shape == shape and o.kind == "flash" for t in o.tokens()}
        assert set(question.targets) == tokens
    assert {q.answer for q in asked} == set(NUMBERS), "two are gone, two are alone, two classes have two and three"


@pytest.mark.parametrize("index", range(4))
def test_what_is_asked_about_is_there_or_gone_and_looks_no_different(index):
    cast, gone = open_cast("dense", 5, index)
    asked = absent_questions(cast, gone, 5, index)
    missing = {QUESTION_NAME[o.shape] for o in gone}
    for question in asked:
        about = any(name in question.text for name in missing)
        assert about == (question.answer == NOTHING) == (not question.targets)
    starts = Counter(question.text.split()[0] for question in asked)
    assert starts == {"what": 4, "where": 4} and sum(q.answer == NOTHING for q in asked) == 4


def test_what_is_gone_is_not_drawn():
    before, (cast, gone) = make_cast("dense", 5, 0), open_cast("dense", 5, 0)
    drawn = render(cast, 5, 0)
    still = render(replace(before, objects=tuple(o for o in before.objects if o not in gone)), 5, 0)
    assert np.array_equal(drawn, still) and not np.array_equal(drawn, render(before, 5, 0))


def test_training_prompts_know_the_new_words_and_what_is_needed():
    frames, asked, caption, weights = describe_open(("dense", 5, 0))
    assert frames.shape == (16, 144, 144, 3) and weights.shape == (576,) and caption
    counted = [q for q in asked if q.kind == "count"]
    assert any(q.answer == TALK_ID["three"] and len(q.needed) == 3 for q in counted)
    assert all(not q.needed for q in asked if q.answer == TALK_ID[NOTHING])
    assert max(q.answer for q in asked) < len(VOCABULARY) + len(TALK_WORDS)


def test_the_talker_has_the_shallow_models_eyes_words_and_first_layer(shallow):
    talker, processor = load_model(str(TALKER))
    mine, theirs = talker.float().state_dict(), shallow[0].state_dict()
    assert WORD_ID.items() <= TALK_ID.items() and processor.tokenizer("none three")["input_ids"] == [
        TALK_ID["none"],
        TALK_ID["three"],
    ]
    for name, value in theirs.items():
        same = "vision_tower" in name or "projector" in name or (".layers.0." in name and "language" in name)
        if "embed_tokens" in name or "lm_head" in name:
            assert torch.equal(mine[name][: len(VOCABULARY)], value), name
        elif same:
            assert torch.equal(mine[name], value), name
    assert not torch.equal(mine["model.language_model.norm.weight"], theirs["model.language_model.norm.weight"])


@pytest.mark.slow
def test_a_talker_is_built_and_goes_on_where_it_was_stopped(tmp_path):
    stage = replace(talking.TALKING, steps=4, batch=2, every=4)
    lines = []
    record = talking.build_talker(tmp_path, seed=3, scenes=4, stage=stage, log=lines.append)
    assert record["figures"]["minutes"] > 0 and any(line.startswith("T 4/4") for line in lines)
    model, _ = load_model(str(tmp_path / "model"))
    again = talking.build_talker(tmp_path, seed=3, scenes=4, stage=stage, log=lines.append)
    assert again["figures"] == record["figures"]
    later, _ = load_model(str(tmp_path / "model"))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), later.parameters(), strict=True))
