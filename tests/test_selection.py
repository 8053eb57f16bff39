"""Budgets and selection against brute force and exact arithmetic."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vidsieve.errors import BudgetError, RetentionError, SelectionError
from vidsieve.retention import check_retention
from vidsieve.selection import (
    allocate_frames,
    even_counts,
    evenly_spaced,
    indices_to_mask,
    kept_tokens,
    mask_to_indices,
    top_indices,
    top_indices_per_frame,
)
from vidsieve.types import Selection, TokenGrid, Tokens, VideoTokens

scores_with_ties = st.lists(st.sampled_from([-1.0, 0.0, 0.5, 0.5, 2.0]), min_size=1, max_size=40)


EXACT = [(0.29, 100, 29), (0.57, 100, 57), (0.1, 10, 1), (0.1, 9, 1), (1.0, 7, 7), (0.1, 576, 57), (0.25, 42566, 10641)]


@pytest.mark.parametrize(("retention", "tokens", "kept"), EXACT)
def test_kept_tokens_is_the_exact_floor(retention, tokens, kept):
    assert kept_tokens(retention, tokens) == kept


@given(st.integers(1, 9999), st.integers(1, 100_000))
def test_kept_tokens_of_any_decimal(part, tokens):
    retention = part / 10_000
    assert kept_tokens(retention, tokens) == max(1, Fraction(part, 10_000) * tokens // 1)


@pytest.mark.parametrize("bad", [0, -0.5, 1.0001, float("nan"), float("inf"), "0.5", None, True, [0.5]])
def test_bad_retentions_are_refused(bad):
    with pytest.raises(RetentionError, match="a number in"):
        check_retention(bad)


def test_token_budgets():
    assert kept_tokens(Tokens(12), 40) == 12
    with pytest.raises(BudgetError, match="1 to 40"):
        kept_tokens(Tokens(41), 40)
    for bad in (0, -1, 2.5, True):
        with pytest.raises(SelectionError):
            Tokens(bad)


@given(scores_with_ties, st.data())
def test_top_indices_against_brute_force(scores, data):
    count = data.draw(st.integers(1, len(scores)))
    chosen = top_indices(torch.tensor(scores), count).tolist()
    assert chosen == sorted(sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:count])


@given(st.integers(1, 6), st.integers(1, 5), st.data())
def test_top_per_frame_against_brute_force(frames, per_frame, data):
    grid = TokenGrid(frames, 1, per_frame)
    scores = data.draw(st.lists(st.sampled_from([0.0, 1.0, 2.0]), min_size=grid.num_tokens, max_size=grid.num_tokens))
    counts = data.draw(st.lists(st.integers(0, per_frame), min_size=frames, max_size=frames))
    wanted = []
    for t, count in enumerate(counts):
        row = range(t * per_frame, (t + 1) * per_frame)
        wanted += sorted(sorted(row, key=lambda i: (-scores[i], i))[:count])
    assert top_indices_per_frame(torch.tensor(scores), grid, torch.tensor(counts)).tolist() == wanted


@given(st.lists(st.floats(0, 10), min_size=1, max_size=12), st.integers(0, 3), st.integers(1, 9), st.data())
def test_allocation_is_exact_and_inside_its_bounds(weights, floor, room, data):
    frames, cap = len(weights), floor + room
    total = data.draw(st.integers(frames * floor, frames * cap))
    counts = allocate_frames(torch.tensor(weights), total, cap, floor)
    assert int(counts.sum()) == total
    assert int(counts.min()) >= floor and int(counts.max()) <= cap
    # More weight never means fewer tokens, but for one token of rounding.
    for a in range(frames):
        for b in range(frames):
            if weights[a] > weights[b]:
                assert counts[a] >= counts[b] - 1


def test_allocation_by_largest_remainder():
    # Shares 3.5, 2.1, 1.4 of 7: whole parts 3, 2, 1, the seventh token to the remainder .5.
    assert allocate_frames(torch.tensor([5.0, 3.0, 2.0]), 7, 9).tolist() == [4, 2, 1]
    # One frame holds all the weight but only 3 tokens: the rest goes on to the next best.
    assert allocate_frames(torch.tensor([1e9, 2.0, 1.0]), 6, 3).tolist() == [3, 2, 1]
    with pytest.raises(BudgetError, match="cannot be spread"):
        allocate_frames(torch.ones(3), 10, 3)


@given(st.integers(0, 200), st.integers(1, 30))
def test_even_counts(total, parts):
    counts = even_counts(total, parts)
    assert int(counts.sum()) == total and int(counts.max() - counts.min()) <= 1


@given(st.integers(1, 200), st.data())
def test_evenly_spaced_is_increasing_from_end_to_end(total, data):
    count = data.draw(st.integers(1, total))
    places = evenly_spaced(total, count)
    assert len(places) == count and len(set(places.tolist())) == count
    assert int(places[0]) == 0 and (count == 1 or int(places[-1]) == total - 1)


@given(st.lists(st.booleans(), min_size=1, max_size=50))
def test_masks_and_indices_invert_each_other(kept):
    mask = torch.tensor(kept)
    assert torch.equal(indices_to_mask(mask_to_indices(mask), len(kept)), mask)


@pytest.mark.parametrize("indices", [[2, 1], [1, 1], [-1, 2], []])
def test_selections_must_be_sorted_unique_and_not_empty(indices):
    with pytest.raises(SelectionError):
        Selection(torch.tensor(indices, dtype=torch.int64))


def test_shapes_are_checked_at_the_boundary():
    grid, positions = TokenGrid(2, 2, 2), torch.arange(8)[None]
    VideoTokens(torch.zeros(8, 4), grid, positions)
    for embeds, where in [
        (torch.zeros(7, 4), positions),
        (torch.zeros(8, 4, dtype=torch.int64), positions),
        (torch.zeros(8, 4), positions[:, :7]),
        (torch.zeros(8, 4), positions.int()),
    ]:
        with pytest.raises(SelectionError):
            VideoTokens(embeds, grid, where)
    with pytest.raises(SelectionError):
        TokenGrid(0, 2, 2)
    for bad in (torch.nan, torch.inf, -torch.inf):
        embeds = torch.zeros(8, 4)
        embeds[6, 1] = bad
        with pytest.raises(SelectionError, match="token 6 of the video, in frame 1 of 2, has values"):
            VideoTokens(embeds, grid, positions)
    with pytest.raises(SelectionError, match="embeds"):
        Selection(torch.tensor([1, 2]), embeds=torch.zeros(3, 4))
