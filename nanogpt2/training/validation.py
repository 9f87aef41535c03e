"""Validation: the model's loss, and a classifier's accuracy, on held-out data.

This file does not know the source of the batches and draws no random number.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.nn import functional as F

from nanogpt2.classifier import GPTClassifier
from nanogpt2.config import IGNORE_INDEX
from nanogpt2.metrics import accuracy, macro_f1
from nanogpt2.training.trainer import Trainer


class BatchList(Protocol):
    """Batches by index, so that processes can divide them."""

    def __len__(self) -> int:
        """Return the number of batches."""

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        """Return batch i: inputs and targets, both int64 (B, T)."""


@runtime_checkable
class PartList(Protocol):
    """Batches of several corpora."""

    @property
    def parts(self) -> Mapping[str, BatchList]:
        """The batches of each corpus, by its name."""

    @property
    def weights(self) -> Sequence[float]:
        """The weight of each corpus in the mixture."""


def validate(trainer: Trainer, batches: BatchList | PartList) -> dict[str, float]:
    """Return `measure`'s figures. Of several corpora, val_loss is the mean of theirs by weight.

    Each one's own is `val_loss NAME`.
    """
    if not isinstance(batches, PartList):
        return measure(trainer, batches)
    losses = {name: measure(trainer, part)["val_loss"] for name, part in batches.parts.items()}
    parts = zip(losses.values(), batches.weights, strict=True)
    mean = sum(loss * weight for loss, weight in parts) / sum(batches.weights)
    return {"val_loss": mean} | {f"val_loss {name}": loss for name, loss in losses.items()}


@torch.no_grad()
def measure(trainer: Trainer, batches: BatchList) -> dict[str, float]:
    """Return the mean cross-entropy over all targets, in nats, as val_loss.

    A classifier adds val_accuracy and val_macro_f1. The processes divide the batches (int64 (B, T)
    inputs and targets); every process must call this. Raises FloatingPointError when the loss is
    not finite.
    """
    world, model = trainer.world, trainer.eval_model.eval()
    labels = len(model.labels) if isinstance(model, GPTClassifier) else 0
    total, count = 0.0, 0
    answers = torch.zeros(labels * labels)  # count of label i predicted as label j
    for start in range(0, len(batches), world.size):
        # sharded weights need every process: a process out of batches repeats the last one
        mine = start + world.rank
        x, y = (ids.to(world.device) for ids in batches[min(mine, len(batches) - 1)])
        with trainer.precision():
            scores = model(x)[y != IGNORE_INDEX] if labels else None  # (M, L)
            loss = (
                model(x, y)
                if scores is None
                else F.cross_entropy(scores.float(), y[y != IGNORE_INDEX])
            )
        if mine < len(batches):
            targets = int((y != IGNORE_INDEX).sum())
            total, count = total + loss.item() * targets, count + targets
            if scores is not None:
                pairs = y[y != IGNORE_INDEX] * labels + scores.argmax(-1)
                answers += pairs.bincount(minlength=labels * labels).cpu()
    model.train()
    total, counted, *sums = world.sum(total, count, *answers.tolist())
    found = {"val_loss": total / counted}
    if not math.isfinite(found["val_loss"]):
        raise FloatingPointError(f"the validation loss is {found['val_loss']}; nothing was saved")
    if labels:
        cells = [divmod(i, labels) for i, n in enumerate(sums) for _ in range(int(n))]
        right, said = ([str(label) for label in column] for column in zip(*cells, strict=True))
        found |= {"val_accuracy": accuracy(right, said), "val_macro_f1": macro_f1(right, said)}
    return found
