"""How a model reads tokens while it generates: what is read once is kept, and shared by the rows.

Two ways, with the same results but for rounding. `ModelDecoder` runs model.py with its cache, on
any device and by either kernels. `RowsDecoder` is for a few rows on a CPU, where a step takes as
long as the weights take to be read if only nothing else does:

- the same arithmetic without the modules' steps, and products made for few rows (prepacked.py);
- the prompt's keys and values are stored once, and read once for all of its rows:

      shared  (B, H, S, D)   positions that are the same in all rows of a prompt
      own     (N, H, W, D)   the W last ones, where the rows differ

  Attention to both is joined by their normalisers: o = w o_shared + (1 - w) o_own with
  w = sigmoid(lse_shared - lse_own);
- when beams go on from one another only `own` is reordered, and what has become the same in all
  rows of a prompt moves to `shared`: beams soon descend from one, so W stays small.

Axes: B prompts, N rows in all, L layers, H heads, T new tokens. This file does not know how a token
is chosen, nor what positions mean.
"""

from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nanogpt2.cpu.prepacked import FloatLinear, PrepackedLinear, runs_prepacked
from nanogpt2.kv_cache import SharedCache
from nanogpt2.model import GPT, Linear

ROOM = 8  # positions of `own` that are made at first


class Decoder(Protocol):
    """Reads tokens: of B rows at first, then, once the rows of a prompt are `forked`, of all N."""

    forked: bool

    @property
    def length(self) -> int:
        """Positions read, of each row."""

    def __init__(self, model: GPT, prompts: int, rows: int, max_length: int) -> None:
        """rows: those of each prompt."""

    def read(self, ids: Tensor, positions: Tensor | None, mask: Tensor | None) -> Tensor:
        """Read int64 (B or N, T); return what the model knows there, (B or N, T, C).

        positions and mask: as for GPT.hidden_states.
        """

    def logits(self, x: Tensor) -> Tensor:
        """Score the next token: (..., C) -> (..., V)."""

    def fork(self) -> None:
        """Let the rows of a prompt, one until now, be read apart."""

    def reorder(self, parents: Tensor) -> None:
        """Make row n the continuation of row parents[n], int64 (N,), of the same prompt."""

    def drop(self, count: int) -> None:
        """Forget the last positions, of a prompt with one row."""

    def forget(self) -> None:
        """Begin anew, with all N rows."""


def decoder_for(
    model: GPT, prompts: int, rows: int, max_length: int, left_padded: bool = True
) -> Decoder:
    """The faster of the two that can run this model.

    left_padded: all that masks will hide is padding before the prompts' first tokens.
    """
    weight = model.wpe.weight
    linears = [m for block in model.h for m in _linears(block)]
    few = (
        runs_prepacked(model.kernels, weight.device.type, weight.dtype)
        # neither sharded nor adapted
        and type(weight) in (nn.Parameter, Tensor)
        and all(type(m) is Linear or isinstance(m, PrepackedLinear) for m in linears)
    )
    if few:
        return RowsDecoder(model, prompts, rows, max_length)
    return ModelDecoder(model, prompts, rows, max_length, left_padded)


class ModelDecoder:
    """Runs model.py with its cache."""

    def __init__(
        self, model: GPT, prompts: int, rows: int, max_length: int, left_padded: bool = True
    ) -> None:
        self._model, self._rows = model, rows
        self._cache = model.new_cache(prompts, max_length, masked=not left_padded)
        self._shared = 0  # positions of the cache that are the same in all rows of a prompt
        self.forked = rows == 1

    @property
    def length(self) -> int:
        """See Decoder."""
        return self._cache.length

    def read(self, ids: Tensor, positions: Tensor | None, mask: Tensor | None) -> Tensor:
        """See Decoder."""
        if mask is not None and isinstance(self._cache, SharedCache):
            if self.length == 0:
                # the last token sees all but the padding
                self._cache.start = mask[:, 0, -1].int().argmax(dim=1).int()
            mask = None
        return self._model.hidden_states(ids, positions, mask, self._cache)

    def logits(self, x: Tensor) -> Tensor:
        """See Decoder."""
        return self._model.logits(x)

    def fork(self) -> None:
        """See Decoder."""
        self._cache.repeat_interleave(self._rows)
        self._shared, self.forked = self._cache.length, True

    def reorder(self, parents: Tensor) -> None:
        """See Decoder."""
        self._cache.reorder(parents, start=self._shared)

    def drop(self, count: int) -> None:
        """See Decoder."""
        self._cache.length -= count

    def forget(self) -> None:
        """See Decoder."""
        self._shared = self._cache.length = 0


class RowsDecoder:
    """GPT-2 for a few rows on a CPU; see the module.

    What it returns, and what hooks on the model see, are inference tensors: clone them to train.
    """

    def __init__(self, model: GPT, prompts: int, rows: int, max_length: int) -> None:
        c = model.config
        self._model, self._rows = model, rows
        self._layers: list[tuple[Any, ...]] = [
            (block.ln_1, block.ln_2, *map(_product, _linears(block))) for block in model.h
        ]
        self._H, self._D = c.n_head, c.n_embd // c.n_head
        B, N = prompts, prompts * rows
        # memory that is not written to is not taken
        self._shared = torch.empty(c.n_layer, 2, B, self._H, max_length, self._D)
        own = 2, N, self._H, ROOM if rows > 1 else 0, self._D
        # each layer's of its own: they are made longer one after the other
        self._own = [torch.empty(own) for _ in self._layers]
        self._S = self._W = 0
        # (N, W): positions of two rows that bear the same number are the same
        self._origin = torch.empty(N, 0, dtype=torch.int64)
        self.forked = rows == 1

    @property
    def length(self) -> int:
        """See Decoder."""
        return self._S + self._W

    @property
    def _apart(self) -> bool:
        return self.forked and self._rows > 1

    @torch.inference_mode()
    def read(self, ids: Tensor, positions: Tensor | None, mask: Tensor | None) -> Tensor:
        """See Decoder."""
        R, T = ids.shape
        if self.length + T > self._model.config.block_size:
            raise ValueError(
                f"the context is at most {self._model.config.block_size} tokens, "
                f"not {self.length + T}"
            )
        if positions is None:
            positions = torch.arange(self.length, self.length + T)
        if mask is None and self.length and T > 1:
            mask = torch.ones(T, self.length + T, dtype=torch.bool).tril(self.length)
        if mask is not None:
            # a row that sees nothing would be 0 / 0 with -inf
            mask = torch.zeros(mask.shape).masked_fill_(~mask, torch.finfo(torch.float32).min / 2)
        if self._apart:
            self._make_room(T)
        store, past = (self._own, self._W) if self._apart else (self._shared, self._S)
        shared = self._shared[..., : self._S, :] if self._apart and self._S else None
        x = self._model.wte(ids) + self._model.wpe(positions)  # (R, T, C)
        for n, (ln_1, ln_2, c_attn, attn_proj, c_fc, mlp_proj) in enumerate(self._layers):
            qkv = c_attn(ln_1(x)).view(R, T, 3, self._H, self._D).permute(2, 0, 3, 1, 4)
            seen = store[n].narrow(3, 0, past + T)  # (2, R, H, past + T, D)
            q, seen[:, :, :, past:] = qkv[0], qkv[1:]  # each (R, H, T, D)
            if shared is None:
                k, v = seen
                y = F.scaled_dot_product_attention(
                    q, k, v, attn_mask=mask, is_causal=mask is None and T > 1
                )
            else:
                y = self._attend_apart(q, seen, shared[n], mask)
            x = attn_proj.plus(y.transpose(1, 2).reshape(R, T, -1), x)
            x = mlp_proj.plus(c_fc.gelu(ln_2(x)), x)
        if self._apart:
            self._W += T
            labels = torch.arange(R)[:, None].expand(R, T)
            self._origin = torch.cat([self._origin, labels], dim=1)
        else:
            self._S += T
        return self._model.ln_f(x)

    def logits(self, x: Tensor) -> Tensor:
        """See Decoder."""
        return self._model.logits(x)

    def fork(self) -> None:
        """See Decoder."""
        self.forked = True

    @torch.inference_mode()
    def reorder(self, parents: Tensor) -> None:
        """See Decoder."""
        if not self._W:
            return
        self._origin = self._origin[parents]
        of_a_prompt = self._origin.view(-1, self._rows, self._W)
        # rows that share a token share all before it
        count = int((of_a_prompt == of_a_prompt[:, :1]).all(dim=1).all(dim=0).sum())
        S, W = self._S, self._W
        first = parents[:: self._rows]
        for shared, own in zip(self._shared, self._own, strict=True):
            if count:
                shared[..., S : S + count, :] = own[..., :count, :].index_select(1, first)
            own[..., : W - count, :] = own[..., count:W, :].index_select(1, parents)
        self._origin = self._origin[:, count:]
        self._S, self._W = S + count, W - count

    def drop(self, count: int) -> None:
        """See Decoder."""
        self._S -= count

    def forget(self) -> None:
        """See Decoder."""
        self._S = self._W = 0
        self._origin = self._origin[:, :0]

    def _make_room(self, count: int) -> None:
        """Let `own` hold so many positions more."""
        *shape, room, D = self._own[0].shape
        if self._W + count > room:
            for n, own in enumerate(self._own):
                self._own[n] = own.new_empty(*shape, room + max(ROOM, room // 4, count), D)
                self._own[n][..., : self._W, :] = own[..., : self._W, :]

    def _attend_apart(self, q: Tensor, own: Tensor, shared: Tensor, mask: Tensor | None) -> Tensor:
        """Attention (N, H, 1, D) to both stores: own (2, N, H, W, D), shared (2, B, H, S, D)."""
        N, H, _, D = q.shape
        S = shared.size(3)
        seen = None if mask is None else mask[..., S:]
        y, lse = _attention(q, own, seen)  # (N, H, 1, D), (N, H, 1)
        # the rows of a prompt are so many queries to one
        queries = q.view(-1, self._rows, H, D).transpose(1, 2)  # (B, H, rows, D)
        seen = None if mask is None else mask[:: self._rows, :, :, :S]
        more, more_lse = _attention(queries, shared, seen)
        more = more.transpose(1, 2).reshape(N, H, 1, D)
        more_lse = more_lse.transpose(1, 2).reshape(N, H, 1)
        return y.lerp(more, (more_lse - lse).sigmoid_()[..., None])


def _attention(q: Tensor, kv: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """softmax(q k^T / sqrt(D) + mask) v, (B, H, T, D), and the log of its normaliser, (B, H, T)."""
    k, v = kv
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, attn_mask=mask)


def _linears(block: Any) -> tuple[nn.Module, ...]:
    """A block's linear parts, in the order in which they are met."""
    return block.attn.c_attn, block.attn.c_proj, block.mlp.c_fc, block.mlp.c_proj


def _product(linear: Any) -> PrepackedLinear:
    """A linear part as one that is made for few rows."""
    return (
        linear if isinstance(linear, PrepackedLinear) else FloatLinear(linear.weight, linear.bias)
    )
