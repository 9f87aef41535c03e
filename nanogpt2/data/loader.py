"""Token ids -> batches: which windows of the text make up batch number `index`.

A batch is a function of (seed, index) alone. Nothing is remembered from one to the next, so a
resumed run seeks to its place at once. This file does not know the model.
"""

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nanogpt2.data.corpus import Ids


class BatchLoader:
    """Batches of (inputs, targets), both int64 (B, T); targets are inputs one token later.

    Every epoch cuts the text into windows of T tokens at a new offset and shuffles them.
    """

    def __init__(self, ids: Ids, batch_size: int, block_size: int, seed: int) -> None:
        """Raise ValueError where the text has fewer than block_size + 1 tokens."""
        if len(ids) < block_size + 1:
            raise ValueError(
                f"is too short: {len(ids)} tokens to train on, block_size {block_size} needs "
                f"{block_size + 1}"
            )
        self.ids = ids
        self.batch_size = batch_size
        self.block_size = block_size
        self.seed = seed
        # windows in an epoch, whatever its offset
        self.windows = max(1, (len(ids) - block_size) // block_size)
        self._epoch = -1
        self._starts: NDArray[np.int64] = np.empty(0, np.int64)

    def batch(self, index: int) -> tuple[Tensor, Tensor]:
        """Return batch number `index` = 0, 1, 2, ..."""
        first = index * self.batch_size
        starts = [self._start(n) for n in range(first, first + self.batch_size)]
        rows = np.stack([self.ids[s : s + self.block_size + 1] for s in starts])
        batch = torch.from_numpy(rows.astype(np.int64))  # (B, T + 1)
        return batch[:, :-1], batch[:, 1:]

    def _start(self, n: int) -> int:
        """Where the n-th window of the run begins."""
        epoch, place = divmod(n, self.windows)
        if epoch != self._epoch:
            rng = np.random.default_rng([self.seed, epoch])
            offset = rng.integers(0, len(self.ids) - self.windows * self.block_size)
            self._starts = offset + self.block_size * rng.permutation(self.windows)
            self._epoch = epoch
        return int(self._starts[place])


def validation_batches(
    ids: Ids, batch_size: int, block_size: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the whole text once, in order, as (inputs, targets) of at most (B, T).

    Every token but the first is a target exactly once; targets past the end are -100.
    """
    count = len(ids) - 1
    for start in range(0, count, batch_size * block_size):
        rows = min(batch_size, -(-(count - start) // block_size))
        stop = min(start + rows * block_size, count)
        inputs = np.zeros(rows * block_size, np.int64)
        targets = np.full(rows * block_size, -100, np.int64)
        inputs[: stop - start] = ids[start:stop]
        targets[: stop - start] = ids[start + 1 : stop + 1]
        shape = (rows, block_size)
        yield torch.from_numpy(inputs).view(shape), torch.from_numpy(targets).view(shape)
