"""Who runs the model while a text is generated: model.py itself, or the decoder of a device.

All keep what they have read, share a prompt among its rows, and agree but for rounding:

- `ModelDecoder`, below, runs model.py with its cache, on any device, with any kernels.
- `CPUDecoder`, in cpu/decoder.py, is faster for a few rows on a CPU.
- `CUDADecoder`, in cuda/decoder.py, replays the reading of a token as a CUDA graph.

Axes: B prompts, N rows in all, T new tokens. This file does not know how a token is chosen, nor
what positions mean.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

from torch import Tensor
from typing_extensions import override

from nanogpt2.cpu import decoder as cpu
from nanogpt2.cpu.decoder import CPUDecoder
from nanogpt2.cuda import decoder as cuda
from nanogpt2.cuda.decoder import CUDADecoder
from nanogpt2.kv_cache import SharedCache
from nanogpt2.model import GPT


class Decoder(Protocol):
    """Reads tokens: first B rows, one for each prompt; once `forked`, all N rows."""

    forked: bool

    @property
    def pace(self) -> AbstractContextManager[Any]:
        """Wraps the reading and scoring of one token for each row."""

    @property
    def length(self) -> int:
        """Positions read, of each row."""

    def read(self, ids: Tensor, positions: Tensor | None, mask: Tensor | None) -> Tensor:
        """Read int64 (B or N, T); return the hidden states there, (B or N, T, C).

        positions and mask: as for GPT.hidden_states.
        """

    def logits(self, x: Tensor) -> Tensor:
        """Score the next token: (..., C) -> (..., V)."""

    def fork(self) -> None:
        """Read each row by itself from now on; until now a prompt was read as one row."""

    def reorder(self, parents: Tensor) -> None:
        """Make row n the continuation of row parents[n], int64 (N,), of the same prompt."""

    def drop(self, count: int) -> None:
        """Forget the last positions, of a prompt with one row."""

    def forget(self) -> None:
        """Begin again, with all N rows."""


def decoder_for(
    model: GPT, prompts: int, rows: int, max_length: int, left_padded: bool = True
) -> Decoder:
    """Choose the faster decoder that can run this model.

    left_padded: masks will hide padding before the prompts' first tokens, and nothing else.
    """
    if cpu.can_run(model):
        return CPUDecoder(model, prompts, rows, max_length)
    if left_padded and cuda.can_run(model):
        return CUDADecoder(model, prompts, rows, max_length)
    return ModelDecoder(model, prompts, rows, max_length, left_padded)


class ModelDecoder(Decoder):
    """Runs model.py with its cache."""

    def __init__(
        self, model: GPT, prompts: int, rows: int, max_length: int, left_padded: bool = True
    ) -> None:
        """rows: those of each prompt. left_padded: see decoder_for."""
        self._model, self._rows = model, rows
        self._cache = model.new_cache(prompts, max_length, masked=not left_padded)
        self._shared_length = 0  # positions of the cache that are equal in all rows of a prompt
        self.forked = rows == 1

    @property
    @override
    def pace(self) -> AbstractContextManager[Any]:
        return nullcontext()

    @property
    @override
    def length(self) -> int:
        return self._cache.length

    @override
    def read(self, ids: Tensor, positions: Tensor | None, mask: Tensor | None) -> Tensor:
        if mask is not None and isinstance(self._cache, SharedCache):
            if self.length == 0:
                # the last token sees everything except the padding
                self._cache.start = mask[:, 0, -1].int().argmax(dim=1).int()
            mask = None
        return self._model.hidden_states(ids, positions, mask, self._cache)

    @override
    def logits(self, x: Tensor) -> Tensor:
        return self._model.logits(x)

    @override
    def fork(self) -> None:
        self._cache.repeat_interleave(self._rows)
        self._shared_length, self.forked = self._cache.length, True

    @override
    def reorder(self, parents: Tensor) -> None:
        self._cache.reorder(parents, start=self._shared_length)

    @override
    def drop(self, count: int) -> None:
        self._cache.length -= count

    @override
    def forget(self) -> None:
        self._shared_length = self._cache.length = 0
