"""The keys and values of the tokens already read, so that a new token is the only one computed.

Buffers have their full length from the start: nothing is allocated or copied while decoding.
Where rows share what they have in common (beams do), a table of rows is copied instead of keys and
values. This file does not know what attention does with them.
"""

from typing import Any

import torch
from torch import Tensor

from nanogpt2.ops import AttentionMetadata, Mask


class KVCache:
    """Keys and values of every layer, filled from the left.

    k, v: (n_layer, B, H, max_length, D); `length` is the number of filled positions.
    """

    def __init__(
        self,
        n_layer: int,
        batch_size: int,
        n_head: int,
        max_length: int,
        head_dim: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        shape = (n_layer, batch_size, n_head, max_length, head_dim)
        self.k = torch.empty(shape, device=device, dtype=dtype)
        self.v = torch.empty(shape, device=device, dtype=dtype)
        self.length = 0

    @property
    def batch_size(self) -> int:
        """Rows, B."""
        return self.k.size(1)

    @property
    def max_length(self) -> int:
        """Positions there is room for."""
        return self.k.size(3)

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write one layer's k, v (B, H, T, D) of new tokens; return all, (B, H, length + T, D).

        `length` grows only in `advance`, once every layer has been extended.
        Raises ValueError where there is no room.
        """
        end = self.length + k.size(2)
        if end > self.max_length:
            raise ValueError(f"the cache has room for {self.max_length} positions, not {end}")
        self.k[layer, :, :, self.length : end] = k
        self.v[layer, :, :, self.length : end] = v
        return self.k[layer, :, :, :end], self.v[layer, :, :, :end]

    def seen(self, count: int) -> Mask:
        """What `count` new tokens a row may look at: a mask (count, length + count), or all."""
        if self.length == 0 or count == 1:
            return None
        # new token t stands at length + t and sees all up to there
        shape = count, self.length + count
        return torch.ones(shape, dtype=torch.bool, device=self.k.device).tril(self.length)

    def advance(self, count: int) -> None:
        """Count the positions that every layer has just been given."""
        self.length += count

    def repeat_interleave(self, repeats: int) -> None:
        """Give every row `repeats` - 1 copies at its side: B -> B * repeats rows."""
        for name in ("k", "v"):
            old = getattr(self, name)
            L, B, H, S, D = old.shape
            new = old.new_empty(L, B, repeats, H, S, D)
            new[..., : self.length, :] = old[:, :, None, :, : self.length]
            setattr(self, name, new.view(L, B * repeats, H, S, D))

    def reorder(self, parents: Tensor, start: int = 0) -> None:
        """Let row n become row parents[n], int64 (B,), from position `start` on."""
        for buffer in (self.k, self.v):
            tail = buffer[:, :, :, start : self.length]
            tail.copy_(tail[:, parents])


class SharedCache(KVCache):
    """A cache for Triton's kernels: a table says in which row each position of a row lies.

    A prompt is stored once, however many rows go on from it, and a row that becomes another's
    continuation copies the other's row of the table. Row n's own new tokens always go to row n of
    the buffers, so nothing that a table still names is overwritten.

    ancestors: int32 (B, max_length); start: int32 (B,), the first position that is no padding, or
    None where there is none.
    """

    def __init__(self, *shape: Any) -> None:
        super().__init__(*shape)
        self.ancestors = self._own_rows()
        self.start: Tensor | None = None

    def _own_rows(self) -> Tensor:
        rows = torch.arange(self.batch_size, dtype=torch.int32, device=self.k.device)
        return rows[:, None].repeat(1, self.max_length)

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """As KVCache's, but return the buffers, or, where there is nothing before them, k and v."""
        super().extend(layer, k, v)
        return (self.k[layer], self.v[layer]) if self.length else (k, v)

    def seen(self, count: int) -> AttentionMetadata:
        """See KVCache."""
        if self.length == 0:
            # read anew: what rows had in common they have no more
            self.ancestors = self._own_rows()
            return AttentionMetadata(self.start)
        lengths = self.ancestors.new_full((self.batch_size,), self.length + count)
        return AttentionMetadata(self.start, lengths, self.ancestors)

    def repeat_interleave(self, repeats: int) -> None:
        """Let `repeats` rows share every row: B -> B * repeats rows."""
        past = self.ancestors[:, : self.length].repeat_interleave(repeats, dim=0)
        for name in ("k", "v"):
            old = getattr(self, name)
            L, B, H, S, D = old.shape
            new = old.new_empty(L, B * repeats, H, S, D)
            new[:, :B, :, : self.length] = old[:, :, :, : self.length]
            setattr(self, name, new)
        self.ancestors = self._own_rows()
        self.ancestors[:, : self.length] = past
        if self.start is not None:
            self.start = self.start.repeat_interleave(repeats)

    def reorder(self, parents: Tensor, start: int = 0) -> None:
        """See KVCache; the buffers stay as they are."""
        shared = self.ancestors[:, start : self.length]
        shared.copy_(shared[parents])
