"""Token ids or examples -> batches: sequence n of a run depends only on (seed, n).

The loader keeps no position, so a resumed run seeks to its place at once. Any step, micro-batch or
process can read any range of sequences. All batches are (inputs, targets), both int64 (B, T). A
target is the next token or a label's number; targets that do not count are -100. This file does not
know the model.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from nanogpt2.config import IGNORE_INDEX
from nanogpt2.data.examples import Examples, Ints
from nanogpt2.data.mix import Mixed
from nanogpt2.data.shards import Ids
from nanogpt2.data.shuffle import LISTED, ORDER, Order
from nanogpt2.data.token_files import Joined

Batch = tuple[Tensor, Tensor]


class Batches(Protocol):
    """The sequences of a run, shuffled anew in each epoch."""

    sequences: int  # in an epoch
    block_size: int  # the largest T

    def rows(self, first: int, count: int) -> Batch:
        """Return sequences first .. first + count - 1 of the run, numbered from 0."""


def make_batches(data: Ids | Joined | Examples | Mixed, block_size: int, seed: int) -> Batches:
    """Return the batches of a run. Raises ValueError for too few ids to fill a sequence."""
    if isinstance(data, Mixed):
        return MixedBatches(data, block_size, seed)
    if isinstance(data, Examples):
        return ExampleBatches(data, block_size, seed)
    return WindowBatches(data, block_size, seed)


def check_order(batches: Batches, order: object) -> None:
    """Raise ValueError where a resumed run's order, stated by its checkpoint, is another one.

    Releases before ORDER 2 ordered long epochs otherwise; the order of short ones is unchanged.
    """
    longest = max(part.sequences for part in getattr(batches, "parts", [batches]))
    if longest > LISTED and order != ORDER:
        raise ValueError(
            f"another release ordered this run's {longest:,} sequences: go on with that one, or "
            "train its model further with --init"
        )


class WindowBatches:
    """Every epoch cuts the text into windows of T tokens at a new offset and shuffles them."""

    def __init__(self, ids: Ids | Joined, block_size: int, seed: int) -> None:
        if len(ids) < block_size + 1:
            raise ValueError(
                f"block_size must be < {len(ids)}, the tokens to train on, not {block_size}"
            )
        self.ids = ids
        self.block_size = block_size
        # windows in an epoch, the same at every offset
        self.sequences = max(1, (len(ids) - block_size) // block_size)
        self._order = Order(self.sequences, seed, len(ids) - self.sequences * block_size)

    def rows(self, first: int, count: int) -> Batch:
        """Return sequences first .. first + count - 1; targets are the inputs one token later."""
        places = [self._order(n) for n in range(first, first + count)]
        starts = [offset + window * self.block_size for window, offset in places]
        windows = np.stack([self.ids[s : s + self.block_size + 1] for s in starts])
        batch = torch.from_numpy(windows.astype(np.int64))  # (B, T + 1)
        return batch[:, :-1], batch[:, 1:]


class ExampleBatches:
    """Every epoch shuffles the examples and has each one once."""

    def __init__(self, examples: Examples, block_size: int, seed: int) -> None:
        self.examples = examples
        self.block_size = block_size
        self.sequences = len(examples)
        self._order = Order(self.sequences, seed)

    def rows(self, first: int, count: int) -> Batch:
        """Return sequences first .. first + count - 1, padded to the longest of them."""
        numbers = [self._order(n)[0] for n in range(first, first + count)]
        return _pad([self.examples.example(i, self.block_size) for i in numbers])


class MixedBatches:
    """The sequences of several corpora, each in its own order. An epoch has as many as all have."""

    def __init__(self, data: Mixed, block_size: int, seed: int) -> None:
        self.data = data
        self.block_size = block_size
        self.parts = [make_batches(part, block_size, seed) for part in data.parts]
        self.sequences = sum(part.sequences for part in self.parts)

    def rows(self, first: int, count: int) -> Batch:
        """Return sequences first .. first + count - 1 of the run, padded to the longest of them."""
        picked = [self.data.shares.pick(n) for n in range(first, first + count)]
        found: list[tuple[Tensor, Tensor]] = [(torch.empty(0), torch.empty(0))] * count
        for i, part in enumerate(self.parts):
            places = [place for place, (corpus, _) in enumerate(picked) if corpus == i]
            if places:
                # in its corpus they follow each other
                x, y = part.rows(picked[places[0]][1], len(places))
                for place, row in zip(places, zip(x, y, strict=True), strict=True):
                    found[place] = row
        pad = torch.nn.utils.rnn.pad_sequence
        return pad([x for x, _ in found], True), pad([y for _, y in found], True, IGNORE_INDEX)

    def describe(self, sequences: int) -> str:
        """Return each corpus's share of so many sequences, and how often they pass over it."""
        counts = self.data.shares.counts(sequences)
        said = [
            f"{name!r} {100 * count / max(sequences, 1):.4g} % "
            f"({count / part.sequences:.2f} epochs of {part.sequences:,} sequences)"
            for name, count, part in zip(self.data.names, counts, self.parts, strict=True)
        ]
        return f"mix of {sequences:,} sequences: {', '.join(said)}"


def _pad(rows: list[tuple[Ints, Ints]]) -> Batch:
    """Stack rows, padded on the right with id 0 and targets that do not count."""
    shape = (len(rows), max(len(ids) for ids, _ in rows))
    inputs, targets = np.zeros(shape, np.int64), np.full(shape, IGNORE_INDEX)
    for i, (ids, wanted) in enumerate(rows):
        inputs[i, : len(ids)], targets[i, : len(wanted)] = ids, wanted
    return torch.from_numpy(inputs), torch.from_numpy(targets)


def validation_batches(
    data: Ids | Joined | Examples | Mixed, batch_size: int, block_size: int
) -> "ValidationBatches | MixedValidation":
    """Return batches of at most (B, T), in order; every target occurs exactly once."""
    if isinstance(data, Mixed):
        parts = [ValidationBatches(part, batch_size, block_size) for part in data.parts]
        # a share each: the sum of large weights would be infinite
        total = sum(data.shares.weights, Fraction())
        weights = [float(weight / total) for weight in data.shares.weights]
        return MixedValidation(dict(zip(data.names, parts, strict=True)), weights)
    return ValidationBatches(data, batch_size, block_size)


@dataclass(frozen=True)
class ValidationBatches:
    """A sequence of batches. In a text, every token but the first is a target."""

    data: Ids | Joined | Examples
    batch_size: int
    block_size: int

    def __len__(self) -> int:
        """Number of batches."""
        return -(-self.sequences // self.batch_size)

    def __getitem__(self, i: int) -> Batch:
        """Return batch number i = 0, 1, 2, ..."""
        if not 0 <= i < len(self):
            raise IndexError(f"batch {i} of {len(self)}")
        first = i * self.batch_size
        rows = range(first, min(first + self.batch_size, self.sequences))
        return _pad([self._row(n) for n in rows])

    def __iter__(self) -> Iterator[Batch]:
        """Yield the batches in order."""
        return (self[i] for i in range(len(self)))

    @property
    def sequences(self) -> int:
        """Number of sequences in all batches."""
        if isinstance(self.data, Examples):
            return len(self.data)
        return -(-(len(self.data) - 1) // self.block_size)

    def _row(self, n: int) -> tuple[Ints, Ints]:
        if isinstance(self.data, Examples):
            return self.data.example(n, self.block_size)
        start = n * self.block_size
        ids = np.asarray(self.data[start : start + self.block_size + 1], np.int64)
        return ids[:-1], ids[1:]


@dataclass(frozen=True)
class MixedValidation:
    """The batches of several corpora, each measured by itself."""

    parts: dict[str, ValidationBatches]  # by the corpus's name
    weights: list[float]

    @property
    def sequences(self) -> int:
        """Number of sequences in all batches."""
        return sum(part.sequences for part in self.parts.values())
