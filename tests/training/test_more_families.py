"""Methods before the LLM and training steps on families whose LLMs are unlike LLaVA's: experts, recurrent layers."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import vidsieve
from vidsieve import registry
from vidsieve.adapters.pruning import adapter_for
from vidsieve.compressors._decoder import BlockShape
from vidsieve.compressors.cacovid import CaCoVIDPolicy
from vidsieve.compressors.score import ScorePolicy
from vidsieve.compressors.sieve import SievePolicy
from vidsieve.errors import NeedError, PolicyError, TrainingError
from vidsieve.selection import kept_tokens
from vidsieve.training.cacovid import CaCoVIDTrainer
from vidsieve.training.data.samples import Caption, Choice
from vidsieve.training.recipes import at_width, new_cacovid, new_policy
from vidsieve.training.score import ScoreTrainer
from vidsieve.training.settings import CaCoVIDConfig, ScoreConfig, SieveConfig, config_of
from vidsieve.training.sieve import SieveTrainer
from vidsieve.types import Stage
from workbench.families import tiny

FAMILIES = pytest.mark.parametrize("family", ["qwen3_5", "qwen3_vl_moe", "gemma4"])


def before_the_llm() -> list[str]:
    """Return the methods with a part before the LLM, that part alone where there are two."""
    return [name for name in registry.compressors if registry.compressors.get(name).stage is Stage.PRE_LLM]


@FAMILIES
def test_every_method_before_the_llm_keeps_its_budget(family):
    kind = tiny(family)
    model, inputs = kind.model(0, kind.layers), kind.inputs([[4]], [5], "left")
    total = adapter_for(model).encode(inputs).videos[0].features.grid.num_tokens
    for name in before_the_llm():
        method = registry.compressors.get(name)
        if method.trained:
            compressor = method.untrained(model.get_input_embeddings().embedding_dim, retention=0.5)
            compressor.policy.config = replace(compressor.policy.config, family=family)
        else:
            compressor = vidsieve.load(name, retention=0.5)
        if compressor.needs - adapter_for(model).provides:
            continue
        with vidsieve.attach(model, compressor) as session:
            model.generate(**inputs, max_new_tokens=2, do_sample=False)
        (trace,) = session.trace.videos
        assert compressor.adaptive_budget or len(trace.indices) == kept_tokens(0.5, total), name


@FAMILIES
def test_a_training_step_moves_the_policy(family, tmp_path):
    kind = tiny(family)
    model = kind.model(0, kind.layers).requires_grad_(False)
    adapter, inputs = adapter_for(model), kind.inputs([[3]], [5], "left")
    labels = torch.full_like(inputs["input_ids"], -100)
    labels[:, -4:] = inputs["input_ids"][:, -4:]
    choice = Choice(inputs, torch.tensor([5, 6, 7]), 1)
    caption = Caption(inputs | {"labels": labels})
    small = {"seed": 1, "eval_prompts": 0}
    cacovid = CaCoVIDConfig(**small, ratio=0.2, frame_rollouts=0, token_rollouts=8, reward="margin")
    score = ScoreConfig(**small, rollouts=6, hidden=16)
    sieve = SieveConfig(**small, rate_low=0.1, rate_high=0.5, frame_rollouts=0, token_rollouts=8, reward="margin")
    trainers = (
        (CaCoVIDTrainer, new_cacovid(adapter, cacovid, "ours", family), cacovid, choice),
        (ScoreTrainer, ScorePolicy.start(adapter.hidden_size, family, hidden=16, seed=1), score, caption),
        (SieveTrainer, SievePolicy.start(adapter.hidden_size, family, seed=1), sieve, choice),
    )
    for trainer, policy, config, sample in trainers:
        step = trainer(adapter, policy, config, lambda number, sample=sample: sample, tmp_path)
        result = step.train_step(step.prepare(sample))
        assert result.loss is not None and bool(torch.isfinite(result.loss))
        result.loss.backward()
        gradients = [p.grad for p in policy.parameters() if p.grad is not None]
        assert gradients and all(bool(torch.isfinite(g).all()) for g in gradients)
        assert any(bool((g != 0).any()) for g in gradients)


@pytest.mark.parametrize("family", ["qwen3_vl_moe", "qwen3_5_moe"])
def test_a_policy_that_would_start_from_a_layer_of_experts_is_refused_in_words(family):
    kind = tiny(family)
    adapter = adapter_for(kind.model(0, kind.layers))
    with pytest.raises((PolicyError, NeedError), match=r"mlp.gate_proj.weight is not there|attention has a gate"):
        new_cacovid(adapter, CaCoVIDConfig(body="layer"), "paper", family)


def test_a_policy_takes_over_the_attention_of_a_layer_of_experts():
    kind = tiny("qwen3_vl_moe")
    adapter = adapter_for(kind.model(0, kind.layers))
    wanted = adapter.decoder_layers[0].self_attn.q_proj.weight
    for config, variant in ((CaCoVIDConfig(body="attention"), "paper"), (CaCoVIDConfig(start="first_look"), "ours")):
        policy = new_cacovid(adapter, config, variant, "qwen3_vl_moe")
        block = policy.scorer.first_look if policy.body == "question" else policy.layers[0]
        assert torch.equal(block.self_attn.q_proj.weight, wanted)


def test_objectives_that_weight_tokens_are_refused_where_others_enter_past_the_weights():
    adapter = adapter_for(tiny("qwen3_vl_moe").model(0, tiny("qwen3_vl_moe").layers))
    for method, settings in (("visionselector", {}), ("cacovid", {"objective": "straight_through"})):
        with pytest.raises(TrainingError, match=r"qwen3_vl_moe adds other features to its first \d layers"):
            new_policy(adapter, config_of(method, "ours", settings), "ours", "qwen3_vl_moe")


def test_default_learning_rates_follow_the_width_and_given_ones_stay():
    said = []
    wide = at_width(config_of("cacovid", "ours", {}), "ours", {}, 3584, said.append)
    assert wide.head_lr == pytest.approx(0.004 / 28) and "head_lr is 0.00014: the default, 0.004" in " ".join(said)
    assert wide.body_lr == config_of("cacovid", "ours", {}).body_lr, "the question path has no such layers"
    paper = at_width(config_of("cacovid", "paper", {}), "paper", {}, 3584, said.append)
    assert paper.body_lr == pytest.approx(1e-4 / 28) and paper.head_lr == pytest.approx(1e-3 / 28)
    given = {"head_lr": 0.002}
    assert at_width(config_of("cacovid", "ours", given), "ours", given, 3584, said.append).head_lr == 0.002
    for method in ("cacovid", "sieve", "visionselector", "score"):
        config = config_of(method, "ours", {})
        assert at_width(config, "ours", {}, 128, said.append) == config, "as the testbed's policies were trained"
    assert at_width(config_of("score", "ours", {}), "ours", {}, 3584, said.append).lr == 0.001


def test_a_policy_says_which_part_of_a_layer_has_another_shape():
    shape = BlockShape.of_width(64)
    policy = CaCoVIDPolicy.of_shape(shape, "none", variant="paper")
    weights = policy.layers[0].state_dict()
    weights["self_attn.q_proj.weight"] = torch.zeros(128, 64)
    with pytest.raises(PolicyError, match=r"self_attn.q_proj.weight is \(128, 64\) where the policy's block has"):
        CaCoVIDPolicy.of_shape(shape, "none", variant="paper", layers=[weights])
