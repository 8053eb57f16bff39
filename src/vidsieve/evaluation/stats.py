"""Means and paired differences with errors clustered by video."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

FEW = 20
"""Clusters below which errors and intervals come out too small."""


@dataclass(frozen=True)
class Estimate:
    """A mean and its standard error; the 95 % interval is mean ± 1.96 s.e."""

    mean: float
    stderr: float

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % interval."""
        return self.mean - 1.96 * self.stderr, self.mean + 1.96 * self.stderr


def clustered_mean(values: Sequence[float], clusters: Sequence[int]) -> Estimate:
    """Return the mean of `values` with a standard error that lets values of one cluster depend on each other.

    The sandwich estimate: √(c/(c−1) · Σ_clusters (Σ residuals)²) / n over c clusters; NaN for one cluster.
    """
    x, group = np.asarray(values, float), np.asarray(clusters)
    mean = float(x.mean())
    _, index = np.unique(group, return_inverse=True)
    sums = np.bincount(index, weights=x - mean)
    count = len(sums)
    if count < 2:
        return Estimate(mean, math.nan)
    return Estimate(mean, float(math.sqrt(count / (count - 1) * float((sums**2).sum())) / len(x)))


def paired_difference(values: Sequence[float], others: Sequence[float], clusters: Sequence[int]) -> Estimate:
    """Return the mean of `values` − `others`, item by item, with clustered errors."""
    return clustered_mean((np.asarray(values, float) - np.asarray(others, float)).tolist(), clusters)


def mcnemar(values: Sequence[float], others: Sequence[float]) -> float:
    """Return the exact two-sided p-value of McNemar's test of two lists of right (1) and wrong (0) answers.

    The binomial test of the questions that only one of them has right against ½. It takes questions for independent:
    where several share a video, the clustered difference is the more careful one.

    Raises
    ------
    ValueError
        If a value is neither 0 nor 1, or the lists are not of one length.
    """
    pairs = list(zip(values, others, strict=True))
    if any(value not in (0, 1) for pair in pairs for value in pair):
        raise ValueError("McNemar's test is for values of 0 and 1")
    first, second = sum(a > b for a, b in pairs), sum(a < b for a, b in pairs)
    tail = sum(math.comb(first + second, k) for k in range(min(first, second) + 1))
    return min(1.0, float(2 * tail / 2 ** (first + second)))
