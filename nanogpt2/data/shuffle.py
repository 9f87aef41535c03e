"""The order of a run's sequences: for each epoch another permutation, read at any place.

Up to LISTED sequences an epoch's permutation is drawn whole, by numpy. Above, it is computed at the
place that is asked for, by a Feistel network, so that neither the memory nor the time to start or
to resume grows with the corpus. The network splits a number of 2 h bits into two halves L, R and
repeats

    L, R = R, L xor f(R)

which can be undone whatever f is: it is a bijection of 0 .. 4^h - 1. f mixes R with a key of the
round, drawn from the seed and the epoch. A result beyond the last sequence is sent through the
network again until it lies within (cycle walking), which keeps the bijection; 4^h is less than four
times the count, so this takes fewer than four passes on average.

This file does not know the data.
Sources: Luby and Rackoff 1988; Black and Rogaway 2002 (cycle walking); the mixer is that of
splitmix64 (Steele, Lea and Flood 2014).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

LISTED = 2**20  # sequences: 8 MB and some 20 ms for each epoch
ORDER = 2  # of runs with longer epochs; a checkpoint states it. 1 drew every permutation whole
ROUNDS = 6
MASK = 2**64 - 1


class Order:
    """n -> (index of the n-th item of the run, below `count`; offset drawn for its epoch)."""

    def __init__(self, count: int, seed: int, offsets: int = 1) -> None:
        """Order `count` items; an epoch's offset is below `offsets`."""
        self.count, self.seed, self.offsets = count, seed, offsets
        self._epoch: tuple[int, int, NDArray[np.int64] | Permutation] | None = None

    def __call__(self, n: int) -> tuple[int, int]:
        """Return the index and the offset of item n = 0, 1, 2, ... of the run."""
        epoch, place = divmod(n, self.count)
        # read and replace the tuple in one step: another thread may be in another epoch
        drawn = self._epoch
        if drawn is None or drawn[0] != epoch:
            rng = np.random.default_rng([self.seed, epoch])
            offset = int(rng.integers(0, self.offsets))
            is_listed = self.count <= LISTED
            order = rng.permutation(self.count) if is_listed else Permutation(self.count, rng)
            drawn = self._epoch = (epoch, offset, order)
        return int(drawn[2][place]), drawn[1]


class Permutation:
    """A bijection of 0 .. count - 1, computed one place at a time."""

    def __init__(self, count: int, rng: np.random.Generator) -> None:
        """Draw the keys of a permutation of `count` items."""
        self.count = count
        self.half = max(1, -(-(count - 1).bit_length() // 2))  # bits
        self.keys = [int(key) for key in rng.integers(0, MASK, ROUNDS, np.uint64, endpoint=True)]

    def __getitem__(self, place: int) -> int:
        """Return the item at a place. Raises IndexError for a place outside."""
        if not 0 <= place < self.count:
            raise IndexError(f"place {place} of {self.count}")
        item = self._pass(place)
        while item >= self.count:
            item = self._pass(item)
        return item

    def _pass(self, number: int) -> int:
        mask = (1 << self.half) - 1
        left, right = number >> self.half, number & mask
        for key in self.keys:
            left, right = right, left ^ (_mixed(right ^ key) & mask)
        return left << self.half | right


def _mixed(x: int) -> int:
    """Return 64 bits, each of which depends on all bits of x."""
    x = (x + 0x9E3779B97F4A7C15) & MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    return x ^ (x >> 31)
