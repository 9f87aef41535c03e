"""The examples of a batch as text, with the trained parts marked.

The preview is made from the tensors of a training step, so it shows truncation and masking as they
are. This file does not know where the batch came from.
"""

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from nanogpt2.config import IGNORE_INDEX
from nanogpt2.tokenizer import Tokenizer

SHOWN = 300  # characters of a part


def preview(x: Tensor, y: Tensor, tokenizer: Tokenizer, labels: Sequence[str] = ()) -> str:
    """Show each row of a batch: inputs and targets, both int64 (B, T).

    labels: a classification's label names, by number; empty for a chat.
    """
    lines = []
    for number, (inputs, targets) in enumerate(zip(x.numpy(), y.numpy(), strict=True), start=1):
        # everything after the last target is padding
        T = int(np.flatnonzero(targets != IGNORE_INDEX)[-1]) + 1
        ids, trained = inputs[:T], np.zeros(T, bool)
        if not labels:
            # targets stand one position early, so shift the mask and append the last target
            ids = np.append(ids, targets[T - 1])
            trained = np.append(False, targets[:T] != IGNORE_INDEX)
        lines.append(f"example {number}, {T} tokens:")
        starts = np.flatnonzero(np.diff(trained)) + 1
        for part, learned in zip(np.split(ids, starts), np.split(trained, starts), strict=True):
            lines.append(_line(learned[0], _shortened(tokenizer.decode(part.tolist()))))
        if labels:
            lines.append(_line(True, f"label {labels[targets[T - 1]]!r}"))
    return "\n".join(lines)


def _line(trained: bool, text: str) -> str:
    return f"  [{'trained    ' if trained else 'not trained'}] {text}"


def _shortened(text: str) -> str:
    return repr(text if len(text) <= SHOWN else f"{text[: SHOWN // 2]} ... {text[-SHOWN // 2 :]}")
