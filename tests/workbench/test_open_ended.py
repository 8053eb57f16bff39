"""Tasks beyond multiple choice: what is asked, how it is judged, and what a method is charged with."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import vidsieve
from vidsieve.adapters.pruning import adapter_for
from vidsieve.evaluation import experiment
from vidsieve.evaluation.conditions import Condition
from vidsieve.loading import load_model
from vidsieve.testbed.world import render
from workbench.testbed import open_ended
from workbench.testbed.commands import TALKER
from workbench.testbed.open_ended import OpenTask, dialogue_pairs, prompts, read_scene, statements
from workbench.testbed.talking import open_cast


@pytest.fixture(scope="module")
def talker():
    model, processor = load_model(str(TALKER))
    model = model.float()
    return adapter_for(model), processor


ABSENT = ("there", "made up")


def asking(talker, seed=9001):
    return OpenTask(*talker, "dense", seed, 2)


@pytest.fixture(scope="module")
def scene(talker):
    return read_scene(*talker, "dense", 9001, 0)


def test_a_caption_is_judged_sentence_by_sentence(talker, scene):
    true = sorted(scene.statements)
    assert statements("a b . c .") == ["a b", "c"] and statements("a b . c") == ["a b"], "half a sentence is none"
    said = f"{true[0]} . {true[0]} . the moon is green . {true[1]} . the"
    found, false = open_ended._caption_marks(said, scene)
    assert (found.score, false.score) == (2 / len(true), 1 / 3)


def test_all_tokens_answer_what_they_can(talker, scene):
    marks = [record.values for record in asking(talker).measure_scene(scene, "0", [Condition()])]
    absent = [
        mark["score"] if mark["task"] == "there" else 1 - mark["score"] for mark in marks if mark["task"] in ABSENT
    ]
    assert len(absent) == sum(question.kind == "absent" for question in scene.questions) and sum(absent) >= 6
    assert next(mark["score"] for mark in marks if mark["task"] == "found") > 0


def test_a_method_that_reads_the_question_chooses_for_each(talker, scene, monkeypatch):
    """All questions of a scene are asked at once; what is said is what each, asked alone, gets for an answer."""
    monkeypatch.setattr(open_ended, "CAPTION_WORDS", 1)  # captions take their time, and are not looked at
    adapter, processor = talker
    method = vidsieve.load("cacovid", "testbed", retention=0.05)
    few = replace(scene, questions=scene.questions[:8])
    records = asking(talker, seed=0).measure_scene(few, "0", [Condition(method)])
    frames = list(render(open_cast("dense", 9001, 0)[0], 9001, 0))
    alone = []
    for question in few.questions:
        content = [{"type": "video", "video": frames}, {"type": "text", "text": question.text}]
        inputs = processor.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
        with vidsieve.attach(adapter.model, method):
            out = adapter.model.generate(**inputs, max_new_tokens=1, do_sample=False)
        alone += processor.batch_decode(out[:, -1:])
    assert [record.values["said"] for record in records[: len(alone)]] == alone


def test_a_second_turn_reads_what_the_first_one_kept(talker, scene):
    """Of a method before the LLM: with the cache of the first turn, and by choosing for the first and asking both."""
    adapter, processor = talker
    method = vidsieve.load("cacovid", "testbed", retention=0.1)
    pairs = dialogue_pairs(scene.questions)[:4]
    texts = [(scene.questions[a].text, scene.questions[b].text) for a, b in pairs]
    cached = open_ended._second_words(adapter, processor, scene, texts, method, 0)
    first = prompts(adapter, processor, scene, [(a,) for a, _ in texts])
    chosen = open_ended.planned(adapter, first, method, 0).selections
    said = processor.batch_decode(open_ended.first_words(adapter, adapter.build(first, [[s] for s in chosen]))[:, None])
    both = prompts(adapter, processor, scene, [(a, word, b) for (a, b), word in zip(texts, said, strict=True)])
    whole = open_ended.first_words(adapter, adapter.build(both, [[s] for s in chosen]))
    assert torch.equal(cached, whole)


def test_questions_of_a_dialogue_are_of_one_length_and_asked_second_once(scene):
    pairs = dialogue_pairs(scene.questions)
    assert len({len(scene.questions[n].text.split()) for pair in pairs for n in pair}) == 1
    assert sorted(second for _, second in pairs) == sorted(first for first, _ in pairs)
    assert all(a != b for a, b in pairs)


def test_a_run_is_resumed_and_differences_are_paired(topv, talker, tmp_path, monkeypatch):
    monkeypatch.setattr(open_ended, "CAPTION_WORDS", 1)  # captions take their time, and are not looked at
    conditions = [Condition(frames=16), Condition(vidsieve.load("topv", retention=0.25), 16)]
    conditions.append(Condition(vidsieve.load("fastv", retention=0.25, earliest=True), 16))
    task, read = asking(talker), open_ended.read_scene

    def stop(*arguments):
        if arguments[4]:
            raise KeyboardInterrupt
        return read(*arguments)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(open_ended, "read_scene", stop)
        experiment.run(task, conditions, tmp_path)
    seen = []
    result = experiment.run(task, conditions, tmp_path, progress=lambda *done: seen.append(done)).to_json()
    assert seen == [(2, 2)], "the first scene was there"
    again = experiment.run(task, conditions).to_json()
    assert {**again, "settings": 0} == {**result, "settings": 0}
    rows = {row["method"]: row["tasks"] for row in result["rows"]}
    assert set(rows) == {"full", "fastv"} and "cannot go below" in result["refused"][0]["reason"]
    for name in ("count", "there", "second turn"):
        gap = rows["fastv"][name]["vs_full"]["diff"]
        assert gap == pytest.approx(rows["fastv"][name]["mean"] - rows["full"][name]["mean"])
    assert rows["full"]["count"]["vs_full"] is None
    assert {task["asked"] for task in (rows["full"]["there"], rows["full"]["made up"])} == {8}


def test_random_tokens_make_the_model_worse(talker):
    conditions = [Condition(frames=16), Condition(vidsieve.load("random", retention=0.05), 16)]
    result = experiment.run(asking(talker), conditions).result
    full, few = (row["tasks"] for row in result["rows"])
    assert few["there"]["mean"] < full["there"]["mean"] - 0.2 and few["found"]["mean"] < full["found"]["mean"]
