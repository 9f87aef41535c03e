"""A snapshot of a model in training: its figures and a sample of its text.

This file does not know the training data or the loop.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from nanogpt2.classifier import GPTClassifier, Model
from nanogpt2.config import SENSIBLE_SAMPLING
from nanogpt2.generation import generate
from nanogpt2.metrics import is_number
from nanogpt2.tokenizer import Tokenizer

SAMPLE_TOKENS = 60


@dataclass(frozen=True)
class Snapshot:
    """A model's sample and its figures on the validation data."""

    val_loss: float
    sample: str = ""  # the prompt and its continuation
    ids: Sequence[int] = ()  # the continuation's tokens
    accuracy: float | None = None  # of a classifier
    macro_f1: float | None = None

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> "Snapshot":
        """Read a snapshot from run.json. Raises ValueError for a damaged one."""
        try:
            found = cls(**record)
        except TypeError:
            raise ValueError("run.json is damaged: unknown figures in before") from None
        scores = [score for score in (found.accuracy, found.macro_f1) if score is not None]
        numbers = all(map(is_number, (found.val_loss, *scores)))
        ids = isinstance(found.ids, list | tuple) and all(type(i) is int for i in found.ids)
        if not (numbers and ids and isinstance(found.sample, str)):
            raise ValueError("run.json is damaged: wrong figures in before")
        return found


def take_snapshot(
    model: Model,
    tokenizer: Tokenizer,
    prompt: Sequence[int],
    seed: int,
    figures: Mapping[str, float],
) -> Snapshot:
    """Continue `prompt` with the model; the draws have their own generator, seeded with `seed`.

    A classifier, or an empty prompt, gives no sample. figures: val_loss, val_accuracy and
    val_macro_f1, each if known.
    """
    loss = figures.get("val_loss", math.nan)
    if isinstance(model, GPTClassifier) or not prompt:
        scores = figures.get("val_accuracy"), figures.get("val_macro_f1")
        return Snapshot(loss, "", (), *scores)
    ids = torch.tensor([prompt], device=model.wte.weight.device)
    options = SENSIBLE_SAMPLING | {"max_new_tokens": SAMPLE_TOKENS, "seed": seed}
    written = generate(model, ids, **options).sequences[0].tolist()
    return Snapshot(loss, tokenizer.decode(written), written[len(prompt) :])
