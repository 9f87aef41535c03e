"""How a model is at one time: its figures, and what it writes.

This file does not know what the model learns from, or when.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from nanogpt2.classifier import GPTClassifier, Model
from nanogpt2.config import SENSIBLE_SAMPLING
from nanogpt2.generation import generate
from nanogpt2.tokenizer import Tokenizer

SAMPLE_TOKENS = 60


@dataclass(frozen=True)
class Snapshot:
    """What a model wrote, and how it did on the validation data."""

    val_loss: float
    sample: str = ""  # the prompt and what followed
    ids: Sequence[int] = ()  # what followed, as tokens
    accuracy: float | None = None  # of a classifier
    macro_f1: float | None = None


def take_snapshot(
    model: Model,
    tokenizer: Tokenizer,
    prompt: Sequence[int],
    seed: int,
    figures: Mapping[str, float],
) -> Snapshot:
    """Have the model go on from `prompt`, by a random generator of its own, seeded with `seed`.

    Without a prompt it writes nothing, nor does a classifier. figures: val_loss, val_accuracy and
    val_macro_f1, as far as they are known.
    """
    loss = figures.get("val_loss", math.nan)
    if isinstance(model, GPTClassifier) or not prompt:
        scores = figures.get("val_accuracy"), figures.get("val_macro_f1")
        return Snapshot(loss, "", (), *scores)
    ids = torch.tensor([prompt], device=model.wte.weight.device)
    options = SENSIBLE_SAMPLING | {"max_new_tokens": SAMPLE_TOKENS, "seed": seed}
    written = generate(model, ids, **options).sequences[0].tolist()
    return Snapshot(loss, tokenizer.decode(written), written[len(prompt) :])
