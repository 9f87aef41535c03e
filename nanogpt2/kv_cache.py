"""The KV cache: keys and values of the tokens already read, so that only new tokens are computed.

Buffers have their full length from the start: decoding allocates and copies nothing. Beams share
the keys and values they have in common: a SharedCache copies rows of a table instead. This file
does not know what attention does with keys and values.
"""

from copy import copy
from typing import Any, Self

import torch
from torch import Tensor
from typing_extensions import override

from nanogpt2.ops import AttentionMetadata, Mask


class KVCache:
    """The keys and values of every layer, filled from the left.

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
        """Positions that fit."""
        return self.k.size(3)

    def first_rows(self, count: int) -> Self:
        """Return a cache of the first `count` rows of these buffers, with its own `length`."""
        part = copy(self)
        part.k, part.v = self.k[:, :count], self.v[:, :count]
        return part

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write one layer's k, v (B, H, T, D) of new tokens; return all, (B, H, length + T, D).

        `length` grows only in `advance`, once every layer has been extended.
        Raises ValueError for more positions than fit.
        """
        end = self.length + k.size(2)
        if end > self.max_length:
            raise ValueError(f"the cache has room for {self.max_length} positions, not {end}")
        self.k[layer, :, :, self.length : end] = k
        self.v[layer, :, :, self.length : end] = v
        return self.k[layer, :, :, :end], self.v[layer, :, :, :end]

    def seen(self, count: int) -> Mask:
        """Return the mask of `count` new tokens, (count, length + count).

        None: the tokens are the first, so causal attention serves, or one token sees everything.
        """
        if self.length == 0 or count == 1:
            return None
        # new token t is at position length + t and sees everything up to there
        shape = count, self.length + count
        return torch.ones(shape, dtype=torch.bool, device=self.k.device).tril(self.length)

    def advance(self, count: int) -> None:
        """Count the positions that `extend` has just written in every layer."""
        self.length += count

    def repeat_interleave(self, repeats: int) -> None:
        """Copy every row to `repeats` neighbouring rows: B -> B * repeats rows."""
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
    """A cache for Triton's kernels: a table names the buffers' row that holds each position.

    A prompt is stored once, however many rows continue it. A row that continues another row copies
    that row of the table. Row n always writes its new tokens to row n of the buffers, so nothing
    named in the table is overwritten.

    ancestors: int32 (B, max_length); start: int32 (B,), the first position after the padding, or
    None without padding.
    """

    def __init__(self, *shape: Any) -> None:
        super().__init__(*shape)
        self.ancestors = self._own_rows()
        self.start: Tensor | None = None

    def _own_rows(self) -> Tensor:
        rows = torch.arange(self.batch_size, dtype=torch.int32, device=self.k.device)
        return rows[:, None].repeat(1, self.max_length)

    @override
    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write as KVCache does; return the whole buffers, or k and v themselves when first."""
        super().extend(layer, k, v)
        return (self.k[layer], self.v[layer]) if self.length else (k, v)

    @override
    def seen(self, count: int) -> AttentionMetadata:
        if self.length == 0:
            # a fresh start: rows share nothing any more
            self.ancestors = self._own_rows()
            return AttentionMetadata(self.start)
        lengths = self.ancestors.new_full((self.batch_size,), self.length + count)
        return AttentionMetadata(self.start, lengths, self.ancestors)

    @override
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

    @override
    def reorder(self, parents: Tensor, start: int = 0) -> None:
        # only the table changes; the buffers stay
        shared = self.ancestors[:, start : self.length]
        shared.copy_(shared[parents])
