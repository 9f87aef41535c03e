"""Compare a classifier's predictions with the labels of held-out texts.

    accuracy   fraction of texts whose most likely label is correct
    macro_f1   unweighted mean F1 over the labels that occur (see metrics.py)
    classes    precision, recall, F1 and number of texts of each label
    confusion  row: the text's label, column: the predicted label

This file does not know how the classifier works.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from nanogpt2.classifier import GPTClassifier
from nanogpt2.data.labelled import LabelledText
from nanogpt2.evaluation.perplexity import ignore_progress
from nanogpt2.metrics import accuracy, class_scores, confusion, finite, macro_f1
from nanogpt2.tokenizer import Tokenizer


def predict(
    model: GPTClassifier,
    texts: Sequence[Sequence[int]],
    batch_size: int,
    block_size: int,
    advance: Callable[[int], object] = ignore_progress,
) -> list[str]:
    """Return the most likely label of each text, from its first `block_size` tokens.

    Raises FloatingPointError for scores that are not finite.
    """
    found: dict[int, str] = {}
    # batch texts of similar length, to save padding
    order = sorted(range(len(texts)), key=lambda i: -len(texts[i]))
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        probabilities = model.classify([texts[i][:block_size] for i in chosen])
        finite(probabilities.sum().item())
        best = probabilities.argmax(dim=1)
        found |= {i: model.labels[j] for i, j in zip(chosen, best.tolist(), strict=True)}
        advance(len(chosen))
    return [found[i] for i in range(len(texts))]


def measure_classification(
    model: GPTClassifier,
    tokenizer: Tokenizer,
    examples: Sequence[LabelledText],
    batch_size: int,
    block_size: int,
    advance: Callable[[int], object] = ignore_progress,
) -> dict[str, Any]:
    """Classify texts that have labels, and compare the predictions with the labels.

    Raises ValueError for a label that the classifier does not know.
    """
    for example in examples:
        if example.label not in model.labels:
            known = ", ".join(map(repr, model.labels))
            raise ValueError(
                f"{example.where}: the model knows no label {example.label!r} ({known})"
            )
    targets = [str(example.label) for example in examples]
    texts = [tokenizer.encode(example.text) for example in examples]
    predictions = predict(model, texts, batch_size, block_size, advance)
    scores = class_scores(targets, predictions, model.labels)
    return {
        "examples": len(examples),
        "accuracy": accuracy(targets, predictions),
        "macro_f1": macro_f1(targets, predictions),
        "classes": {label: asdict(score) for label, score in scores.items()},
        "confusion": {
            label: dict(zip(model.labels, row, strict=True))
            for label, row in zip(
                model.labels, confusion(targets, predictions, model.labels), strict=True
            )
        },
    }
