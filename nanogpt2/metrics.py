"""Numbers that say how good predictions or texts are: pure functions of plain sequences.

This file knows neither models nor files and imports nothing of ours, so that a run's report and
the evaluation share it.
"""

import math
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any


def perplexity(nats: float) -> float:
    """exp of a mean cross-entropy: among how many equally likely tokens the model hesitates."""
    try:
        return math.exp(nats)
    except OverflowError:
        return math.inf


# ---- how a text repeats itself


def ngrams(ids: Sequence[Hashable], n: int) -> list[tuple[Hashable, ...]]:
    """Every run of `n` tokens, in order. Raises ValueError for n < 1."""
    if n < 1:
        raise ValueError(f"n must be >= 1, not {n}")
    return [tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)]


def distinct_n(ids: Sequence[Hashable], n: int) -> float:
    """Different n-grams / n-grams (Li et al. 2016): 1 where none occurs twice.

    0.0 for a text shorter than n tokens: there is nothing to tell apart.
    """
    found = ngrams(ids, n)
    return len(set(found)) / len(found) if found else 0.0


def repetition(ids: Sequence[Hashable], n: int) -> float:
    """Share of n-grams that occurred before in the text: 1 - distinct_n; 0.0 where none can."""
    return 1.0 - distinct_n(ids, n) if len(ids) >= n else 0.0


# ---- classification


def accuracy(targets: Sequence[Any], predictions: Sequence[Any]) -> float:
    """Share of the predictions that are right. Raises ValueError for none at all."""
    if not targets:
        raise ValueError("there is nothing to score")
    pairs = list(zip(targets, predictions, strict=True))
    return sum(target == predicted for target, predicted in pairs) / len(pairs)


@dataclass(frozen=True)
class ClassScores:
    """One class: of those predicted, how many were right; of those there, how many were found."""

    precision: float
    recall: float
    f1: float
    support: int  # texts of this class


def class_scores(
    targets: Sequence[str], predictions: Sequence[str], labels: Sequence[str]
) -> dict[str, ClassScores]:
    """Precision, recall and F1 of each of `labels`; a quotient by nothing is 0."""
    cells = Counter(zip(targets, predictions, strict=True))
    there, said = Counter(targets), Counter(predictions)
    found = {}
    for label in labels:
        right = cells[label, label]
        precision = right / said[label] if said[label] else 0.0
        recall = right / there[label] if there[label] else 0.0
        both = there[label] + said[label]
        found[label] = ClassScores(
            precision, recall, 2 * right / both if both else 0.0, there[label]
        )
    return found


def macro_f1(targets: Sequence[str], predictions: Sequence[str]) -> float:
    """Mean F1 of the classes that occur among the targets or the predictions, each alike.

    A class that is there and never predicted, or predicted and never there, counts as 0; one that
    is neither does not count (scikit-learn's `average="macro"`). Raises ValueError for no targets.
    """
    if not targets:
        raise ValueError("there is nothing to score")
    labels = sorted({*targets, *predictions})
    scores = class_scores(targets, predictions, labels)
    return sum(score.f1 for score in scores.values()) / len(labels)


def confusion(
    targets: Sequence[str], predictions: Sequence[str], labels: Sequence[str]
) -> list[list[int]]:
    """Row i, column j: texts of label i that were taken for label j."""
    cells = Counter(zip(targets, predictions, strict=True))
    return [[cells[target, predicted] for predicted in labels] for target in labels]
