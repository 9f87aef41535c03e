"""Metrics against hand computations."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanogpt2.metrics import (
    accuracy,
    class_scores,
    confusion,
    distinct_n,
    macro_f1,
    ngrams,
    perplexity,
    repetition,
)

# three of a (two correct), two of b (one correct), one of c (not predicted); d is no target
TARGETS = ["a", "a", "a", "b", "b", "c"]
PREDICTIONS = ["a", "a", "b", "b", "d", "a"]


def test_accuracy():
    assert accuracy(TARGETS, PREDICTIONS) == 3 / 6
    assert accuracy([1], [1]) == 1.0
    with pytest.raises(ValueError, match="nothing"):
        accuracy([], [])
    with pytest.raises(ValueError):
        accuracy([1, 2], [1])


def test_scores_of_a_class():
    scores = class_scores(TARGETS, PREDICTIONS, ["a", "b", "c", "d", "e"])
    # a is predicted 3 times, 2 correct; b twice, 1 correct
    assert (scores["a"].precision, scores["a"].recall) == (2 / 3, 2 / 3)
    assert scores["a"].f1 == pytest.approx(2 / 3)
    assert (scores["b"].precision, scores["b"].recall, scores["b"].f1) == (0.5, 0.5, 0.5)
    assert scores["c"].f1 == scores["d"].f1 == scores["e"].f1 == 0.0
    assert [scores[label].support for label in "abcde"] == [3, 2, 1, 0, 0]


def test_macro_f1_counts_classes_without_a_prediction_and_those_never_there():
    assert macro_f1(TARGETS, PREDICTIONS) == pytest.approx((2 / 3 + 1 / 2 + 0 + 0) / 4)
    assert macro_f1(["x", "x"], ["x", "x"]) == 1.0
    assert macro_f1(["x", "y"], ["x", "x"]) == pytest.approx((2 / 3 + 0) / 2)
    with pytest.raises(ValueError, match="nothing"):
        macro_f1([], [])


def test_confusion():
    assert confusion(TARGETS, PREDICTIONS, ["a", "b", "c", "d"]) == [
        [2, 1, 0, 0],
        [0, 1, 0, 1],
        [1, 0, 0, 0],
        [0, 0, 0, 0],
    ]


def test_repetition_of_a_text():
    ids = [1, 2, 1, 2, 1]
    assert ngrams(ids, 2) == [(1, 2), (2, 1), (1, 2), (2, 1)]
    assert distinct_n(ids, 1) == 2 / 5
    assert distinct_n(ids, 2) == 2 / 4 and repetition(ids, 2) == 2 / 4
    assert distinct_n(ids, 5) == 1.0 and repetition(ids, 5) == 0.0
    # too short for an n-gram
    assert distinct_n(ids, 6) == repetition(ids, 6) == repetition([], 1) == 0.0
    with pytest.raises(ValueError, match="n must be >= 1, not 0"):
        distinct_n(ids, 0)


@given(st.lists(st.integers(0, 3), max_size=12), st.integers(1, 4))
def test_repetition_is_the_fraction_of_repeated_ngrams(ids, n):
    seen, again = set(), 0
    for gram in ngrams(ids, n):
        again += gram in seen
        seen.add(gram)
    assert repetition(ids, n) == pytest.approx(again / max(1, len(ids) - n + 1))


def test_perplexity_never_overflows():
    assert perplexity(0.0) == 1.0
    assert perplexity(math.log(7)) == pytest.approx(7)
    assert perplexity(1e4) == perplexity(math.inf) == math.inf
