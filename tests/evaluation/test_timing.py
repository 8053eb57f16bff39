"""The pipeline on the clock: every part has its time, the operations are counted right, and turns are taken."""

from __future__ import annotations

import statistics
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import vidsieve
from vidsieve.adapters import adapter_for
from vidsieve.answering import answer, chat
from vidsieve.errors import UnknownNameError
from vidsieve.evaluation import experiment
from vidsieve.evaluation.blueprints import BLUEPRINTS, random_model
from vidsieve.evaluation.conditions import Condition
from vidsieve.evaluation.flops import paper_flops, prefill_flops
from vidsieve.evaluation.tasks import timing
from vidsieve.evaluation.tasks.timing import PARTS, ComparingTask, TimingTask, one_pass
from vidsieve.testbed.files import write_scene
from vidsieve.testing.tiny_models import FAMILIES, inputs_for
from vidsieve.types import Need, TokenGrid
from vidsieve.video.reading import read_video


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    path = tmp_path_factory.mktemp("scene") / "scene.mp4"
    write_scene(path, world="dense", seed=3, index=0)
    return path


@pytest.mark.parametrize("family", ["llava_onevision", "qwen2_5_vl"])
def test_operations_are_those_that_torch_counts(family):
    """Torch counts whole attention matrices; halves of them are ours, and the head is for the last token alone."""
    model = FAMILIES[family]()
    text = model.config.get_text_config()
    tokens, size = 40, text.hidden_size // text.num_attention_heads
    embeds = torch.randn(1, tokens, text.hidden_size)
    model.set_attn_implementation("eager")
    with FlopCounterMode(display=False) as counted, torch.no_grad():
        hidden = adapter_for(model).language_model(inputs_embeds=embeds).last_hidden_state
        model.get_output_embeddings()(hidden[:, -1:])
    upper = text.num_hidden_layers * 2 * tokens * (tokens - 1) * text.num_attention_heads * size
    total = counted.get_total_flops()
    rotary = total - upper - prefill_flops(text, tokens)
    assert 0 <= rotary <= 0.001 * total  # angles of the positions
    assert prefill_flops(text, [tokens, 10, 10]) < prefill_flops(text, [tokens, tokens, 10])


def test_the_papers_formula():
    text = FAMILIES["llava_onevision"]().config.get_text_config()
    d, m, layers = text.hidden_size, text.intermediate_size, text.num_hidden_layers
    assert paper_flops(text, 7) == layers * (4 * 7 * d * d + 2 * 49 * d + 2 * 7 * d * m)


def passes(model, path, prompts, frames, **options):
    return TimingTask(adapter=adapter_for(model), source=path, lengths=frames, prompts=prompts, **options)


def test_every_part_has_its_time(scene, testbed):
    model, processor = testbed
    task = passes(model, scene, lambda video: chat(processor, video, "where is the low mark ?"), [16], new_tokens=3)
    one, _ = one_pass(task, 16, Condition(vidsieve.load("divprune", retention=0.1)))
    assert set(one["ms"]) == set(PARTS) and all(ms > 0 for ms in one["ms"].values())
    assert one["visual"] == [576, 57] and one["prompt"][0] - one["prompt"][1] == 576 - 57
    text, tokens = model.config.get_text_config(), one["prompt"][1]
    row = experiment.run(task, [Condition(vidsieve.load("divprune", retention=0.1))]).result["rows"][0]
    assert row["flops"] == {"paper": paper_flops(text, tokens), "counted": prefill_flops(text, tokens)}
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_a_pass_reads_what_a_call_by_hand_reads(scene, testbed):
    """Tokens of the prompt and of the video, and the fraction that layers see, are those of `answer`."""
    model, processor = testbed
    task = passes(model, scene, lambda video: chat(processor, video, "where ?"), [8], new_tokens=1)
    for name, kept in (("divprune", 0.25), ("fastv", 0.5)):
        method = vidsieve.load(name, retention=kept)
        one, _ = one_pass(task, 8, Condition(method))
        said = answer(model, processor, read_video(scene, frames=8), "where ?", method, max_new_tokens=1)
        (trace,) = said.traces
        assert (tuple(one["prompt"]), one["visual"]) == (said.prompt_tokens, [trace.total, trace.kept])
        assert one["layers"] == trace.layer_retention


def test_a_comparison_says_what_answering_by_hand_says(scene, testbed):
    model, processor = testbed
    video, asked = read_video(scene, frames=16), "what colour is the home ?"
    task = ComparingTask(
        adapter=adapter_for(model),
        source=video,
        lengths=[16],
        prompts=lambda video: chat(processor, video, asked),
        repeats=2,
        new_tokens=4,
        processor=processor,
    )
    methods = [None, *(vidsieve.load(name, retention=0.4) for name in ("random", "fastv"))]
    methods.append(vidsieve.load("score", "testbed", retention=0.4))
    result = experiment.run(task, [Condition(method) for method in methods]).result
    assert result["tokens"] == 576 and len(result["rows"]) == 4
    for row, method in zip(result["rows"], methods, strict=True):
        said = answer(model, processor, video, asked, method, max_new_tokens=4)
        assert (row["answer"], tuple(row["prompt"])) == (said.text, said.prompt_tokens)
        if method is not None:
            assert row["indices"] == list(said.traces[0].indices)
            assert row["layer_retention"] == said.traces[0].layer_retention
    assert list(task.scores) == [result["rows"][3]["key"]]


def test_methods_inside_the_llm_are_counted_by_what_layers_see(scene, testbed):
    model, processor = testbed
    task = passes(model, scene, lambda video: chat(processor, video, "where ?"), [16], new_tokens=1)
    one, _ = one_pass(task, 16, Condition(vidsieve.load("fastv", retention=0.5, layer=2)))
    words = one["prompt"][0] - 576
    assert one["layers"] == pytest.approx(0.5, abs=0.001) and one["prompt"][0] == one["prompt"][1]
    assert one["seen"] == words + 288


@pytest.fixture
def fake(monkeypatch, testbed):
    """A task whose passes take `took(condition, frames, turn)` milliseconds, and the order of the passes."""

    def task(took, lengths, **options):
        order = []

        def once(task, frames, condition):
            order.append((condition.key, frames))
            name = "full" if condition.method is None else condition.method.name
            ms = {part: 0.0 for part in PARTS} | {"prefill": took(name, frames, len(order))}
            return {"ms": ms, "visual": [9, 1], "prompt": [12, 3], "layers": 0.1, "seen": 3}, None

        monkeypatch.setattr(timing, "one_pass", once)
        return passes(testbed[0], Path("clip.mp4"), None, lengths, **options), order

    return task


CONDITIONS = [Condition(), Condition(vidsieve.load("random"))]


def test_turns_means_and_where_pruning_pays(fake):
    """Full takes 1 ms a frame, the method 20 at once: it pays from 32 frames on."""
    took = lambda name, frames, turn: float(frames) if name == "full" else 20.0  # noqa: E731
    task, order = fake(took, [16, 32, 64], repeats=2, warm_up=1)
    result = experiment.run(task, CONDITIONS).result
    keys = [condition.key for condition in CONDITIONS]
    assert order == [(key, frames) for _ in range(3) for frames in (16, 32, 64) for key in keys]
    full, random = result["rows"]
    assert full["ms"]["total"]["mean"] == pytest.approx(112 / 3) and full["ms"]["prefill"]["sd"] == pytest.approx(
        statistics.stdev([16, 32, 64])
    )
    assert (full["ms"]["total"]["p50"], full["ms"]["total"]["p95"]) == (32, 64)
    assert random["break_even"] == 32 and random["times_faster"]["total"] == pytest.approx(112 / 60)
    assert full["break_even"] is None


def test_the_first_rounds_do_not_count(fake):
    task, _ = fake(lambda name, frames, turn: 1000.0 if turn <= 2 else 1.0, [8])
    rows = experiment.run(task, CONDITIONS).result["rows"]
    assert all(row["ms"]["total"]["max"] == 1.0 for row in rows)


def test_a_timing_is_resumed_with_its_rounds_and_warms_up_again(fake, tmp_path):
    def stop(name, frames, turn):
        if turn == 7:
            raise KeyboardInterrupt
        return float(turn)

    with pytest.raises(KeyboardInterrupt):
        experiment.run(fake(stop, [8])[0], CONDITIONS, tmp_path)
    task, order = fake(lambda name, frames, turn: 100.0 + turn, [8])
    rows = experiment.run(task, CONDITIONS, tmp_path).result["rows"]
    assert len(order) == 4, "a warm-up round, and the one that is missing"
    assert (rows[0]["ms"]["total"]["min"], rows[0]["ms"]["total"]["max"]) == (3.0, 103.0)


def test_what_cannot_run_is_told(scene, testbed):
    model, processor = testbed
    conditions = [Condition(), Condition(vidsieve.load("fastv", retention=0.1))]
    prompts = lambda video: chat(processor, video, "where ?")  # noqa: E731
    task = passes(model, scene, prompts, [8], repeats=1, warm_up=0, new_tokens=1)
    result = experiment.run(task, conditions).result
    assert [row["method"] for row in result["rows"]] == ["full"]
    assert "0.2501" in result["refused"][0]["reason"]


@pytest.mark.parametrize(
    ("name", "tokens"),
    [
        ("llava-onevision-0.1b", 4 * 196 + 1),
        ("qwen2.5-vl-0.1b", None),
        ("qwen3-vl-0.1b", None),
        ("internvl3-0.1b", 4 * 256 + 1),
        ("smolvlm2-0.1b", 4 * 81 + 1),
    ],
)
def test_a_blueprint_answers_about_real_frames(name, tokens, scene):
    made = random_model(name)
    size = sum(weight.numel() for weight in made.model.parameters())
    assert 0.05e9 < size < 0.3e9
    task = passes(made.model, scene, lambda video: made.inputs(video, 11), [4], new_tokens=2)
    one, _ = one_pass(task, 4, Condition(vidsieve.load("uniform", retention=0.25)))
    total, kept = one["visual"]
    assert kept == total // 4 and one["prompt"][0] - one["prompt"][1] == total - kept
    assert tokens is None or total == tokens - 1
    assert all(one["ms"][part] > 0 for part in PARTS)


def test_blueprints_are_of_the_sizes_that_they_say():
    """Parameters of the published ones, counted without memory, against their names."""
    from transformers import AutoModelForImageTextToText

    for name, (_, config) in BLUEPRINTS.items():
        with torch.device("meta"):
            model = AutoModelForImageTextToText.from_config(config())
        said = float(name.rpartition("-")[2].removesuffix("b"))
        size = sum(weight.numel() for weight in model.parameters()) / 1e9
        assert 0.7 * said <= size <= 2.1 * said, (name, size)
    with pytest.raises(UnknownNameError, match=r"qwen2.5-vl-7b"):
        random_model("qwen2.5-vl-8b")


def test_projectors_of_all_families_are_found():
    for family, build in FAMILIES.items():
        model = build()
        module = model.get_submodule(adapter_for(model).projector)
        seen = []
        handle = module.register_forward_hook(lambda *_, seen=seen: seen.append(1))
        grid = TokenGrid(2, 2, 4) if family.startswith("qwen") else TokenGrid(2, 4, 4)
        with torch.no_grad():
            adapter_for(model).encode(inputs_for(family, [[grid]]))
        handle.remove()
        assert seen, family


@pytest.mark.parametrize("name", ["llava-onevision-0.1b", "smolvlm2-0.1b"])
def test_the_words_asked_of_a_blueprint_are_found(name, scene):
    """Question-aware methods read them."""
    made = random_model(name)
    adapter = adapter_for(made.model)
    encoded = adapter.encode(made.inputs(read_video(scene, frames=2), 11))
    video = adapter.video_tokens(encoded, 0, frozenset({Need.QUESTION}))
    assert int(video.prompt.question_mask.sum()) >= 11
