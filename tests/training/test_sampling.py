"""Sampling frequencies against their probabilities, and the release's steps one by one."""

from __future__ import annotations

from itertools import combinations, permutations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from vidsieve.errors import UnknownNameError
from vidsieve.training import release_sampling as official
from vidsieve.training import sampling
from vidsieve.types import TokenGrid

DRAWS = 20_000
REJECT_BELOW = 1e-4
"""Chi-square p-value under which frequencies are not the stated probabilities; one seed, fixed."""


def sequential(weights, chosen):
    """Probability of drawing the set `chosen` one by one without replacement in proportion to `weights`."""
    total = 0.0
    for order in permutations(chosen):
        left, p = sum(weights.values()), 1.0
        for token in order:
            p *= weights[token] / left
            left -= weights[token]
        total += p
    return total


def ocss_probabilities(scores, count, width):
    """Eq. 5-11 by enumeration: P(set) = Σ over sub-spaces of their mass times the draw inside."""
    weights = torch.tensor(scores).double().exp()
    order = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
    sizes = sampling.subspace_sizes(len(scores), count, width).tolist()
    result, start = {}, 0
    for size in sizes:
        members = order[start : start + size]
        start += size
        mass = float(weights[members].sum() / weights.sum())
        inside = {i: float(weights[i]) for i in members}
        for chosen in combinations(sorted(members), count):
            result[chosen] = result.get(chosen, 0) + mass * sequential(inside, chosen)
    return result


def chi_square(masks, probabilities):
    seen = {}
    for mask in masks:
        key = tuple(mask.nonzero().flatten().tolist())
        seen[key] = seen.get(key, 0) + 1
    assert set(seen) <= set(probabilities), "a set was drawn that cannot be"
    expected = {k: v * len(masks) for k, v in probabilities.items() if v * len(masks) >= 5}
    observed = [seen.get(k, 0) for k in expected]
    rest = len(masks) - sum(expected.values())
    if rest >= 5:
        observed.append(len(masks) - sum(observed))
        expected["rest"] = rest
    wanted = torch.tensor(list(expected.values())).double()
    return stats.chisquare(observed, (wanted * sum(observed) / wanted.sum()).tolist()).pvalue


SCORES = [0.3, -1.0, 2.0, 0.0, 1.2, -0.4, 0.9, -2.0]


@pytest.mark.parametrize(("count", "width"), [(1, 2.0), (2, 2.0), (2, 1.0), (2, 4.0), (3, 1.5)])
def test_ocss_draws_by_its_equations(count, width):
    masks = sampling.ocss(torch.tensor([SCORES]), count, DRAWS, width, torch.Generator().manual_seed(0))[:, 0]
    assert chi_square(masks, ocss_probabilities(SCORES, count, width)) > REJECT_BELOW


def test_ocss_is_told_from_plain_multinomial():
    """The test has teeth: draws of the other sampler are rejected."""
    masks = sampling.multinomial(torch.tensor([SCORES]), 2, DRAWS, torch.Generator().manual_seed(0))[:, 0]
    wanted = ocss_probabilities(SCORES, 2, 2.0)
    inside = {k: v for k, v in wanted.items() if v > 0}
    assert any(tuple(m.nonzero().flatten().tolist()) not in inside for m in masks[:500])


def test_multinomial_draws_without_replacement():
    masks = sampling.multinomial(torch.tensor([SCORES]), 2, DRAWS, torch.Generator().manual_seed(1))[:, 0]
    weights = {i: float(torch.tensor(s).exp()) for i, s in enumerate(SCORES)}
    wanted = {c: sequential(weights, c) for c in combinations(range(8), 2)}
    assert chi_square(masks, wanted) > REJECT_BELOW


def test_random_draws_are_equally_likely():
    masks = sampling.uniformly(1, 6, 2, DRAWS, torch.Generator().manual_seed(2))[:, 0]
    assert chi_square(masks, {c: 1 / 15 for c in combinations(range(6), 2)}) > REJECT_BELOW


def test_bernoulli_draws_by_its_probabilities():
    p = torch.tensor([0.1, 0.5, 0.9, 0.25])
    masks = sampling.bernoulli_masks(p, DRAWS, torch.Generator().manual_seed(3))
    empty = float((1 - p).prod())
    wanted = p.double()
    wanted[2] += empty  # an empty draw keeps the likeliest token
    for i in range(4):
        hits = int(masks[:, i].sum())
        assert stats.binomtest(hits, DRAWS, float(wanted[i])).pvalue > REJECT_BELOW
    assert bool(masks.any(1).all())


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 5), st.integers(2, 12), st.floats(0.01, 0.6), st.sampled_from(["ocss", "multinomial", "random"]))
def test_every_rollout_keeps_the_same_number_of_each_frame(frames, side, ratio, sampler):
    grid = TokenGrid(frames, 1, side)
    scores = torch.randn(grid.num_tokens, generator=torch.Generator().manual_seed(0))
    masks = sampling.token_masks(scores, grid, ratio, 7, torch.Generator().manual_seed(1), sampler=sampler)
    assert masks.shape == (7, grid.num_tokens) and masks.dtype == torch.bool
    per_frame = masks.reshape(7, frames, side).sum(2)
    assert (per_frame == sampling.tokens_per_draw(ratio, side)).all()
    over_video = sampling.token_masks(
        scores, grid, ratio, 7, torch.Generator().manual_seed(1), sampler=sampler, over="video"
    )
    assert (over_video.sum(1) == sampling.tokens_per_draw(ratio, grid.num_tokens)).all()
    again = sampling.token_masks(scores, grid, ratio, 7, torch.Generator().manual_seed(1), sampler=sampler)
    assert torch.equal(masks, again)


def test_a_subspace_holds_tokens_of_similar_score():
    grid, scores = TokenGrid(1, 4, 5), torch.arange(20).float() / 10
    masks = sampling.token_masks(scores, grid, 0.1, 200, torch.Generator().manual_seed(0))
    spread = torch.stack([m.nonzero().flatten().max() - m.nonzero().flatten().min() for m in masks])
    assert int(spread.max()) <= 3, "both tokens of a rollout come from one sub-space of four"


def test_frame_rollouts_fill_the_drawn_frames_by_token_score():
    grid = TokenGrid(16, 3, 3)
    draw = torch.Generator().manual_seed(0)
    tokens, frames = torch.randn(144, generator=draw), torch.randn(16, generator=draw)
    drawn, masks = sampling.frame_masks(tokens, frames, grid, 1 / 9, 9, draw)
    assert (drawn.sum(1) == 2).all() and (masks.sum(1) == 16).all()
    for chosen, mask in zip(drawn, masks, strict=True):
        allowed = chosen.repeat_interleave(9)
        assert not bool((mask & ~allowed).any())
        best = tokens.masked_fill(~allowed, -99).topk(16).indices
        assert set(best.tolist()) == set(mask.nonzero().flatten().tolist())
    wide, _ = sampling.frame_masks(tokens, frames, grid, 0.9, 3, draw)
    assert (wide.sum(1) * 9 >= 16 * 8).all(), "enough frames are drawn to hold the budget"


def test_unknown_samplers_are_refused():
    with pytest.raises(UnknownNameError, match="Did you mean 'ocss'"):
        sampling.token_masks(torch.zeros(4), TokenGrid(1, 2, 2), 0.5, 2, torch.Generator(), sampler="ocs")


@given(st.lists(st.floats(0, 1), min_size=2, max_size=12), st.floats(0.05, 0.95))
def test_clipping_keeps_a_distribution_under_its_cap(weights, cap):
    p = torch.tensor(weights) + 1e-3
    clipped = official.clip_max_probability(p / p.sum(), cap)
    assert float(clipped.sum()) == pytest.approx(1, abs=1e-4)
    if cap * len(weights) > 1.05:
        assert float(clipped.max()) <= cap + 1e-4


def test_released_token_masks_draw_by_their_probabilities():
    grid, scores = TokenGrid(1, 1, 12), torch.tensor([float(i % 5) for i in range(12)])
    probability = scores.reshape(1, 12).softmax(1)
    parts = official.group_count(0.1)
    members = official.group_of_tokens(probability, parts)
    mass = official.group_probability(probability, members, parts)[0]
    masks = official.token_masks(scores, grid, 0.1, 8001, torch.Generator().manual_seed(0))
    assert int(masks[0].nonzero()) == int(scores.argmax()), "the first rollout is greedy"
    single = torch.stack(
        [official.member_probability(probability[0], members[0], torch.tensor([g]), parts)[0] for g in range(parts)]
    )
    wanted = (mass[:, None] * single).sum(0).double()
    observed = masks[1:].sum(0)
    assert stats.chisquare(observed, (wanted / wanted.sum() * 8000)).pvalue > REJECT_BELOW


def test_released_frame_mode_greedy_and_budget():
    grid = TokenGrid(8, 3, 3)
    draw = torch.Generator().manual_seed(0)
    embeds, frames = torch.randn(72, 6, generator=draw), torch.randn(8, generator=draw)
    drawn, masks = official.frame_masks(embeds, frames, grid, 1 / 9, 5, draw, share=0.25)
    assert (drawn.sum(1) == 2).all() and (masks.sum(1) == 8).all()
    assert set(drawn[0].nonzero().flatten().tolist()) == set(frames.topk(2).indices.tolist())
    assert not bool((masks & ~drawn.repeat_interleave(9, 1)).any())


def test_of_one_token_a_frame_ocss_is_the_multinomial():
    """A sub-space by its mass, a token by its share inside: the product is the token's own probability."""
    scores = torch.tensor([[2.0, 1.0, 0.5, 0.0, -1.0, -2.0]])
    draws = 40_000
    drawn = sampling.ocss(scores, 1, draws, 2.0, torch.Generator().manual_seed(0))[:, 0].float().mean(0)
    wanted = scores.softmax(1)[0]
    assert torch.allclose(drawn, wanted, atol=4 * float((wanted * (1 - wanted) / draws).sqrt().max()))
