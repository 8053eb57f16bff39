"""The engine under the trainers: packing changes speed, never results; memory bounds it, and running out halves it."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch

from vidsieve import load
from vidsieve.adapters.pruning import adapter_for
from vidsieve.compressors.score import ScorePolicy
from vidsieve.errors import TrainingError, UnsupportedCallError
from vidsieve.io.machine import total_memory
from vidsieve.testbed.files import write_scenes
from vidsieve.testing.equivalence import configuration
from vidsieve.testing.tiny_models import FAMILIES
from vidsieve.training import rollouts as engine
from vidsieve.training.data.prompts import FilePrompts
from vidsieve.training.data.scenes import ScenePrompts
from vidsieve.training.recipes import train_policy
from vidsieve.training.rewards import margin_reward
from vidsieve.training.rollouts import CPU_SHARE, CPU_TOKENS, Footprint, Packing, Rollouts
from vidsieve.training.score import ScoreTrainer
from vidsieve.training.settings import ScoreConfig
from vidsieve.training.sources import Files

QUICK = {"steps": 2, "prompts_per_step": 2, "log_every": 1, "seed": 5, "eval_prompts": 0}


def random_masks(count, tokens, seed=0):
    """Masks (count, tokens) from nearly empty to full."""
    draw = torch.Generator().manual_seed(seed)
    masks = torch.rand(count, tokens, generator=draw) < torch.linspace(0.0, 1.0, count)[:, None]
    masks[:, 3] = True
    return masks


def captioned(family):
    """A tiny model's adapter and a prompt of which the last four words are the caption."""
    adapter, inputs = adapter_for(FAMILIES[family]()), configuration(family, "batch 1")
    labels = torch.full_like(inputs["input_ids"], -100)
    labels[:, -4:] = inputs["input_ids"][:, -4:]
    return adapter, inputs | {"labels": labels}


def everything(rollouts, masks, options):
    logits = rollouts.option_logits(masks, options)
    return {"choice": logits, "margin": margin_reward(logits, 1), "ce": rollouts.caption_ce(masks)}


def assert_same(adapter, inputs, masks, options, steps, tolerance=1e-5):
    """Packed and one by one: equal to the tolerance, answers equal to the letter."""
    alone, packed = (Rollouts(adapter, inputs, Packing(adapter.model, tokens)) for tokens in (1, 100_000))
    assert alone.packing.rows(50) == 1 and packed.packing.rows(50) > len(masks)
    one, other = everything(alone, masks, options), everything(packed, masks, options)
    for name, values in one.items():
        gap = (values - other[name]).abs().max() / max(1.0, float(values.abs().max()))
        assert float(gap) < tolerance, name
    assert torch.equal(alone.generate(masks, steps), packed.generate(masks, steps))


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_is_one_by_one(family):
    adapter, inputs = captioned(family)
    tokens = adapter.encode(inputs).videos[0].features.grid.num_tokens
    assert_same(adapter, inputs, random_masks(9, tokens), torch.tensor([5, 6, 7]), steps=4)


def test_packed_is_one_by_one_on_the_testbed(testbed):
    """A trained model: answers end, some rows before others; captions are long."""
    model, processor = testbed
    prompts = ScenePrompts(adapter_for(model), processor, seed=3)
    asked, masks = prompts.choice(0), random_masks(8, 576)
    assert_same(prompts.adapter, prompts.caption(0).inputs, masks, asked.option_ids, steps=3)
    alone, packed = (Rollouts(prompts.adapter, asked.inputs, Packing(model, n)) for n in (1, 100_000))
    one, other = (rollouts.option_logits(masks, asked.option_ids) for rollouts in (alone, packed))
    assert float((one - other).abs().max() / one.abs().max()) < 1e-5
    assert torch.equal(alone.generate(masks, 16), packed.generate(masks, 16))


def _sizes(adapter, inputs, masks):
    """Tokens of the longest rollout, and positions whose logits a caption of four words needs."""
    text = inputs["input_ids"].shape[1] - masks.shape[1]
    return text + int(masks.sum(1).max()), 5


@pytest.fixture
def scarce(monkeypatch):
    """A model whose memory ends at `limit` tokens a prefill, and the sizes of prefills that were tried."""
    adapter, inputs = captioned("qwen2_5_vl")
    original, tried = adapter.model.forward, []

    def forward(*args, input_ids=None, **kwargs):
        tried.append(input_ids.shape[0])
        if input_ids.shape[0] > scarcity["rows"]:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return original(*args, input_ids=input_ids, **kwargs)

    scarcity = {"rows": 5}
    monkeypatch.setattr(adapter.model, "forward", forward)
    return adapter, inputs, scarcity, tried


def test_running_out_of_memory_halves_and_is_remembered(scarce):
    adapter, inputs, scarcity, tried = scarce
    masks = random_masks(20, adapter.encode(inputs).videos[0].features.grid.num_tokens)
    options = torch.tensor([5, 6, 7])
    packing = Packing(adapter.model, 1_000_000)
    logits = Rollouts(adapter, inputs, packing).option_logits(masks, options)
    assert tried == [20, 10, 5, 5, 5, 5], "halved until it fits, then no more"
    tried.clear()
    again = Rollouts(adapter, inputs, packing)
    assert torch.equal(again.option_logits(masks, options), logits)
    assert tried == [5, 5, 5, 5], "the next prompt does not try again what failed"
    tried.clear()
    assert len(again.caption_ce(masks)) == 20
    assert max(tried) <= 5, "a caption's logits take more, never less"
    packing.footprint = replace(packing.footprint, logits=1_000_000)
    scarcity["rows"], packing.bytes = 20, 5 * packing.footprint.rollout(*_sizes(adapter, inputs, masks)) + 1
    tried.clear()
    again.caption_ce(masks)
    assert tried == [5, 5, 5, 5], "a caption's logits over the vocabulary are part of what must fit"
    scarcity["rows"] = 0
    with pytest.raises(TrainingError, match=r"single rollout of \d+ tokens .* does not fit .* fewer frames"):
        again.option_logits(masks, options)


def test_other_errors_are_not_taken_for_memory(scarce, monkeypatch):
    adapter, inputs, *_ = scarce

    def broken(*args, **kwargs):
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(adapter.model, "forward", broken)
    rollouts = Rollouts(adapter, inputs)
    with pytest.raises(RuntimeError, match="shapes do not match"):
        rollouts.caption_ce(random_masks(3, rollouts.video().num_tokens))


def test_the_size_found_on_the_cpu_is_a_function_of_model_and_machine(monkeypatch):
    model = FAMILIES["llava_onevision"]()
    found, again = Packing(model), Packing(model)
    assert found.record() == again.record() == {"tokens": CPU_TOKENS, "bytes": total_memory() // CPU_SHARE}
    assert total_memory() > 2**28
    cost = found.footprint
    monkeypatch.setattr(engine, "total_memory", lambda: CPU_SHARE * 10 * cost.rollout(60, positions=20))
    small = Packing(model)
    assert small.rows(60, positions=20) == 10, "a caption's logits over the vocabulary count"
    assert small.rows(60) > 10 > small.rows(100, positions=40)
    assert small.rows(60, positions=20, cache=True) < 10, "so does a cache"
    assert small.rows(10_000) == 1, "never less than one"
    assert Packing(model, 500).record() == {"tokens": 500, "bytes": None}
    assert Packing(model, 500).rows(60) == 8


def test_a_footprint_follows_the_configuration():
    """float32, 3 layers of width 64 (96 inside), 4 heads over 2 of keys and values of 16, 128 words."""
    model = FAMILIES["llava_onevision"]()
    cost = Footprint.of(model)
    assert cost == Footprint(token=4 * (8 * 64 + 3 * 96), pair=4, logits=128 * 12, cached=2 * 4 * 3 * 2 * 16)
    assert cost.rollout(10, 2, cache=True) == 10 * (cost.token + cost.cached) + 400 + 2 * cost.logits
    model.set_attn_implementation("eager")
    assert Footprint.of(model).pair == 4 * 9, "eager attention holds the scores of every head"


@pytest.mark.parametrize("method", ["cacovid", "score"])
def test_rollout_tokens_reaches_the_engine_and_the_record(testbed, tmp_path, method):
    """The same run in packings of one rollout: the same figures but for float noise."""
    model, processor = testbed
    records = [
        train_policy(method, model, processor, tmp_path / str(tokens), QUICK | {"rollout_tokens": tokens})
        for tokens in (0, 1)
    ]
    assert records[0]["packing"] == {"tokens": CPU_TOKENS, "bytes": total_memory() // CPU_SHARE}
    assert records[1]["packing"] == {"tokens": 1, "bytes": None}
    assert json.loads((tmp_path / "1" / "policy" / "config.json").read_text())["training"]["packing"]["tokens"] == 1
    first, second = (record["last_metrics"] for record in records)
    for name in {"loss", "reward", "right", "ce"} & first.keys():
        assert math.isclose(first[name], second[name], abs_tol=2e-3), name


def test_a_run_may_go_on_with_smaller_prefills(testbed, tmp_path):
    model, processor = testbed
    train_policy("score", model, processor, tmp_path, QUICK)
    more = QUICK | {"steps": 3, "rollout_tokens": 700}
    record = train_policy("score", model, processor, tmp_path, more, resume=True)
    assert record["steps"] == 3 and record["packing"]["tokens"] == 700


def test_captions_without_a_word_are_refused():
    adapter, inputs = captioned("llava_onevision")
    masks = random_masks(3, adapter.encode(inputs).videos[0].features.grid.num_tokens)
    nothing = torch.full_like(inputs["labels"], -100)
    with pytest.raises(UnsupportedCallError, match="the caption is empty"):
        Rollouts(adapter, inputs | {"labels": nothing}).caption_ce(masks)
    first = nothing.clone()
    first[0, 0] = 3  # nothing stands before it
    with pytest.raises(UnsupportedCallError, match="the caption is empty"):
        Rollouts(adapter, inputs | {"labels": first}).caption_ce(masks)


def test_labels_with_a_gap_all_count():
    """Two stretches of labels, as two turns have them: every labelled word is in the mean."""
    adapter, inputs = captioned("llava_onevision")
    labels, ids = torch.full_like(inputs["labels"], -100), inputs["input_ids"]
    labels[:, -7:-5], labels[:, -2:] = ids[:, -7:-5], ids[:, -2:]
    mask = random_masks(2, adapter.encode(inputs).videos[0].features.grid.num_tokens)[1:]
    rollouts = Rollouts(adapter, inputs | {"labels": labels})
    batch = adapter.build(rollouts.encoded, [rollouts.encoded.everything()]).inputs
    with torch.no_grad():
        whole = adapter.model(**batch).loss
    assert float(rollouts.caption_ce(mask)) == pytest.approx(float(whole), abs=1e-5)


@pytest.fixture
def full_prefills(monkeypatch):
    """Every selection list of all tokens that a caption's cross-entropy was asked for."""
    original, seen = Rollouts.caption_ce, []

    def noted(self, kept):
        if not isinstance(kept, torch.Tensor):
            seen.append([len(selection.indices) for selection in kept])
        return original(self, kept)

    monkeypatch.setattr(Rollouts, "caption_ce", noted)
    return seen


@pytest.mark.parametrize(("key", "wanted"), [("row 7", 1), ("", 2)])
def test_the_full_video_is_read_once_a_row(testbed, tmp_path, full_prefills, key, wanted):
    """The second visit of a row costs no prefill of all tokens, and gives the same loss."""
    model, processor = testbed
    adapter = adapter_for(model)
    sample = replace(ScenePrompts(adapter, processor, seed=3).caption(0), key=key)
    policy = ScorePolicy.start(128, "llava_onevision", hidden=16, seed=5)
    trainer = ScoreTrainer(adapter, policy, ScoreConfig(), lambda number: sample, tmp_path)
    results = []
    for _ in range(2):
        trainer.generator.manual_seed(0)
        results.append(trainer.train_step(sample))
    assert full_prefills == [[576]] * wanted
    first, second = (result.loss.item() for result in results)
    assert first == second != 0 and results[0].metrics == results[1].metrics
    whole = Rollouts(adapter, sample.inputs).caption_ce(torch.ones(1, 576, dtype=torch.bool))
    assert results[1].metrics["ce_full"] == pytest.approx(float(whole))


def test_passes_over_a_file_and_resumed_runs(testbed, tmp_path, full_prefills):
    """Three rows, three passes: three full prefills; a run that goes on after the first pass ends the same."""
    model, processor = testbed
    write_scenes(tmp_path / "scenes", world="dense", seed=1, scenes=3)
    data = tmp_path / "scenes" / "questions.jsonl"
    settings = QUICK | {"steps": 3, "prompts_per_step": 3, "save_every": 1, "rollouts": 4}
    options = {"variant": "paper", "files": Files(data)}
    train_policy("score", model, processor, tmp_path / "straight", settings, **options)
    assert full_prefills.count([576]) == 3
    train_policy("score", model, processor, tmp_path / "broken", settings | {"steps": 1}, **options)
    train_policy("score", model, processor, tmp_path / "broken", settings, resume=True, **options)
    a, b = (load(tmp_path / name / "policy").policy.state_dict() for name in ("straight", "broken"))
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_rows_of_a_file_and_scenes_have_keys(testbed, tmp_path):
    model, processor = testbed
    write_scenes(tmp_path, world="dense", seed=1, scenes=3)
    prompts = FilePrompts(adapter_for(model), processor, tmp_path / "questions.jsonl", seed=2)
    first, second = ([prompts.caption(turn + i) for i in range(3)] for turn in (0, 3))
    assert {sample.key for sample in first} == {sample.key for sample in second} and "" not in {s.key for s in first}
    words = {sample.key: sample.inputs["input_ids"].tolist() for sample in first}
    assert len(words) == 3 and all(words[sample.key] == sample.inputs["input_ids"].tolist() for sample in second)
    scenes = ScenePrompts(adapter_for(model), processor, seed=3)
    assert scenes.caption(0).key != scenes.caption(1).key


def test_an_llm_of_experts_alone_has_a_footprint():
    """Qwen3.5-MoE's published configurations state no width of an MLP: 8 experts of 512 and a shared one."""
    from transformers import Qwen3_5MoeForConditionalGeneration as Model

    with torch.device("meta"):
        model = Model(Model.config_class())
    text = model.config.get_text_config()
    assert not hasattr(text, "intermediate_size")
    assert Footprint.of(model).token == 4 * (8 * text.hidden_size + 3 * 9 * 512)
