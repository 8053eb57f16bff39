"""Questions that a model answers without the video are left out, and nothing else."""

from __future__ import annotations

import json

import pytest
import torch
from file_rows import rows_of

from vidsieve.errors import EvaluationError, TrainingError
from vidsieve.testbed.files import write_scenes
from vidsieve.training.data import filtering
from vidsieve.training.data.filtering import blind_answers, filter_file
from vidsieve.training.data.rows import ask, options_of, relettered


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scenes")
    write_scenes(folder, world="dense", seed=3, scenes=3)
    return folder / "questions.jsonl"


def one_by_one(model, processor, row):
    """Return whether the model is right about one question alone, by hand."""
    asked = ask(row, processor.tokenizer)
    text = processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "text", "text": asked.text}]}],
        add_generation_prompt=True,
        tokenize=False,
    )
    ids = processor.tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        logits = model(input_ids=ids).logits[0, -1]
    return int(logits[asked.option_ids].argmax()) == asked.answer


def test_a_batch_answers_as_one_by_one(testbed, questions):
    model, processor = testbed
    rows = [row for row in rows_of(questions) if "question" in row]
    found = blind_answers(model, processor, rows, batch=7)
    assert found == [one_by_one(model, processor, row) for row in rows] and 0.1 < sum(found) / len(found) < 0.6


@pytest.mark.parametrize("rule", ["any", "all"])
def test_what_is_left_needs_its_video(testbed, questions, tmp_path, monkeypatch, rule):
    model, processor = testbed
    rows = rows_of(questions)
    asked = [row for row in rows if "question" in row]
    first = blind_answers(model, processor, asked)
    second = [number % 3 == 0 for number in range(len(asked))]  # another model's answers
    answers = iter([*first, *second])
    monkeypatch.setattr(
        "vidsieve.training.data.filtering.blind_answers",
        lambda model, processor, rows, **options: [next(answers) for _ in rows],
    )
    out = tmp_path / "deep" / "filtered.jsonl"
    out.parent.mkdir()
    found = filter_file(questions, out, [testbed, testbed], rule)
    gone = [(a or b) if rule == "any" else (a and b) for a, b in zip(first, second, strict=True)]
    wanted = [row["question"] for row, out_of_it in zip(asked, gone, strict=True) if not out_of_it]
    left = rows_of(out)
    assert [row["question"] for row in left if "question" in row] == wanted
    assert (found.questions, found.kept) == (len(asked), len(wanted)) and found.captions == len(rows) - len(asked)
    assert all((out.parent / row["video"]).is_file() for row in left), "paths lead from the new file"


def test_nothing_left_and_nothing_to_ask_are_errors(testbed, questions, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "vidsieve.training.data.filtering.blind_answers", lambda model, processor, rows, **options: [True] * len(rows)
    )
    with pytest.raises(TrainingError, match="none would teach anything"):
        filter_file(questions, tmp_path / "out.jsonl", [testbed])
    assert not (tmp_path / "out.jsonl").exists()
    captions = tmp_path / "captions.jsonl"
    captions.write_text(json.dumps({"video": "a.mp4", "caption": "a fox"}))
    with pytest.raises(TrainingError, match="no multiple-choice questions"):
        filter_file(captions, tmp_path / "out.jsonl", [testbed])


# -- at scale -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def leaky(tmp_path_factory):
    """Questions in Video-R1's form, a fifth of them with options that give the answer away; and which."""
    folder = tmp_path_factory.mktemp("leaky")
    write_scenes(folder, world="dense", seed=8, scenes=12, layout="video-r1", leaked=0.2)
    truth = json.loads((folder / "truth.json").read_text())
    return folder / "Video-R1-260k.json", {(leak["video"], leak["question"]) for leak in truth["leaked"]}


def dropped(out, source):
    lines = out.with_suffix(".dropped.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    return {
        ((out.parent / r["video"]).resolve().relative_to(source.parent.resolve()).as_posix(), r["question"])
        for r in rows
    }, rows


def test_several_answers_tell_leaks_from_luck(testbed, leaky, tmp_path):
    """Everything planted is found; of the rest one answer drops what luck gets right, three drop a few."""
    source, planted = leaky
    precision = {}
    for seeds in (1, 3):
        out = tmp_path / f"{seeds}.jsonl"
        found = filter_file(source, out, [testbed], seeds=seeds, names=["testbed"])
        gone, rows = dropped(out, source)
        assert planted <= gone and len(rows) == found.questions - found.kept
        precision[seeds] = len(planted & gone) / len(gone)
        assert all(row["right_blindly"] == {"testbed": seeds} and row["of"] == seeds for row in rows)
        assert found.chance == pytest.approx(0.25) and found.others == 12 and found.groups[0]["dropped"] == len(rows)
    assert precision[1] < 0.65 < 0.8 < precision[3]


def test_how_many_answers_must_be_right(testbed, leaky, tmp_path):
    kept = [
        filter_file(leaky[0], tmp_path / f"{n}.jsonl", [testbed], seeds=3, right_in=n, work=tmp_path / "w").kept
        for n in (1, 2, 3)
    ]
    assert kept[0] < kept[1] < kept[2]
    for bad in ({"seeds": 0}, {"seeds": 2, "right_in": 3}, {"seeds": 2, "right_in": 0}, {"temperature": 0.0}):
        with pytest.raises(TrainingError, match=r"seeds must be at least 1|answers cannot be right"):
            filter_file(leaky[0], tmp_path / "x.jsonl", [testbed], **bad)
    with pytest.raises(TrainingError, match="each model must be another one"):
        filter_file(leaky[0], tmp_path / "x.jsonl", [testbed, testbed], names=["a", "a"])


def test_drawn_answers_depend_on_seed_and_question_alone(testbed, leaky):
    rows = [row for row in rows_of(leaky[0]) if row["problem_type"] == "multiple choice"][:40]
    one = blind_answers(*testbed, rows, seed=2, batch=40)
    assert one == blind_answers(*testbed, rows, seed=2, batch=7)
    assert one[10:] == blind_answers(*testbed, rows[10:], seed=2)
    assert one != blind_answers(*testbed, rows, seed=3)
    cold = [blind_answers(*testbed, rows, seed=seed, temperature=1e-4) for seed in (0, 1, 2)]
    assert cold[0] == cold[1] == cold[2], "drawn from next to no spread, the likeliest option"


def test_options_change_places_with_their_letters(testbed):
    import random

    row = {"question": "?", "options": ["A. red", "(B) blue", "C: cyan"], "answer": "B"}
    seen = set()
    for seed in range(40):
        other = relettered(row, random.Random(seed))
        texts = [option[2:].lstrip(") ") for option in other["options"]]
        assert [option.lstrip("(")[0] for option in other["options"]] == ["A", "B", "C"]
        assert sorted(texts) == ["blue", "cyan", "red"] and "blue" in other["answer"]
        assert options_of(other).index(other["answer"]) == texts.index("blue")
        seen.add(tuple(texts))
    assert len(seen) == 6
    bare = relettered({"question": "?", "options": ["red", "blue"], "answer": "blue"}, random.Random(1))
    assert sorted(bare["options"]) == ["blue", "red"] and bare["answer"] == "blue"


def test_a_stopped_filter_goes_on_and_shares_add_up(testbed, leaky, tmp_path, monkeypatch):
    """Every question is asked once, whoever asks; a changed rule asks nothing; other seeds are refused."""
    source, _ = leaky
    whole = filter_file(source, tmp_path / "whole.jsonl", [testbed, testbed], "all", seeds=2)
    asked, real = [], filtering.blind_answers

    def counted(model, processor, rows, **options):
        if len(asked) == stop:
            raise KeyboardInterrupt
        asked.append(len(rows))
        return real(model, processor, rows, **options)

    monkeypatch.setattr(filtering, "blind_answers", counted)
    out, settings = tmp_path / "out.jsonl", {"seeds": 2, "work": tmp_path / "work"}
    stop = 5
    with pytest.raises(KeyboardInterrupt):
        filter_file(source, out, [testbed, testbed], "all", share=(0, 2), **settings)
    stop = -1
    assert filter_file(source, out, [testbed, testbed], "all", share=(1, 2), **settings) is None and not out.exists()
    found = filter_file(source, out, [testbed, testbed], "all", share=(0, 2), **settings)
    again = 1  # seed 0 of the block that was under way
    assert found == whole and sum(asked) == 2 * 2 * found.questions + again * filtering.BLOCK
    assert out.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    before = len(asked)
    assert filter_file(source, out, [testbed, testbed], "any", **settings).kept == found.kept and len(asked) == before
    with pytest.raises(EvaluationError, match="seeds: 2 there, 3 now"):
        filter_file(source, out, [testbed, testbed], seeds=3, work=tmp_path / "work")


def test_one_model_is_in_memory_at_a_time(testbed, leaky, tmp_path):
    loaded = []

    def load(name):
        loaded.append(name)
        return testbed

    filter_file(leaky[0], tmp_path / "out.jsonl", [lambda: load("a"), lambda: load("b")], work=tmp_path / "w")
    assert loaded == ["a", "b"]
    filter_file(leaky[0], tmp_path / "out.jsonl", [lambda: load("a"), lambda: load("b")], work=tmp_path / "w")
    assert loaded == ["a", "b", "a"], "for its tokenizer"


def test_the_command_says_what_went_and_why(leaky, cli, tmp_path):
    out, model = tmp_path / "out.jsonl", ("--model", "testbed")
    said = cli("data", "filter", leaky[0], out, *model, "--seeds", 3, "--json", tmp_path / "f.json")
    result = json.loads((tmp_path / "f.json").read_text())
    assert (
        f"{result['kept']} of {result['questions']} questions are kept" in said
        and "guessing would come to 25 %" in said
    )
    assert "left out: 12 × image" in said and "guesses drop" not in said
    assert "guesses drop about 25 % of the good questions" in cli(
        "data", "filter", leaky[0], tmp_path / "one.jsonl", *model
    )
    assert "share 1 of 2 is done" in cli("data", "filter", leaky[0], tmp_path / "p.jsonl", *model, "--share", "1/2")
