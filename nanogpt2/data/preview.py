"""The examples of a batch as text: what is trained on, apart from what is only read.

It is made from the tensors that a step gets, so it shows what was cut off and what counts. This
file does not know where they came from.
"""

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from nanogpt2.config import IGNORE_INDEX
from nanogpt2.tokenizer import Tokenizer

SHOWN = 300  # characters of a part


def preview(x: Tensor, y: Tensor, tokenizer: Tokenizer, labels: Sequence[str] = ()) -> str:
    """Show each row of a batch: inputs and targets, both int64 (B, T).

    labels: of a classification, by number; none in a chat.
    """
    lines = []
    for number, (inputs, targets) in enumerate(zip(x.numpy(), y.numpy(), strict=True), start=1):
        # what comes after the last target only fills the batch up
        T = int(np.flatnonzero(targets != IGNORE_INDEX)[-1]) + 1
        ids, trained = inputs[:T], np.zeros(T, bool)
        if not labels:
            # the target stands one token before itself
            ids = np.append(ids, targets[T - 1])
            trained = np.append(False, targets[:T] != IGNORE_INDEX)
        lines.append(f"example {number}, {T} tokens:")
        starts = np.flatnonzero(np.diff(trained)) + 1
        for part, learned in zip(np.split(ids, starts), np.split(trained, starts), strict=True):
            lines.append(_line(learned[0], _shortened(tokenizer.decode(part.tolist()))))
        if labels:
            lines.append(_line(True, f"label {labels[targets[T - 1]]!r}"))
    return "\n".join(lines)


def _line(trained: bool, what: str) -> str:
    return f"  [{'trained    ' if trained else 'not trained'}] {what}"


def _shortened(text: str) -> str:
    return repr(text if len(text) <= SHOWN else f"{text[: SHOWN // 2]} ... {text[-SHOWN // 2 :]}")
