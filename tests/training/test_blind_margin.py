"""The margin over what the model answers without the video."""

from __future__ import annotations

import math

import pytest
import torch

from vidsieve.adapters.pruning import adapter_for
from vidsieve.testbed.questions import make_questions
from vidsieve.testbed.world import make_cast
from vidsieve.testing.equivalence import configuration
from vidsieve.testing.tiny_models import END, FAMILIES, IMAGE, START, USER, VIDEO
from vidsieve.training.advantages import group_advantage
from vidsieve.training.data.filtering import blind_answers
from vidsieve.training.data.scenes import ScenePrompts
from vidsieve.training.recipes import train_policy
from vidsieve.training.rewards import margin_reward
from vidsieve.training.rollouts import Rollouts
from vidsieve.training.run_folder import read_metrics

QUICK = {"steps": 2, "prompts_per_step": 2, "log_every": 1, "seed": 5, "reward": "margin", "eval_prompts": 0}


def test_each_option_is_measured_by_what_the_video_adds():
    """By hand: the wrong option that the words make likely anyway no longer counts as the strongest."""
    with_video = torch.tensor([[0.5, 0.3, 0.2], [0.2, 0.3, 0.5]]).log()
    without = torch.tensor([0.25, 0.05, 0.70]).log()
    wanted = [math.log(0.5 / 0.25) - math.log(0.3 / 0.05), math.log(0.2 / 0.25) - math.log(0.3 / 0.05)]
    assert margin_reward(with_video, 0, without).tolist() == pytest.approx(wanted, abs=1e-5)
    assert margin_reward(with_video + 3, 0, without - 5).tolist() == pytest.approx(wanted, abs=1e-5), "logits will do"
    plain = margin_reward(with_video, 0)
    assert plain.tolist() == pytest.approx([math.log(0.5 / 0.3), math.log(0.2 / 0.5)], abs=1e-5)


def test_it_changes_advantages_unless_there_are_two_options():
    draw = torch.Generator().manual_seed(0)
    logits, blind = torch.randn(16, 4, generator=draw), 2 * torch.randn(4, generator=draw)

    def gap(options):
        some = logits[:, :options]
        plain, debiased = margin_reward(some, 1), margin_reward(some, 1, blind[:options])
        return float((group_advantage(plain) - group_advantage(debiased)).abs().max())

    assert gap(4) > 0.1, "a constant a prompt would have cancelled"
    assert gap(2) < 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_the_prompt_without_its_video(family):
    """What is left are the words around the video, at positions counted anew, and no trace of its features."""
    adapter, inputs = adapter_for(FAMILIES[family]()), configuration(family, "batch 1")
    options = torch.tensor([5, 6, 7])
    found = Rollouts(adapter, inputs).blind_logits(options)
    ids = inputs["input_ids"][0].tolist()
    places = [i for i, token in enumerate(ids) if token in (VIDEO, IMAGE)]
    ends = (1, 1) if family.startswith("qwen") else (0, 0)  # vision_start and vision_end, in their configurations
    words = torch.tensor([ids[: places[0] - ends[0]] + ids[places[-1] + 1 + ends[1] :]])
    assert words[0, :2].tolist() == [START, USER] and END in words[0].tolist()
    with torch.no_grad():
        wanted = adapter.model(input_ids=words, attention_mask=torch.ones_like(words)).logits[0, -1, options]
    assert torch.allclose(found, wanted, atol=1e-5)


def test_blind_answers_are_those_of_the_filter(testbed):
    """The filter writes the prompt anew without a video; here it is cut out of the ready one."""
    model, processor = testbed
    prompts = ScenePrompts(adapter_for(model), processor, seed=3)
    questions = make_questions(make_cast("dense", 3, 0), 3, 0)
    rows = [{"video": "", "question": q.text, "options": list(q.options), "answer": q.answer} for q in questions]
    wanted = blind_answers(model, processor, rows)
    found = []
    for turn in range(min(8, len(questions))):
        sample = prompts.choice(32 * turn)
        blind = Rollouts(prompts.adapter, sample.inputs).blind_logits(sample.option_ids)
        found.append(int(blind.argmax()) == sample.answer)
    assert found == wanted[: len(found)]


def test_training_with_it(testbed, tmp_path, monkeypatch):
    """One prefill without the video a prompt, over all its iterations; the share of blind answers is logged."""
    original, calls = Rollouts.blind_logits, []

    def noted(self, option_ids):
        calls.append(1)
        return original(self, option_ids)

    monkeypatch.setattr(Rollouts, "blind_logits", noted)
    model, processor = testbed
    runs = {
        name: train_policy("cacovid", model, processor, tmp_path / name, QUICK | {"iterations": 2} | more)
        for name, more in (("plain", {}), ("debiased", {"blind_margin": True}))
    }
    assert len(calls) == 8, "two runs of two steps of two prompts"
    plain, debiased = (runs[name]["last_metrics"] for name in ("plain", "debiased"))
    assert plain["blind"] == debiased["blind"] in (0, 0.5, 1)
    assert plain["reward"] != debiased["reward"] and math.isfinite(debiased["loss"])


def test_blind_answers_are_counted_until_a_warning_could_be_read(testbed, tmp_path):
    model, processor = testbed
    settings = QUICK | {"steps": 5, "prompts_per_step": 1, "reward": "choice"}
    train_policy("cacovid", model, processor, tmp_path, settings)
    assert ["blind" in line for line in read_metrics(tmp_path)] == [True, True, True, False, False]
