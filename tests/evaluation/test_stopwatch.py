"""The pipeline on the clock: every part has its time, the operations are counted right, and turns are taken."""

from __future__ import annotations

import statistics

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import vidsieve
from vidsieve.adapters import adapter_for
from vidsieve.answering import chat
from vidsieve.errors import UnknownNameError
from vidsieve.evaluation import stopwatch
from vidsieve.evaluation.blueprints import BLUEPRINTS, random_model
from vidsieve.evaluation.examiner import Condition
from vidsieve.evaluation.flops import paper_flops, prefill_flops
from vidsieve.testbed.files import write_scene
from vidsieve.testing.tiny_models import FAMILIES, inputs_for
from vidsieve.types import Need, TokenGrid
from vidsieve.video.reading import read_video


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    path = tmp_path_factory.mktemp("scene") / "scene.mp4"
    write_scene(path, world="A", seed=3, index=0)
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


def test_every_part_has_its_time(scene, testbed):
    model, processor = testbed
    adapter = adapter_for(model)
    method = vidsieve.load("divprune", retention=0.1)
    made = stopwatch.once(
        adapter,
        scene,
        16,
        lambda video: chat(processor, video, "where is the low mark ?"),
        Condition(0, method),
        new_tokens=3,
    )
    assert set(made.ms) == set(stopwatch.PARTS) and all(ms > 0 for ms in made.ms.values())
    assert made.visual == (576, 57) and made.prompt[0] - made.prompt[1] == 576 - 57
    text = model.config.get_text_config()
    assert made.flops == (paper_flops(text, made.prompt[1]), prefill_flops(text, made.prompt[1]))
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_methods_inside_the_llm_are_counted_by_what_layers_see(scene, testbed):
    model, processor = testbed
    method = vidsieve.load("fastv", retention=0.5, layer=1)
    made = stopwatch.once(
        adapter_for(model),
        scene,
        16,
        lambda video: chat(processor, video, "where ?"),
        Condition(0, method),
        new_tokens=1,
    )
    text, words = model.config.get_text_config(), made.prompt[0] - 576
    assert made.layers == pytest.approx(0.5, abs=0.001) and made.prompt[0] == made.prompt[1]
    assert made.flops[0] == paper_flops(text, words + 288)


def _fake(monkeypatch, took):
    """Passes that take what `took(condition, frames, turn)` says, and the order in which they were asked for."""
    order = []

    def once(adapter, path, frames, prompts, condition, **options):
        order.append((condition.key, frames))
        name = "full" if condition.compressor is None else condition.compressor.name
        ms = {part: 0.0 for part in stopwatch.PARTS} | {"prefill": took(name, frames, len(order))}
        return stopwatch.Pass(ms, (100, 10), (120, 30), 0.1, (4.0, 8.0), 2**20)

    monkeypatch.setattr(stopwatch, "once", once)
    return order


def test_turns_means_and_where_pruning_pays(monkeypatch, tmp_path):
    """Full takes 1 ms a frame, the method 20 at once: it pays from 32 frames on."""
    order = _fake(monkeypatch, lambda name, frames, turn: float(frames) if name == "full" else 20.0)
    conditions = [Condition(0), Condition(0, vidsieve.load("random"))]
    result = stopwatch.measure(None, tmp_path, [16, 32, 64], None, conditions, repeats=2, warm_up=1)
    keys = [condition.key for condition in conditions]
    assert order == [(key, frames) for _ in range(3) for frames in (16, 32, 64) for key in keys]
    full, random = result["rows"]
    assert full["ms"]["all"]["mean"] == pytest.approx(112 / 3) and full["ms"]["prefill"]["sd"] == pytest.approx(
        statistics.stdev([16, 32, 64])
    )
    assert (full["ms"]["all"]["p50"], full["ms"]["all"]["p95"]) == (32, 64)
    assert random["pays_from"] == 32 and random["times_faster"]["all"] == pytest.approx(112 / 60)
    assert full["pays_from"] is None


def test_the_first_rounds_do_not_count(monkeypatch, tmp_path):
    _fake(monkeypatch, lambda name, frames, turn: 1000.0 if turn <= 2 else 1.0)
    result = stopwatch.measure(None, tmp_path, [8], None, [Condition(0), Condition(0, vidsieve.load("random"))])
    assert all(row["ms"]["all"]["max"] == 1.0 for row in result["rows"])


def test_what_cannot_run_is_told(scene, testbed):
    model, processor = testbed
    conditions = [Condition(0), Condition(0, vidsieve.load("fastv", retention=0.1))]
    result = stopwatch.measure(
        adapter_for(model),
        scene,
        [8],
        lambda video: chat(processor, video, "where ?"),
        conditions,
        repeats=1,
        warm_up=0,
        new_tokens=1,
    )
    assert [row["method"] for row in result["rows"]] == ["full"]
    assert "0.33" in result["refused"][0]["reason"]


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
    adapter = adapter_for(made.model)
    one = stopwatch.once(
        adapter,
        scene,
        4,
        lambda video: made.inputs(video, 11),
        Condition(0, vidsieve.load("uniform", retention=0.25)),
        new_tokens=2,
    )
    total, kept = one.visual
    assert kept == total // 4 and one.prompt[0] - one.prompt[1] == total - kept
    assert tokens is None or total == tokens - 1
    assert all(one.ms[part] > 0 for part in stopwatch.PARTS)


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
