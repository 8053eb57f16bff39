"""A benchmark from files to its table, on videos of the testbed: right, repeatable, and whole after every stop."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch

import vidsieve
from vidsieve import registry
from vidsieve.adapters import adapter_for
from vidsieve.answering import answer
from vidsieve.errors import BudgetError, EvaluationError, UnknownNameError
from vidsieve.evaluation import experiment
from vidsieve.evaluation.accuracy import accuracy_rows
from vidsieve.evaluation.conditions import Condition
from vidsieve.evaluation.experiment import Results
from vidsieve.evaluation.items import Item
from vidsieve.evaluation.tasks.questions import QuestionsTask
from vidsieve.report.runs import run_page
from vidsieve.testbed.files import write_scenes
from vidsieve.video.reading import read_video

ASKED = 4


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    """Four questions about each of three scenes, one of which is not a video."""
    folder = tmp_path_factory.mktemp("scenes")
    write_scenes(folder, world="dense", seed=31, scenes=3)
    items = registry.benchmarks.get("questions").read(folder / "questions.jsonl")
    videos = sorted({item.video for item in items})
    videos[1].write_bytes(b"no video")
    return [item for video in videos for item in [i for i in items if i.video == video][:ASKED]]


@pytest.fixture(scope="module")
def conditions():
    methods = [vidsieve.load("random"), vidsieve.load("cacovid", "testbed"), vidsieve.load("fastv", layer=2)]
    return [Condition(None, 16)] + [Condition(method.with_retention(0.3), 16) for method in methods]


BENCHMARK = registry.benchmarks.get("questions")


@pytest.fixture(scope="module")
def task(testbed, questions):
    model, processor = testbed
    asked = {"max_new_tokens": 2, "indices": True}
    return QuestionsTask(BENCHMARK, questions, adapter_for(model), processor, "testbed", **asked)


def run(folder, task, conditions, **options):
    table = experiment.run(task, conditions, folder, **options)
    return None if table is None else table.result


def files(folder):
    return {name: (folder / name).read_bytes() for name in ("result.json", "samples.jsonl")}


@pytest.fixture(scope="module")
def whole(tmp_path_factory, task, conditions):
    folder = tmp_path_factory.mktemp("whole")
    return folder, run(folder, task, conditions)


def test_answers_are_those_of_a_single_call(questions, conditions, testbed, whole):
    """What `ask` says of a video file and a question, under every condition; the same tokens are kept."""
    samples = [json.loads(line) for line in (whole[0] / "samples.jsonl").read_text().splitlines()]
    by = {(s["item"], s["condition"]): s for s in samples if "condition" in s}
    assert len(by) == 2 * ASKED * 4
    for item in (questions[0], questions[-1]):
        video = read_video(item.video, frames=16)
        for condition in conditions:
            said = answer(*testbed, video, item.question, condition.method, max_new_tokens=2)
            sample = by[item.id, condition.key]
            assert (sample["said"], tuple(sample["prompt"])) == (said.text, said.prompt_tokens)
            assert sample["score"] == float(said.text.split()[:1] == [item.answer])
            assert sample["indices"] == [list(trace.indices) for trace in said.traces]


def test_conditions_that_encode_otherwise_do_not_share_an_encoding(questions, testbed, monkeypatch):
    """Each asked alone answers as in one run, and the encoder runs once for every way of encoding."""
    model, processor = testbed
    adapter, seen = adapter_for(model), []
    method = vidsieve.load("divprune", retention=0.3)
    conditions = [Condition(), Condition(method), Condition(vidsieve.Pipeline(vidsieve.Reuse(1e9), method, 0.3))]
    conditions = [replace(condition, frames=4) for condition in conditions]
    features = type(adapter).features

    def noting(self, inputs, needs=frozenset(), front=None):
        if "pixel_values_videos" in inputs:
            seen.append(None if front is None else front.name)
        return features(self, inputs, needs, front)

    task = QuestionsTask(BENCHMARK, questions[:2], adapter, processor, "testbed", max_new_tokens=2, indices=True)
    alone = [record for one in conditions for record in task.measure(str(questions[0].video), [one])]
    monkeypatch.setattr(type(adapter), "features", noting)
    records = task.measure(str(questions[0].video), conditions)
    assert [front for front in seen if front is None or front == "reuse"][:1] == [None] and seen.count("reuse") == 1
    by = {(record.item, record.condition): record.values for record in records}
    assert by == {(record.item, record.condition): record.values for record in alone} and len(by) == 6
    first, last = (by[questions[0].id, conditions[number].key]["indices"] for number in (1, 2))
    assert first != last


def test_the_table_counts_what_failed(whole, questions):
    result = whole[1]
    assert (result["questions"], result["videos"], len(result["rows"])) == (3 * ASKED, 3, 4)
    assert [(row["video"], row["questions"]) for row in result["failed"]] == [(str(questions[ASKED].video), ASKED)]
    full, random, learned, inside = result["rows"]
    assert full["accuracy"] == pytest.approx(full["of_answered"] * 2 / 3)
    assert full["vs_full"]["diff"] == 0 and full["vs_random"] is None
    assert learned["vs_random"]["diff"] == pytest.approx(learned["accuracy"] - random["accuracy"])
    assert learned["real_retention"] == pytest.approx(172 / 576) and full["kept"] == 576
    assert inside["real_retention"] < 0.3 and inside["layer_retention"] == pytest.approx(0.3, abs=0.002)
    assert sum(group["questions"] for group in full["by"]["kind"].values()) == 3 * ASKED
    assert result["settings"]["policies"].keys() == {"cacovid:ours"}


def test_the_same_twice_and_after_a_stop_gives_the_same_files(tmp_path, task, conditions, whole, monkeypatch):
    wanted = files(whole[0])
    run(tmp_path / "again", task, conditions)
    assert files(tmp_path / "again") == wanted
    measure, asked = QuestionsTask.measure, []

    def stopped(self, unit, conditions):
        asked.append(unit)
        if len(asked) == 2:
            raise KeyboardInterrupt
        return measure(self, unit, conditions)

    monkeypatch.setattr(QuestionsTask, "measure", stopped)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "stopped", task, conditions)
    with (tmp_path / "stopped/units-1-of-1.jsonl").open("a") as file:
        file.write('{"unit": "half a li')
    assert not (tmp_path / "stopped/result.json").exists()
    run(tmp_path / "stopped", task, conditions)
    assert len(asked) == 4 and asked.count(asked[0]) == 1, "the first video is not asked about again"
    assert files(tmp_path / "stopped") == wanted


def test_several_processes_make_the_same_files(tmp_path, task, conditions, whole):
    assert run(tmp_path, task, conditions, share=(1, 2)) is None
    assert not (tmp_path / "result.json").exists()
    run(tmp_path, task, conditions, share=(0, 2))
    assert files(tmp_path) == files(whole[0])


def test_another_question_or_policy_is_another_run(tmp_path, questions, task, conditions):
    one = replace(task, items=questions[:1])
    run(tmp_path, one, conditions)
    with pytest.raises(EvaluationError, match="questions_digest"):
        run(tmp_path, replace(task, items=[replace(questions[0], answer=questions[0].options[0] + "x")]), conditions)
    with pytest.raises(EvaluationError, match="conditions"):
        run(tmp_path, one, conditions[:2])
    model = task.adapter.model
    head = model.get_output_embeddings().weight
    with pytest.raises(EvaluationError, match="model_digest"):
        try:
            head.data.neg_()
            run(tmp_path, one, conditions)
        finally:
            head.data.neg_()


@pytest.mark.parametrize("place", [0, 1])
def test_one_question_that_cannot_be_asked_is_counted_and_costs_the_others_nothing(
    tmp_path, questions, task, conditions, whole, place
):
    asked = [replace(item) for item in questions]
    asked[place] = replace(asked[place], question=f"{task.processor.video_token} what colour is it ?")
    fault = Item(
        "record 99", questions[0].video.parent / "record 99", "", (), "", fault="the answer is none of its options"
    )
    result = run(tmp_path / "run", replace(task, items=[*asked, fault]), conditions)
    lost = {row["video"].split(" on ")[0]: row["reason"] for row in result["failed"] if row["questions"] == 1}
    assert lost[f"question {asked[place].id}"].startswith("the question holds '<video>'")
    assert any(reason == fault.fault for reason in lost.values()) and result["questions"] == len(questions) + 1
    before, after = (
        {(s["item"], s["condition"]): s["said"] for s in map(json.loads, path.read_text().splitlines()) if "said" in s}
        for path in (whole[0] / "samples.jsonl", tmp_path / "run" / "samples.jsonl")
    )
    assert after == {key: said for key, said in before.items() if key[0] != asked[place].id}
    listed = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    assert {line["item"] for line in listed if "failed" in line} >= {asked[place].id, "record 99"}
    clusters = len({str(item.video) for item in [*asked, fault]})
    assert result["videos"] == clusters
    hits = sum(s["score"] for s in listed if s.get("condition") == conditions[0].key)
    assert result["rows"][0]["accuracy"] == pytest.approx(hits / (len(questions) + 1))


def test_choice_is_the_likeliest_option(tmp_path, questions, task, conditions, whole):
    """For a model that says one word, the same answers wherever what it generates is an option."""
    samples = [json.loads(line) for line in (whole[0] / "samples.jsonl").read_text().splitlines()]
    said = {(s["item"], s["condition"]): s["said"] for s in samples if "condition" in s}
    chosen = replace(task, way="choice")
    records = chosen.measure(str(questions[0].video), conditions)
    options = {item.id: item.answers for item in questions}
    pairs = [(r.values["said"], said[r.item, r.condition].split()[0], r.item) for r in records]
    alike = [(a, b) for a, b, item in pairs if b in options[item]]
    assert len(pairs) == 4 * ASKED and len(alike) > 2 * ASKED and all(a == b for a, b in alike)
    unclear = replace(questions[0], listed=True, options=("red",) * 3 + ("blue",))
    with pytest.raises(EvaluationError, match="none of the 1 questions could be asked, first because question") as why:
        run(tmp_path / "none", replace(chosen, items=[unclear]), conditions)
    assert "cannot be answered by one token each" in str(why.value)
    unknown = replace(questions[0], listed=False, options=("red", "mauve"), answer="red")
    with pytest.raises(EvaluationError, match="cannot be answered by one token each"):
        run(tmp_path / "unknown", replace(chosen, items=[unknown]), conditions)
    with pytest.raises(UnknownNameError):
        replace(task, way="guess")


def test_logits_that_are_no_numbers_end_the_run(questions, task, conditions, monkeypatch):
    """Else the first option would be everyone's answer."""
    monkeypatch.setattr("vidsieve.answering.next_token_logits", lambda adapter, plan: torch.full((1, 500), torch.nan))
    with pytest.raises(EvaluationError, match="logits are not numbers"):
        replace(task, way="choice").measure(str(questions[0].video), conditions)


def test_a_question_about_still_images_counts_as_not_asked(tmp_path):
    asked = {"question": "what is it ?", "options": ["dog", "cat"], "answer": "dog"}
    rows = [asked | {"frames": [["a.png", 2]], "caption": "a dog"}, asked | {"video": "a.mp4"}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    still, moving = BENCHMARK.read(tmp_path / "rows.jsonl")
    assert still.fault == "video: is missing, still images are not asked about" and not moving.fault


def test_the_files_of_one_video_are_json_for_every_reader(tmp_path, questions, testbed):
    """With a single video there are no errors: null, and not NaN, which JSON does not have."""
    model, processor = testbed
    task = QuestionsTask(BENCHMARK, questions[:2], adapter_for(model), processor, "testbed", max_new_tokens=1)
    result = run(tmp_path, task, [Condition(None, 16)])
    assert math.isnan(result["rows"][0]["stderr"])

    def refuse(name):
        raise AssertionError(name)

    written = json.loads((tmp_path / "result.json").read_text(), parse_constant=refuse)
    assert written["rows"][0]["stderr"] is None
    assert run_page(tmp_path)[1]


def test_a_method_that_a_video_refuses_has_no_row(tmp_path, questions, testbed):
    model, processor = testbed
    low = vidsieve.load("fastv", retention=0.1)
    conditions = [Condition(None, 16), Condition(low, 16), Condition(vidsieve.load("uniform", retention=0.1), 8)]
    task = QuestionsTask(BENCHMARK, questions[:1], adapter_for(model), processor, "testbed", max_new_tokens=1)
    result = run(tmp_path, task, conditions)
    assert [(row["method"], row["frames"]) for row in result["rows"]] == [("full", 16), ("uniform", 8)]
    assert [row["method"] for row in result["refused"]] == ["fastv"] and "0.2501" in result["refused"][0]["reason"]
    assert result["rows"][1]["vs_full"] is None, "all tokens of as many frames were not asked for"
    with pytest.raises(BudgetError):
        answer(model, processor, read_video(questions[0].video, frames=16), "Colour?", low)


def test_scores_between_0_and_1_have_no_mcnemar(questions):
    conditions = [Condition(None, 16), Condition(vidsieve.load("random"), 16)]
    samples = [
        {"item": item.id, "condition": condition.key, "score": 0.5, "kept": 1, "total": 2, "layers": 0.5}
        for item in questions
        for condition in conditions
    ]
    results = Results(conditions, {"": {"samples": samples, "refused": {}}})
    rows = accuracy_rows(results, {item.id: item.groups for item in questions}, [0] * len(questions))
    assert rows[1]["vs_full"]["mcnemar"] is None and rows[1]["vs_full"]["diff"] == 0


def test_frames_of_qwen_take_as_many_tokens_as_they_may(testbed):
    from types import SimpleNamespace

    import torch
    from transformers import Qwen2VLVideoProcessor

    from vidsieve.errors import UnsupportedCallError
    from vidsieve.testing.tiny_models import FAMILIES

    adapter = adapter_for(FAMILIES["qwen2_5_vl"]())
    for most in (4, 64, 256):
        processor = SimpleNamespace(video_processor=Qwen2VLVideoProcessor(do_sample_frames=False))
        adapter.limit_frames(processor, most)
        for size in ((3, 480, 854), (3, 1080, 608), (3, 56, 56)):
            made = processor.video_processor([torch.zeros(4, *size, dtype=torch.uint8)], return_tensors="pt")
            frames, height, width = made["video_grid_thw"][0].tolist()
            assert frames == 2 and height * width // 4 <= most
            assert height * width // 4 >= min(most, 4) // 2
    with pytest.raises(UnsupportedCallError, match="fixed number of tokens"):
        adapter_for(testbed[0]).limit_frames(testbed[1], 9)


def test_frames_of_processors_that_bound_whole_videos_take_as_many_tokens_as_they_may():
    import numpy as np

    from vidsieve.answering import chat
    from vidsieve.testing.tiny_models import FAMILIES, processor_for
    from vidsieve.video.reading import Video

    adapter = adapter_for(FAMILIES["qwen3_vl"]())
    processor = processor_for("qwen3_vl")
    adapter.limit_frames(processor, 24)
    for frames in (2, 6, 16):
        pixels = np.zeros((frames, 96, 128, 3), dtype=np.uint8)
        video = Video(pixels, np.arange(frames) / 2, (), frames / 2, 2.0, frames, (96, 128))
        grid = chat(processor, video, "Who?")["video_grid_thw"][0].tolist()
        assert grid[0] == frames // 2 and 12 <= grid[1] * grid[2] // 4 <= 24
