"""Metrics of predictions and texts: pure functions of plain sequences.

This file does not know models or files. It imports nothing from nanogpt2, so that both training
reports and the evaluation can use it.
"""

import math
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any


def perplexity(nats: float) -> float:
    """Return exp(nats): the number of equally likely tokens with this mean cross-entropy."""
    try:
        return math.exp(nats)
    except OverflowError:
        return math.inf


def finite(score: float) -> float:
    """Return a model's score. Raises FloatingPointError for NaN and infinity."""
    if not math.isfinite(score):
        raise FloatingPointError(
            "the model's scores are not finite numbers: are its weights damaged, or its dtype "
            "too narrow?"
        )
    return score


def is_number(value: Any) -> bool:
    """Return True for a float, and for an int that a float holds exactly; False for a bool."""
    return type(value) is float or (type(value) is int and abs(value) <= 2**53)


# ---- repetition


def ngrams(ids: Sequence[Hashable], n: int) -> list[tuple[Hashable, ...]]:
    """Return every run of `n` tokens, in order. Raises ValueError for n < 1."""
    if n < 1:
        raise ValueError(f"n must be >= 1, not {n}")
    return [tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)]


def distinct_n(ids: Sequence[Hashable], n: int) -> float:
    """Return distinct n-grams / all n-grams (Li et al. 2016): 1.0 if none is repeated.

    0.0 for a text shorter than n tokens, which has no n-grams.
    """
    found = ngrams(ids, n)
    return len(set(found)) / len(found) if found else 0.0


def repetition(ids: Sequence[Hashable], n: int) -> float:
    """Return the fraction of repeated n-grams, 1 - distinct_n; 0.0 for fewer than n tokens."""
    return 1.0 - distinct_n(ids, n) if len(ids) >= n else 0.0


# ---- classification


def accuracy(targets: Sequence[Any], predictions: Sequence[Any]) -> float:
    """Return the fraction of correct predictions. Raises ValueError for empty input."""
    if not targets:
        raise ValueError("nothing to score: targets are empty")
    pairs = list(zip(targets, predictions, strict=True))
    return sum(target == predicted for target, predicted in pairs) / len(pairs)


@dataclass(frozen=True)
class ClassScores:
    """Scores of one class.

    precision: correct / predicted as this class; recall: correct / texts of this class; f1: their
    harmonic mean.
    """

    precision: float
    recall: float
    f1: float
    support: int  # texts of this class


def class_scores(
    targets: Sequence[str], predictions: Sequence[str], labels: Sequence[str]
) -> dict[str, ClassScores]:
    """Return precision, recall and F1 of each of `labels`; a division by zero gives 0."""
    cells = Counter(zip(targets, predictions, strict=True))
    actual, predicted = Counter(targets), Counter(predictions)
    found = {}
    for label in labels:
        right = cells[label, label]
        precision = right / predicted[label] if predicted[label] else 0.0
        recall = right / actual[label] if actual[label] else 0.0
        both = actual[label] + predicted[label]
        found[label] = ClassScores(
            precision, recall, 2 * right / both if both else 0.0, actual[label]
        )
    return found


def macro_f1(targets: Sequence[str], predictions: Sequence[str]) -> float:
    """Return the unweighted mean F1 of the classes among the targets or the predictions.

    A class that only the targets or only the predictions contain counts as 0; a class in neither
    does not count (scikit-learn's `average="macro"`). Raises ValueError for empty input.
    """
    if not targets:
        raise ValueError("nothing to score: targets are empty")
    labels = sorted({*targets, *predictions})
    scores = class_scores(targets, predictions, labels)
    return sum(score.f1 for score in scores.values()) / len(labels)


def confusion(
    targets: Sequence[str], predictions: Sequence[str], labels: Sequence[str]
) -> list[list[int]]:
    """Return a matrix: row i, column j counts the texts of label i predicted as label j."""
    cells = Counter(zip(targets, predictions, strict=True))
    return [[cells[target, predicted] for predicted in labels] for target in labels]
