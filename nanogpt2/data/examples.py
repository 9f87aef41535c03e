"""Examples of a chat or a classification: entries (see encode.py) -> inputs and targets.

Both have length T. In a chat the target of each token is the next one, if that is trained on. In a
classification the only target is the label's number, at the text's last token. All other targets
are -100.
This file does not know files.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from nanogpt2.config import IGNORE_INDEX
from nanogpt2.data.encode import END

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Examples:
    """A selection of the examples in a stream of entries."""

    stream: NDArray[np.integer]
    starts: Ints  # offset of each example in the stream
    stops: Ints
    classes: Ints | None = None  # classification: the number of each example's label
    labels: tuple[str, ...] = ()  # classification: the name of each number

    def __len__(self) -> int:
        """Number of examples."""
        return len(self.starts)

    @cached_property
    def lengths(self) -> Ints:
        """Input tokens of each example, before it is cut to block_size."""
        # the last entry of a chat is only a target
        return self.stops - self.starts - (self.classes is None)

    @property
    def longest(self) -> int:
        """Tokens in the longest example."""
        return int(self.lengths.max())

    @property
    def tokens(self) -> int:
        """Tokens in all examples."""
        return int(self.lengths.sum())

    def too_long(self, block_size: int) -> int:
        """Number of the examples that `example` cuts to `block_size`."""
        return int((self.lengths > block_size).sum())

    def example(self, i: int, block_size: int) -> tuple[Ints, Ints]:
        """Return (inputs, targets), each int64 (T,), with T <= block_size.

        If an example is too long, a chat keeps the end, with the completion. A classification keeps
        the start, and its target moves to the last token kept.
        """
        entries = self.stream[self.starts[i] : self.stops[i]].astype(np.int64)
        if self.classes is not None:
            inputs = entries[:block_size]
            targets = np.full(len(inputs), IGNORE_INDEX)
            targets[-1] = self.classes[i]
            return inputs, targets
        entries = entries[-block_size - 1 :]
        ids = np.where(entries < 0, ~entries, entries)
        return ids[:-1], np.where(entries < 0, ids, IGNORE_INDEX)[1:]

    def select(self, indices: NDArray[np.integer]) -> Examples:
        """Return the examples with these indices, in this order."""
        classes = None if self.classes is None else self.classes[indices]
        return replace(
            self, starts=self.starts[indices], stops=self.stops[indices], classes=classes
        )


def chat_examples(stream: NDArray[np.integer]) -> Examples:
    """Return all examples of a stream of conversations."""
    stops = np.flatnonzero(stream == END)
    return Examples(stream, np.concatenate([[0], stops[:-1] + 1]), stops)


def labelled_examples(stream: NDArray[np.integer], labels: tuple[str, ...] = ()) -> Examples:
    """Return all examples of a stream of labelled texts.

    The classes are `labels`, or by default the labels found: integers first, in numeric order, then
    the others. Raises ValueError for a label that is not among `labels`.
    """
    entries = chat_examples(stream)
    # a text ends where its label begins
    spelled = np.flatnonzero((stream < 0) & (stream != END))
    stops = spelled[np.searchsorted(spelled, entries.starts)]
    names = [
        bytes((~stream[begin:end]).astype(np.uint8)).decode("utf-8", "surrogatepass")
        for begin, end in zip(stops, entries.stops, strict=True)
    ]
    labels = labels or tuple(sorted(set(names), key=_rank))
    number = {name: i for i, name in enumerate(labels)}
    if unknown := sorted(set(names) - set(labels), key=_rank):
        raise ValueError(f"has labels unseen in training: {', '.join(map(repr, unknown))}")
    classes = np.array([number[name] for name in names], np.int64)
    return Examples(stream, entries.starts, stops, classes, labels)


def _rank(label: str) -> tuple[bool, int, str]:
    is_number = label.isascii() and label.removeprefix("-").isdigit() and len(label) < 20
    return not is_number, int(label) if is_number else 0, label
