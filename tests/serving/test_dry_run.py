"""`vidsieve train --dry-run`: what it predicts against counts of what a training does."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner

from vidsieve.adapters.pruning import adapter_for
from vidsieve.cli.main import app
from vidsieve.compressors.sieve import SievePolicy
from vidsieve.errors import TrainingError, UnknownNameError
from vidsieve.serving.dry_run import dry_run, kept_by_rollouts
from vidsieve.serving.plan import Gpu
from vidsieve.training import sampling
from vidsieve.training.cacovid import CaCoVIDTrainer
from vidsieve.training.data.scenes import ScenePrompts
from vidsieve.training.recipes import new_cacovid
from vidsieve.training.rollouts import Footprint, Rollouts
from vidsieve.training.settings import SETTINGS, CaCoVIDConfig, ScoreConfig, SieveConfig
from vidsieve.types import Selection

COUNTING = Gpu("an operation a second", 1e-12, math.inf, 100, 1, 1)
"""Its seconds are operations."""


def predicted(method="cacovid", model="testbed", settings=None, **more):
    return dry_run(method, model, settings or {}, more.pop("gpu", COUNTING), **more)


def operations(work):
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):  # others are not counted
        work()
    return counter.get_total_flops()


@pytest.mark.parametrize(("variant", "iterations"), [("ours", 1), ("paper", 2)])
def test_a_prompts_operations_are_those_of_a_training_step(testbed, tmp_path, variant, iterations):
    """Rollouts and policy of a real step, counted by torch; the text is as long as the prompt's."""
    adapter = adapter_for(testbed[0])
    config = CaCoVIDConfig(**SETTINGS["cacovid", variant] | {"iterations": iterations, "prompts_per_step": 1})
    policy = new_cacovid(adapter, config, variant, "testbed")
    prompts = ScenePrompts(adapter, testbed[1], seed=3)
    trainer = CaCoVIDTrainer(adapter, policy, config, prompts.choice, tmp_path)
    trainer.step = 10**6  # past the steps that also answer without the video
    sample = prompts.choice(0)
    text = len(sample.inputs["input_ids"][0]) - 576
    found = predicted(settings={"iterations": iterations}, variant=variant, text_tokens=text - 1)  # and a newline

    prompt = trainer.prepare(sample)
    masks = torch.zeros(24, 576, dtype=torch.bool)
    masks[:, :48] = True
    rollouts = iterations * operations(lambda: prompt.rollouts.option_logits(masks, sample.option_ids))
    assert found["rollouts_s"] == pytest.approx(rollouts, rel=0.1)

    def step():
        result = trainer.train_step(prompt)
        if result.loss is not None and result.loss.requires_grad:
            result.loss.backward()

    learning = sum(operations(step) for _ in range(iterations)) - rollouts
    assert found["policy_s"] == pytest.approx(learning, rel=0.3)
    assert found["policy_parameters"] == sum(p.numel() for p in policy.parameters())
    assert (found["rollouts_per_prompt"], found["video_tokens"]) == (24 * iterations, 576)


def test_hours_are_those_of_all_prompts_and_rates_count_all_parts():
    few = predicted(settings={"steps": 10, "prompts_per_step": 3})
    parts = [value for name, value in few.items() if name.endswith("_s") and name not in ("prompt_s", "rollouts_per_s")]
    assert few["prompt_s"] == pytest.approx(sum(parts))
    assert few["rollouts_per_s"] == pytest.approx(24 / sum(parts))
    assert few["hours"] == pytest.approx(30 * sum(parts) / 3600)
    assert predicted(settings={"reward": "agreement"})["all_tokens_s"] > predicted()["all_tokens_s"] == 0


def test_kept_by_rollouts_is_the_mean_of_what_they_draw():
    draw = torch.Generator().manual_seed(1)
    sieve = SieveConfig(**SETTINGS["sieve", "ours"] | {"rate_low": 0.05, "rate_high": 0.4})
    rates = [sampling.log_uniform(0.05, 0.4, draw) for _ in range(4000)]
    assert kept_by_rollouts(sieve, 36) == pytest.approx(sum(rates) / len(rates), rel=0.03)
    assert kept_by_rollouts(CaCoVIDConfig(ratio=0.083), 36) == 3 / 36
    assert kept_by_rollouts(CaCoVIDConfig(ratio=0.001), 36) == 1 / 36
    assert kept_by_rollouts(ScoreConfig(), 36) == 0.5


ANSWERS = {"taught": False, "blind_reward": "answer"}


def test_memory_is_weights_optimiser_and_the_largest_pack(testbed):
    found = predicted("sieve", settings=ANSWERS | {"token_rollouts": 8})
    size = sum(p.numel() for p in testbed[0].parameters())
    policy = SievePolicy.start(adapter_for(testbed[0]).hidden_size, "none")
    assert found["weights_bytes"] == 4 * size
    assert found["policy_bytes"] == 16 * sum(p.numel() for p in policy.parameters())
    assert found["rollouts_per_prefill"] == 8
    assert found["activations_bytes"] >= 8 * Footprint.of(testbed[0]).rollout(found["rollout_tokens"])
    assert found["memory_bytes"] == sum(found[f"{part}_bytes"] for part in ("weights", "policy", "activations"))
    rollout = Footprint.of(testbed[0]).rollout(found["rollout_tokens"])
    taken = found["weights_bytes"] + found["policy_bytes"]
    small = predicted("sieve", settings=ANSWERS, gpu=replace(COUNTING, cpu=True, memory=1e-9 * (taken + 20 * rollout)))
    assert small["rollouts_per_prefill"] == (taken + 20 * rollout) // (4 * rollout), "a quarter, as in training"
    full = predicted("sieve", settings=ANSWERS, gpu=replace(COUNTING, memory=1e-9 * (taken + 3.5 * rollout)))
    assert full["rollouts_per_prefill"] == 3, "what the model leaves on a GPU"
    with pytest.raises(TrainingError, match="no rollout fits beside them: take --precision bf16"):
        predicted("sieve", settings=ANSWERS, gpu=replace(COUNTING, memory=1e-9 * (taken + 0.5 * rollout)))


def test_captions_and_a_teacher_are_counted():
    """Rewards of captions lengthen every rollout; a teacher reads all tokens up to its layer."""
    answers, captions = (
        predicted("sieve", settings=ANSWERS),
        predicted("sieve", settings=ANSWERS | {"blind_reward": "caption"}),
    )
    assert captions["rollout_tokens"] == answers["rollout_tokens"] + 64
    taught, whole = predicted("sieve"), predicted("sieve", settings={"teacher": "attention"})
    assert taught["all_tokens_s"] == pytest.approx(3 / 8 * whole["all_tokens_s"], rel=0.01)
    assert predicted("sieve", settings={"teacher": "oracle"})["all_tokens_s"] == 0


@pytest.mark.parametrize("model", ["qwen2.5-vl-7b", "qwen3-vl-8b", "llava-onevision-7b"])
@pytest.mark.parametrize(("method", "variant"), [("cacovid", "paper"), ("cacovid", "ours"), ("score", "paper")])
def test_full_size_models_are_predicted_without_their_weights(model, method, variant):
    found = predicted(method, model, {"precision": "bf16"}, variant=variant)
    assert 14e9 < found["weights_bytes"] < 19e9
    assert found["rollout_tokens"] < found["video_tokens"]


def test_the_command_writes_nothing_but_its_figures(tmp_path):
    out = tmp_path / "figures.json"
    arguments = ["train", "cacovid", str(tmp_path / "run"), "--model", "qwen2.5-vl-7b", "--dry-run", "H100"]
    printed = CliRunner().invoke(app, [*arguments, "--precision", "bf16", "--json", str(out)]).output
    assert [path.name for path in tmp_path.iterdir()] == ["figures.json"]
    figures = json.loads(out.read_text())
    for label, shown in (
        ("rollouts per second", f"{figures['rollouts_per_s']:.3g}"),
        ("memory", f"{figures['memory_bytes'] / 1e9:.3g} GB"),
        ("memory: policy", f"{figures['policy_bytes'] / 1e9:.3g} GB"),
        ("time of a prompt: rollouts", f"{figures['rollouts_s']:.3g} s"),
    ):
        assert re.search(rf"{label} +│ +{re.escape(shown)} ", printed), label


def test_bad_input_is_refused(tmp_path):
    for objective in ("straight_through", "soft_topk"):
        with pytest.raises(TrainingError, match=f"'{objective}' differentiates"):
            predicted(settings={"objective": objective})
    with pytest.raises(UnknownNameError, match="variant of cacovid"):
        predicted(variant="theirs")
    result = CliRunner().invoke(app, ["train", "cacovid", str(tmp_path / "run"), "--dry-run", "H1000"])
    assert isinstance(result.exception, UnknownNameError)


def test_a_rollout_is_as_long_as_predicted(testbed):
    prompts = ScenePrompts(adapter_for(testbed[0]), testbed[1], seed=3)
    rollouts = Rollouts(prompts.adapter, prompts.choice(0).inputs)
    text = len(rollouts.encoded.input_ids[0]) - 576
    built = rollouts.build([Selection(torch.arange(48))]).inputs["input_ids"]
    assert built.shape[1] == predicted(text_tokens=text - 1)["rollout_tokens"]
