"""The keys and values of the tokens already read, so that a new token is the only one computed.

Buffers have their full length from the start: nothing is allocated or copied while decoding.
This file does not know what attention does with them.
"""

import torch
from torch import Tensor


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
