"""What a generated answer is worth, against values worked out by hand and brute force."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vidsieve.training.judging import judge, rouge, word_error_rate


@pytest.mark.parametrize(
    ("kind", "said", "truth", "score"),
    [
        ("multiple choice", "B", "B", 1),
        ("multiple choice", "(b) a dog", "B", 1),
        ("multiple choice", "C. it is B", "B", 0),
        ("multiple choice", "<answer> B </answer>", "B", 1),
        ("multiple choice", "", "B", 0),
        ("multiple choice", "Blue.", "blue", 1),
        ("multiple choice", "dark blue", "blue", 0),
        ("numerical", "it is 3.001 m", "3", 1),
        ("numerical", "3.01", "3", 0),
        ("numerical", "1,200", "1200", 1),
        ("numerical", "-.5", "-0.5", 1),
        ("numerical", "none", "3", 0),
        ("numerical", "1e3", "1000", 1),
        ("OCR", "the quick fox", "the quick brown fox", 0.75),
        ("OCR", "", "one", 0),
        ("OCR", "a b c d", "x", 0),
        ("OCR", "exit left", "exit left", 1),
        ("regression", "9", "10", 0.9),
        ("regression", "30", "10", 0),
        ("regression", "0", "0", 1),
        ("regression", "?", "1", 0),
        ("free-form", "the cat sat", "the cat sat", 1),
        ("free-form", "", "the cat", 0),
        # words 2 of 3 and 3; pairs 1 of 2 and 2; longest 2 of 3 and 3
        ("free-form", "the cat ran", "the cat sat", (2 / 3 + 1 / 2 + 2 / 3) / 3),
    ],
)
def test_each_kind_has_its_rule(kind, said, truth, score):
    assert judge(kind, said, truth) == pytest.approx(score)


def edits(said, truth):
    """Return the edit distance by its recursive definition."""
    if not said or not truth:
        return len(said) + len(truth)
    swap = edits(said[1:], truth[1:]) + (said[0] != truth[0])
    return min(swap, edits(said[1:], truth) + 1, edits(said, truth[1:]) + 1)


def subsequences(words):
    return {()} | {(words[0], *rest) for rest in subsequences(words[1:])} | subsequences(words[1:]) if words else {()}


short = st.lists(st.sampled_from("abc"), max_size=5)


@given(short, short)
def test_against_brute_force(said, truth):
    assert word_error_rate(said, truth) == edits(said, truth) / max(1, len(truth))
    longest = max(len(some) for some in subsequences(said) & subsequences(truth))
    alone = 2 * longest / (len(said) + len(truth)) if longest else 0.0
    pairs = [list(pairwise(words)) for words in (said, truth)]
    scores = [alone]
    for ours, theirs in ((said, truth), pairs):
        left, common = list(theirs), 0
        for gram in ours:
            if gram in left:
                left.remove(gram)
                common += 1
        scores.append(2 * common / (len(ours) + len(theirs)) if common else 0.0)
    assert rouge(" ".join(said), " ".join(truth)) == pytest.approx(sum(scores) / 3)
