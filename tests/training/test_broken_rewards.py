"""Rollouts that the frozen LLM breaks on: left out, counted, and an error where nothing else is left."""

from __future__ import annotations

import math

import pytest
import torch

from vidsieve.adapters.pruning import adapter_for
from vidsieve.compressors.score import ScorePolicy
from vidsieve.errors import TrainingError
from vidsieve.training.advantages import finite_mean, group_advantage, leave_one_out, over_finite, split_advantage
from vidsieve.training.data.scenes import ScenePrompts
from vidsieve.training.recipes import train_policy
from vidsieve.training.rewards import choice_reward
from vidsieve.training.rollouts import Rollouts
from vidsieve.training.score import ScoreTrainer
from vidsieve.training.settings import ScoreConfig
from vidsieve.training.trainer import CHECKPOINT

NAN, INF = math.nan, math.inf
QUICK = {"steps": 2, "prompts_per_step": 2, "log_every": 1, "seed": 5, "eval_prompts": 0}


@pytest.mark.parametrize("broken", [NAN, INF, -INF])
@pytest.mark.parametrize("advantage", [group_advantage, leave_one_out])
def test_what_is_not_finite_is_not_in_the_group(advantage, broken):
    rewards = torch.tensor([0.5, broken, -1.0, 2.0, broken])
    found = over_finite(advantage, rewards)
    assert found[[1, 4]].tolist() == [0.0, 0.0]
    assert torch.equal(found[[0, 2, 3]], advantage(torch.tensor([0.5, -1.0, 2.0])))
    assert torch.equal(over_finite(advantage, torch.tensor([broken, broken])), torch.zeros(2))
    whole = torch.tensor([0.5, -1.0, 2.0])
    assert torch.equal(over_finite(advantage, whole), advantage(whole))


def test_the_split_advantage_too():
    found = over_finite(split_advantage, torch.tensor([0.5, NAN, 0.5, -0.5]), torch.tensor([0.2, 0.9, 0.4, 0.5]))
    assert found.tolist() == pytest.approx([-0.5, 0.0, 0.5, -0.25], abs=1e-4)


def test_means_of_what_is_finite():
    assert finite_mean(torch.tensor([1.0, NAN, 3.0, INF])) == 2.0
    assert math.isnan(finite_mean(torch.tensor([NAN])))


def test_broken_logits_are_no_answer():
    """argmax takes NaN for the largest logit."""
    logits = torch.tensor([[NAN, NAN], [1.0, 2.0], [2.0, 1.0], [INF, 1.0]])
    assert choice_reward(logits, 0)[1:3].tolist() == [0.0, 1.0]
    assert choice_reward(logits, 0)[[0, 3]].isnan().all()


def breaking(monkeypatch, which):
    """Make the frozen LLM's output NaN for rollouts that `which(call, rollouts)` names, over the calls of an engine."""
    for name in ("option_logits", "caption_ce"):
        original, calls = getattr(Rollouts, name), []

        def broken(self, masks, *args, original=original, calls=calls):
            found = original(self, masks, *args)
            calls.append(1)
            found[which(len(calls) - 1, len(found))] = NAN
            return found

        monkeypatch.setattr(Rollouts, name, broken)


@pytest.mark.parametrize("reward", ["choice", "margin"])
@pytest.mark.parametrize("method", ["cacovid", "score"])
def test_training_goes_on_without_the_broken_ones(testbed, tmp_path, monkeypatch, method, reward):
    breaking(monkeypatch, lambda call, count: [0, count - 1])
    model, processor = testbed
    more = {"reward": reward} if method == "cacovid" else {}
    record = train_policy(method, model, processor, tmp_path, QUICK | more)
    last = record["last_metrics"]
    assert record["steps"] == 2 and last["skipped"] == 0
    assert all(math.isfinite(value) for value in last.values())


@pytest.mark.parametrize("method", ["cacovid", "score"])
def test_a_group_of_broken_ones_is_skipped_and_counted(testbed, tmp_path, monkeypatch, method):
    """Of two prompts a step one is broken; for CaCoVID those are two groups, of tokens and of frames."""
    breaking(monkeypatch, lambda call, count: slice(None) if call % 2 else [])
    model, processor = testbed
    more = {"frame_rollouts": 8} if method == "cacovid" else {}
    record = train_policy(method, model, processor, tmp_path, QUICK | more)
    last = record["last_metrics"]
    assert record["steps"] == 2 and last["skipped"] == (1.0 if method == "cacovid" else 0.5)
    assert all(math.isfinite(value) for value in last.values())


def test_one_broken_group_of_a_prompt_leaves_the_other(testbed, tmp_path, monkeypatch):
    breaking(monkeypatch, lambda call, count: slice(24, None))
    model, processor = testbed
    last = train_policy("cacovid", model, processor, tmp_path, QUICK | {"frame_rollouts": 8})["last_metrics"]
    assert last["skipped"] == 1 and math.isfinite(last["loss"]) and math.isfinite(last["reward"])


def test_an_iteration_of_broken_rollouts_leans_on_the_ones_before(testbed, tmp_path, monkeypatch):
    """The engine's calls: two prompts in iteration 1, the same two, broken, in iteration 2."""
    breaking(monkeypatch, lambda call, count: slice(None) if call % 4 > 1 else [])
    model, processor = testbed
    more = {"iterations": 2, "dynamic_ratio": True}
    last = train_policy("cacovid", model, processor, tmp_path, QUICK | more)["last_metrics"]
    assert last["skipped"] == 0 and all(math.isfinite(value) for value in last.values())


@pytest.mark.parametrize(
    ("method", "names"), [("cacovid", "reward 'choice' is nan"), ("score", "reward of the caption is nan")]
)
def test_a_step_of_broken_prompts_stops_and_names_them(testbed, tmp_path, monkeypatch, method, names):
    breaking(monkeypatch, lambda call, count: slice(None) if call > 1 else [])
    model, processor = testbed
    with pytest.raises(TrainingError, match=f"step 2 .* good checkpoint .*{names} in every .* sample 2; .* 3"):
        train_policy(method, model, processor, tmp_path, QUICK | {"save_every": 1})
    assert (tmp_path / CHECKPOINT).exists()


def test_a_sample_without_memory_is_named(testbed, tmp_path, monkeypatch):
    original, calls = ScoreTrainer.train_step, []

    def full(self, prompt):
        calls.append(prompt)
        if len(calls) == 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return original(self, prompt)

    monkeypatch.setattr(ScoreTrainer, "train_step", full)
    with pytest.raises(
        TrainingError, match=r"sample 3 is too large for the GPU's memory: .* good checkpoint .* --frames"
    ):
        train_policy("score", *testbed, tmp_path, QUICK | {"save_every": 1})


def test_a_broken_cross_entropy_under_all_tokens_breaks_the_split(testbed, tmp_path, monkeypatch):
    breaking(monkeypatch, lambda call, count: slice(None) if count == 1 else [])
    model, processor = testbed
    sample = ScenePrompts(adapter_for(model), processor, seed=3).caption(0)
    policy = ScorePolicy.start(128, "llava_onevision", hidden=16, seed=5)
    result = ScoreTrainer(adapter_for(model), policy, ScoreConfig(), lambda number: sample, tmp_path).train_step(sample)
    assert result.loss is None and result.metrics == {"skipped": 1.0} and "nan" in result.broken
