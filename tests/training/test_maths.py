"""Advantages, losses and rewards against loops, closed forms and enumeration."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vidsieve.training.advantages import group_advantage, leave_one_out, official_advantage, split_advantage
from vidsieve.training.losses import action_log_probs, clipped_surrogate, cpo_loss, reinforce_loss
from vidsieve.training.rewards import caption_ce, choice_reward, margin_reward, score_rewards

rewards = st.lists(st.floats(-3, 3, width=32), min_size=2, max_size=12)


@given(rewards)
def test_group_advantage(values):
    advantage = group_advantage(torch.tensor(values))
    mean = sum(values) / len(values)
    std = math.sqrt(sum((v - mean) ** 2 for v in values) / len(values))
    if len(set(torch.tensor(values).tolist())) == 1:
        assert advantage.tolist() == [0.0] * len(values)
    elif std > 1e-3:
        assert advantage.tolist() == pytest.approx([(v - mean) / std for v in values], abs=1e-2)


@given(rewards)
def test_leave_one_out(values):
    advantage = leave_one_out(torch.tensor(values))
    others = [(sum(values) - v) / (len(values) - 1) for v in values]
    assert advantage.tolist() == pytest.approx([v - o for v, o in zip(values, others, strict=True)], abs=1e-4)


def test_official_advantage_uses_the_unbiased_deviation():
    deviation = math.sqrt(1 / 3) + 1e-4
    wanted = [2 / 3 / deviation, -1 / 3 / deviation, -1 / 3 / deviation]
    assert official_advantage(torch.tensor([1.0, 0.0, 0.0])).tolist() == pytest.approx(wanted)


def split_by_hand(delta, sparsity, epsilon=1e-6):
    safe = [s for d, s in zip(delta, sparsity, strict=True) if d > 0]
    if safe:
        mean = sum(safe) / len(safe)
        std = math.sqrt(sum((s - mean) ** 2 for s in safe) / len(safe))
    return [d * (s - mean) / (std + epsilon) if d > 0 else d * s for d, s in zip(delta, sparsity, strict=True)]


@given(st.lists(st.tuples(st.floats(-2, 2, width=32), st.floats(0, 1, width=32)), min_size=1, max_size=10))
def test_split_advantage_is_equation_7(pairs):
    delta, sparsity = (list(x) for x in zip(*pairs, strict=True))
    ours = split_advantage(torch.tensor(delta, dtype=torch.float64), torch.tensor(sparsity, dtype=torch.float64))
    # A vanishing spread is divided by ε: there float32 noise is the whole value.
    safe = [s for d, s in pairs if d > 0]
    if len(set(safe)) == 1 or (len(safe) > 1 and max(safe) - min(safe) < 1e-3):
        return
    assert ours.tolist() == pytest.approx(split_by_hand(delta, sparsity), abs=2e-2, rel=2e-2)


@pytest.mark.parametrize(
    ("delta", "sparsity", "advantage"),
    [
        ([0.5], [0.9], [0.0]),  # a single safe rollout has nothing to be compared with
        ([-0.5, -0.1], [0.9, 0.2], [-0.45, -0.02]),  # none safe: every one is penalised by its sparsity
        ([-0.5, -0.5], [0.0, 1.0], [0.0, -0.5]),  # keeping everything is never penalised
        ([0.5, 0.5], [0.3, 0.3], [0.0, 0.0]),  # all safe and equally sparse
        ([0.5, 0.5], [0.2, 0.4], [-0.5, 0.5]),  # all safe: a race to sparsity, weighted by ΔCE
        ([0.0, 1.0, 1.0], [0.5, 0.2, 0.4], [0.0, -1.0, 1.0]),  # ΔCE = 0 is in the penalty zone
    ],
)
def test_split_advantage_edge_cases(delta, sparsity, advantage):
    assert split_advantage(torch.tensor(delta), torch.tensor(sparsity)).tolist() == pytest.approx(advantage, abs=1e-4)


def test_action_log_probs_are_a_two_way_softmax():
    logits, masks = torch.tensor([[0.0, 1.0], [2.0, -1.0]]), torch.tensor([[True, False], [False, True]])
    keep = [1 / (1 + math.exp(-1.0)), 1 / (1 + math.exp(3.0))]
    wanted = [[math.log(keep[0]), math.log(1 - keep[1])], [math.log(1 - keep[0]), math.log(keep[1])]]
    assert torch.allclose(action_log_probs(logits, masks), torch.tensor(wanted), atol=1e-6)


def test_the_pull_to_a_fair_coin_neither_overflows_nor_lets_go():
    """Its gradient grows up to the bound and stays there: it always points back."""
    masks, zero = torch.zeros(1, 1, dtype=torch.bool), torch.zeros(1)
    slopes = []
    for logit in (2.0, 8.0, 12.0, 200.0):
        logits = torch.tensor([[0.0, logit]], requires_grad=True)  # kept almost surely, and dropped here
        old = action_log_probs(logits, masks).detach()
        loss = cpo_loss(logits, old, masks, zero, kl_weight=1.0)
        (gradient,) = torch.autograd.grad(loss, logits)
        assert loss.isfinite()
        slopes.append(float(gradient[0, 1]))
    assert slopes == sorted(slopes) and slopes[0] > 0 and slopes[-1] == pytest.approx(slopes[-2], rel=0.01)


@pytest.mark.parametrize("balanced", [False, True])
@pytest.mark.parametrize("kl_weight", [0.0, 0.3])
def test_cpo_loss_against_loops(balanced, kl_weight):
    draw = torch.Generator().manual_seed(0)
    logits, old_logits = torch.randn(7, 2, generator=draw), torch.randn(7, 2, generator=draw)
    masks = torch.rand(4, 7, generator=draw) < 0.4
    advantages = torch.randn(4, generator=draw)
    old = action_log_probs(old_logits, masks)
    got = cpo_loss(logits, old, masks, advantages, balanced=balanced, kl_weight=kl_weight)
    per_mask = []
    for g in range(4):
        kept = float(masks[g].float().mean())
        total = norm = 0.0
        for n in range(7):
            column = int(masks[g, n])
            log_p = float(logits[n].log_softmax(0)[column])
            ratio = math.exp(log_p - float(old_logits[n].log_softmax(0)[column]))
            a = float(advantages[g])
            term = -min(ratio * a, min(max(ratio, 0.8), 1.28) * a)
            gap = math.log(0.5) - log_p
            term += kl_weight * (math.exp(gap) - gap - 1)
            weight = ((1 - kept) if column else kept) if balanced else 1.0
            total, norm = total + weight * term, norm + weight
        per_mask.append(total / (norm + (1e-7 if balanced else 0)))
    assert float(got) == pytest.approx(sum(per_mask) / 4, rel=1e-4)


def test_clipping_stops_the_gradient_past_the_bounds():
    old = torch.zeros(2, 1)
    log_probs = torch.tensor([[math.log(1.5)], [math.log(0.5)]], requires_grad=True)
    clipped_surrogate(log_probs, old, torch.tensor([1.0, -1.0])).sum().backward()
    assert log_probs.grad.flatten().tolist() == [0.0, 0.0]
    again = torch.tensor([[math.log(1.5)], [math.log(0.5)]], requires_grad=True)
    clipped_surrogate(again, old, torch.tensor([-1.0, 1.0])).sum().backward()
    assert again.grad.flatten().tolist() == pytest.approx([1.5, -0.5]), "the bound is one-sided"


def test_reinforce_gradient_in_closed_form():
    """∂L/∂logit_n = −mean_k A_k (m_kn − p_n) / N."""
    draw = torch.Generator().manual_seed(1)
    logits = torch.randn(6, generator=draw).requires_grad_()
    masks, advantages = torch.rand(5, 6, generator=draw) < 0.5, torch.randn(5, generator=draw)
    (gradient,) = torch.autograd.grad(reinforce_loss(logits, masks, advantages), logits)
    wanted = -(advantages[:, None] * (masks.float() - logits.detach().sigmoid())).mean(0) / 6
    assert torch.allclose(gradient, wanted, atol=1e-6)


def test_reinforce_points_up_the_expected_reward():
    """Averaged over all 2^n masks by their probability, the gradient is that of the expected reward over N."""
    logits = torch.tensor([0.3, -0.7, 1.1], requires_grad=True)
    reward = {
        bits: float(sum(b * (i + 1) for i, b in enumerate(bits)) + 2 * bits[0] * bits[2])
        for bits in product([0, 1], repeat=3)
    }

    def probability(bits):
        p = logits.sigmoid()
        return math.prod(p[i] if b else 1 - p[i] for i, b in enumerate(bits))

    expected = sum(probability(bits) * value for bits, value in reward.items())
    (wanted,) = torch.autograd.grad(expected, logits)
    total = torch.zeros(3)
    for bits, value in reward.items():
        (part,) = torch.autograd.grad(
            reinforce_loss(logits, torch.tensor([bits]).bool(), torch.tensor([value])), logits
        )
        total += float(probability(bits).detach()) * part
    assert torch.allclose(-3 * total, wanted, atol=1e-5)


def test_choice_and_margin_agree_on_who_is_right():
    logits = torch.randn(50, 4, generator=torch.Generator().manual_seed(2))
    for answer in range(4):
        right, margin = choice_reward(logits, answer), margin_reward(logits, answer)
        assert torch.equal(right.bool(), margin > 0)
        others = [i for i in range(4) if i != answer]
        assert torch.allclose(margin, logits[:, answer] - logits[:, others].amax(1), atol=1e-6)


def test_caption_ce_is_the_models_own_loss():
    draw = torch.Generator().manual_seed(3)
    logits, labels = torch.randn(3, 9, 11, generator=draw), torch.randint(0, 11, (3, 9), generator=draw)
    labels[:, :4] = -100
    labels[1, :6] = -100
    got = caption_ce(logits, labels)
    for row in range(3):
        wanted = torch.nn.functional.cross_entropy(logits[row, :-1], labels[row, 1:], ignore_index=-100)
        assert float(got[row]) == pytest.approx(float(wanted), rel=1e-4)


def test_score_rewards_are_equations_5_and_6():
    masks = torch.tensor([[True, False, False, False], [True, True, True, True]])
    delta, sparsity = score_rewards(torch.tensor([1.0, 2.0]), 1.5, masks, tolerance=1.02)
    assert delta.tolist() == pytest.approx([1.02 * 1.5 - 1.0, 1.02 * 1.5 - 2.0])
    assert sparsity.tolist() == [0.75, 0.0]


def test_the_clipped_surrogate_is_the_paper_s_and_its_gradient_survives_an_overflowing_ratio():
    log_probs = torch.linspace(-3, 3, 61).repeat(3, 1).requires_grad_()
    old, advantages = torch.zeros(3, 61), torch.tensor([1.5, -0.7, 0.0])
    ratio = log_probs.exp()
    weight = advantages[:, None]
    literal = -torch.minimum(ratio * weight, ratio.clamp(0.8, 1.28) * weight)
    ours = clipped_surrogate(log_probs, old, advantages)
    torch.testing.assert_close(ours, literal)
    wanted = torch.autograd.grad(literal.sum(), log_probs)[0]
    torch.testing.assert_close(torch.autograd.grad(ours.sum(), log_probs)[0], wanted)

    far = torch.full((2, 4), 200.0, requires_grad=True)  # exp(200) is no float32
    clipped_surrogate(far, torch.zeros(2, 4), torch.tensor([1.0, 0.0])).sum().backward()
    assert bool((far.grad == 0).all())
