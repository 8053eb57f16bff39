"""The differentiable top-k: its mask and gradients, what it does to a prompt, and that every trainer learns by it."""

from __future__ import annotations

import math

import pytest
import torch

import vidsieve
from vidsieve.adapters.pruning import adapter_for
from vidsieve.errors import TrainingError
from vidsieve.training import cacovid
from vidsieve.training.controls import choice_loss, constraint_loss, soft_top_k, softly_selected
from vidsieve.training.data.scenes import ScenePrompts
from vidsieve.training.recipes import train_policy
from vidsieve.training.rollouts import Rollouts
from vidsieve.training.run_folder import read_metrics
from vidsieve.training.settings import SETTINGS, CaCoVIDConfig, ScoreConfig, VisionSelectorConfig
from vidsieve.training.visionselector import VisionSelectorTrainer

SOFT = {"objective": "soft_topk"}
FEW = {"steps": 6, "prompts_per_step": 1, "log_every": 1, "seed": 5, "eval_prompts": 0}


def draw(count, seed=0, scale=3.0):
    return scale * torch.randn(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def scanned(scores, count):
    """Return the mask by its definition: the best of a grid of shifts, which is refined around the best."""
    low, high = -60.0, 60.0
    for _ in range(12):
        shifts = torch.linspace(low, high, 2001, dtype=torch.float64)
        missed = ((scores + shifts[:, None]).sigmoid().sum(1) - count).abs()
        best, step = shifts[int(missed.argmin())], (high - low) / 2000
        low, high = float(best - 2 * step), float(best + 2 * step)
    return (scores + best).sigmoid()


# -- pure functions -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 7, 39])
def test_the_mask_has_the_sum_asked_for_at_one_shift_for_all(count):
    for seed in range(3):
        scores = draw(40, seed)
        mask = soft_top_k(scores, count)
        assert float(mask.sum()) == pytest.approx(count, abs=1e-9)
        assert torch.allclose(mask, scanned(scores, count), atol=1e-9)
        single = soft_top_k(scores.float(), count)
        assert single.dtype == torch.float32 and torch.allclose(single.double(), mask, atol=1e-5)


def test_the_gradient_of_the_mask_is_that_of_finite_differences():
    scores, pull = draw(12, 1).requires_grad_(), draw(12, 2)
    assert torch.autograd.gradcheck(lambda s: soft_top_k(s, 4), scores, atol=1e-6)
    (grad,) = torch.autograd.grad(soft_top_k(scores, 4), scores, pull)
    assert float(grad.sum()) == pytest.approx(0, abs=1e-12), "to raise all scores changes nothing"


def test_all_tokens_no_spread_and_great_spread():
    """The release cannot keep all tokens: its soft mask asserts 0 < k < n."""
    far = torch.tensor([3e9, -3e9, 0.0])  # a mask of ones and zeros has no slope
    for scores, count in ((draw(9).float(), 9), (torch.ones(9), 3), (torch.zeros(1), 1), (far, 2)):
        scores.requires_grad_()
        mask = soft_top_k(scores, count)
        assert torch.allclose(mask.detach().sum(), torch.tensor(float(count)), atol=1e-3)
        loss = constraint_loss(mask, scores, count) + (mask * torch.arange(len(mask))).sum()
        (grad,) = torch.autograd.grad(loss, scores)
        assert bool(torch.isfinite(loss)) and bool(torch.isfinite(grad).all())


def test_the_constraint_pulls_the_mask_to_the_highest_scores():
    scores = draw(10, 4)
    mask = soft_top_k(scores, 3)
    kept = set(torch.topk(scores, 3).indices.tolist())
    wanted = -sum(math.log(m if i in kept else 1 - m) for i, m in enumerate(mask.tolist())) / 10
    assert float(constraint_loss(mask, scores, 3)) == pytest.approx(wanted)
    assert torch.autograd.gradcheck(lambda s: constraint_loss(soft_top_k(s, 3), s, 3), scores.requires_grad_())
    sharp = constraint_loss(soft_top_k(100 * scores.detach(), 3), scores, 3)
    assert float(sharp) < 0.1 * wanted


# -- through the LLM ----------------------------------------------------------------------------------------


@pytest.fixture
def prompts(testbed):
    model, processor = testbed
    return ScenePrompts(adapter_for(model), processor, seed=3)


def test_every_token_stays_in_the_prompt_times_its_mask(prompts):
    rollouts = Rollouts(prompts.adapter, prompts.choice(0).inputs)
    video = rollouts.video()
    before, scores = video.embeds.clone(), draw(video.num_tokens).float()
    first, light = softly_selected(video, scores, 0.1, 0.0)
    _, heavy = softly_selected(video, scores, 0.1, 1.0)
    mask = soft_top_k(scores, 57)
    assert torch.equal(first.indices, torch.arange(video.num_tokens))
    assert torch.equal(first.embeds, video.embeds * mask[:, None]) and torch.equal(video.embeds, before)
    plain = float(constraint_loss(mask, scores, 57))
    assert (float(light), float(heavy)) == (pytest.approx(0.1 * plain), pytest.approx(2.0 * plain))


def test_the_answer_s_loss_reaches_the_scores(prompts):
    """The gradient along one direction, against finite differences through the frozen model."""
    sample = prompts.choice(0)
    rollouts = Rollouts(prompts.adapter, sample.inputs)
    video = rollouts.video()

    def loss(scores):
        return choice_loss(rollouts, sample.option_ids, sample.answer, [softly_selected(video, scores, 0.2, 0.0)[0]])[0]

    scores = draw(video.num_tokens, scale=1.0).float().requires_grad_()
    (grad,) = torch.autograd.grad(loss(scores), scores)
    way = grad / grad.norm()
    with torch.no_grad():
        moved = float(loss(scores + 0.05 * way) - loss(scores - 0.05 * way)) / 0.1
    assert float(grad.norm()) > 1e-3 and moved == pytest.approx(float(grad.norm()), rel=0.05)


@pytest.mark.parametrize(
    ("method", "figure", "settings"),
    [
        ("cacovid", "answer_loss", SOFT | {"head_lr": 0.0005}),
        ("sieve", "answer_loss", SOFT | {"head_lr": 0.0005, "question_dropped": 0.0}),
        ("score", "ce", SOFT | {"lr": 0.003, "score_decay": 0.0}),
        ("visionselector", "ce", {"lr": 0.03}),
    ],
)
def test_every_trainer_learns_without_rewards(testbed, tmp_path, monkeypatch, method, figure, settings):
    """On one prompt taken again and again, at one rate: another prompt, or rate, has another loss to begin with."""
    for name in ("choice", "caption"):
        own = getattr(ScenePrompts, name)
        monkeypatch.setattr(ScenePrompts, name, lambda self, number, own=own: own(self, 0))
    rates = {"rate_low": 0.1, "rate_high": 0.1}
    record = train_policy(method, *testbed, tmp_path, FEW | rates | settings)
    lines = read_metrics(tmp_path)
    assert lines[-1][figure] < lines[0][figure] - 0.01
    assert not {"reward", "safe", "kept"} & lines[0].keys()
    assert lines[0]["loss"] == pytest.approx(lines[0][figure] + lines[0]["constraint"], abs=1e-5)
    assert record["settings"]["objective"] == "soft_topk"
    policy = vidsieve.load(tmp_path / "policy").policy
    assert policy.method == method and policy.config.training["settings"]["objective"] == "soft_topk"


def test_the_constraint_s_weight_grows_over_the_run(testbed, tmp_path, monkeypatch):
    seen = []

    def noted(video, scores, ratio, progress):
        seen.append(progress)
        return softly_selected(video, scores, ratio, progress)

    monkeypatch.setattr(cacovid, "softly_selected", noted)
    train_policy("cacovid", *testbed, tmp_path, FEW | SOFT | {"steps": 3})
    assert seen == [0.0, 0.5, 1.0]


def test_the_learning_rate_of_visionselector_rises_and_falls(tmp_path):
    config = VisionSelectorConfig(**SETTINGS["visionselector", "ours"] | {"steps": 200})
    trainer = object.__new__(VisionSelectorTrainer)
    trainer.config = config
    rates = [trainer.learning_rate(step) for step in range(200)]
    assert rates[:3] == pytest.approx([1 / 6, 2 / 6, 3 / 6], rel=1e-3)
    assert max(rates) == rates[5] > 0.99 and rates[5:] == sorted(rates[5:], reverse=True) and rates[-1] < 1e-3


@pytest.mark.parametrize(
    ("make", "settings", "said"),
    [
        (CaCoVIDConfig, SOFT | {"reward": "generate"}, "soft_topk needs options"),
        (CaCoVIDConfig, SOFT | {"iterations": 2}, "'soft_topk' has no use for iterations"),
        (ScoreConfig, SOFT, "set rate_low and rate_high"),
        (VisionSelectorConfig, {"rate_low": 0.1, "rate_high": 0.1, "hidden": 8}, "hidden is SCORE's"),
    ],
)
def test_settings_that_contradict_it_are_refused(make, settings, said):
    with pytest.raises(TrainingError, match=said):
        make(**settings)
