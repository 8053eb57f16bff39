"""Errors clustered by video against a bootstrap and a simulation; McNemar's test against scipy's binomial one."""

from __future__ import annotations

import math
import statistics

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest

from vidsieve.evaluation.stats import clustered_mean, mcnemar, paired_difference


def _marks(rng, videos, spread=0.25):
    """Return marks of 1 to 12 questions a video, whose difficulty differs by video, and the videos' numbers."""
    sizes = rng.integers(1, 13, videos)
    rate = np.clip(rng.normal(0.6, spread, videos), 0, 1)
    values = np.concatenate([rng.random(n) < p for n, p in zip(sizes, rate, strict=True)]).astype(float)
    return values, np.repeat(np.arange(videos), sizes)


def test_the_standard_error_is_that_of_a_bootstrap_over_videos():
    rng = np.random.default_rng(0)
    values, videos = _marks(rng, 120)
    ours = clustered_mean(values, videos)
    sums, counts = np.bincount(videos, weights=values), np.bincount(videos)
    drawn = rng.integers(0, 120, (20_000, 120))
    resampled = sums[drawn].sum(1) / counts[drawn].sum(1)
    assert ours.mean == pytest.approx(values.mean())
    assert ours.stderr == pytest.approx(resampled.std(), rel=0.03)
    naive = values.std() / math.sqrt(len(values))
    assert ours.stderr > 1.15 * naive, "questions about one video are not independent"


def test_intervals_hold_the_truth_95_times_in_100():
    """Of 2,000 experiments with 60 videos each; without clusters the same intervals hold it in nine of ten or fewer."""
    rng = np.random.default_rng(1)
    truth = np.mean([_marks(rng, 4_000)[0].mean() for _ in range(50)])
    held = alone = 0
    for _ in range(2_000):
        values, videos = _marks(rng, 60)
        low, high = clustered_mean(values, videos).interval
        held += low <= truth <= high
        alone += abs(values.mean() - truth) <= 1.96 * values.std() / math.sqrt(len(values))
    assert 0.925 <= held / 2_000 <= 0.965
    assert alone / 2_000 < 0.91


def test_differences_are_taken_question_by_question():
    rng = np.random.default_rng(2)
    values, videos = _marks(rng, 80)
    others = np.where(rng.random(len(values)) < 0.05, 1 - values, values)
    found = paired_difference(values, others, videos)
    assert found.mean == pytest.approx((values - others).mean())
    assert found.stderr < 0.5 * math.hypot(clustered_mean(values, videos).stderr, clustered_mean(others, videos).stderr)


def test_of_videos_with_one_question_it_is_the_textbook_error_however_few_they_are():
    for values in ([1.0, 0.0], [1.0, 1.0, 0.0, 0.5]):
        wanted = statistics.stdev(values) / math.sqrt(len(values))
        assert clustered_mean(values, range(len(values))).stderr == pytest.approx(wanted)


def test_one_video_gives_no_error():
    assert math.isnan(clustered_mean([1.0, 0.0], [3, 3]).stderr)


@given(st.integers(0, 60), st.integers(0, 60), st.integers(0, 5))
def test_mcnemar_is_the_exact_binomial_test_of_what_differs(first, second, same):
    values = [1] * first + [0] * second + [1] * same
    others = [0] * first + [1] * second + [1] * same
    wanted = binomtest(first, first + second).pvalue if first + second else 1.0
    assert mcnemar(values, others) == pytest.approx(wanted)
    assert mcnemar(others, values) == mcnemar(values, others)


def test_mcnemar_of_many_and_of_what_is_no_mark():
    assert mcnemar([1] * 2_600 + [0] * 2_400, [0] * 2_600 + [1] * 2_400) == pytest.approx(
        binomtest(2_600, 5_000).pvalue, rel=1e-9
    )
    with pytest.raises(ValueError, match="0 and 1"):
        mcnemar([0.5], [1])
