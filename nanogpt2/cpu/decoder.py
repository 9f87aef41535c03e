"""GPT-2 for a few rows on a CPU: model.py's arithmetic, arranged to read the weights fast.

A decoding step of a few rows takes as long as reading the weights, if nothing else costs time.
So this decoder saves everything else:

- It multiplies by matrices prepared for few rows (prepared.py), which also add the residual.
- It stores and reads the keys and values of a prompt once for all rows of the prompt:

      shared  (B, H, S, D)   positions that are equal in all rows of a prompt
      own     (N, H, W, D)   the last W positions, where the rows differ

  The normalisers join attention to both parts: o = w o_shared + (1 - w) o_own, with
  w = sigmoid(lse_shared - lse_own).
- When beams continue from one another, only `own` is reordered. Positions that became equal in all
  rows of every prompt move to `shared`. Beams soon descend from a single beam, so W stays small.

CPUDecoder implements the Decoder protocol of generation/decoder.py. tests/test_decoder.py compares
each layer with model.py's.

Axes: B prompts, N rows in all, R rows read at once (B or N), T new tokens, L layers, H heads,
D = C // H. This file does not know how a token is chosen, nor what positions mean.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nanogpt2.cpu.native import MOST_ROWS, Blocks
from nanogpt2.cpu.pace import Pace
from nanogpt2.cpu.prepacked import runs_prepacked
from nanogpt2.cpu.prepared import is_product, matrices, prepared_for
from nanogpt2.model import GPT

INITIAL_CAPACITY = 8  # positions of `own` that are allocated first


def can_run(model: GPT) -> bool:
    """Tell whether CPUDecoder computes what this model computes."""
    weight = model.wpe.weight
    return (
        runs_prepacked(model.kernels, weight.device.type, weight.dtype)
        # not sharded
        and type(weight) in (nn.Parameter, Tensor)
        and all(is_product(m) for block in model.h for m in matrices(block))
    )


class CPUDecoder:
    """Mirrors model.py: GPT.hidden_states, Block, CausalSelfAttention and MLP `.forward`, in eval.

    `read` returns inference tensors; clone them to train. Block, attention and MLP modules are not
    called, so hooks on them do not run.
    """

    def __init__(self, model: GPT, prompts: int, rows: int, max_length: int) -> None:
        """rows: those of each prompt."""
        c = model.config
        self._model, self._rows, self._max_length = model, rows, max_length
        self._prepared = prepared_for(model)
        self._layers = self._prepared.layers
        self._H, self._D = c.n_head, c.n_embd // c.n_head
        # the system provides memory only when it is written
        self._shared = [torch.empty(2, prompts, self._H, max_length, self._D) for _ in self._layers]
        capacity = INITIAL_CAPACITY if rows > 1 else 0
        # a tensor for each layer, so that `_grow` copies a single layer at a time
        self._own = [
            torch.empty(2, prompts * rows, self._H, capacity, self._D) for _ in self._layers
        ]
        self._shared_length = self._own_length = 0  # S, W
        # (N, W): two rows with the same number at a position are equal up to that position
        self._origin = torch.empty(prompts * rows, 0, dtype=torch.int64)
        self.forked = rows == 1

    @property
    def length(self) -> int:
        """Positions read, of each row."""
        return self._shared_length + self._own_length

    @property
    def pace(self) -> Pace:
        """Wraps the reading and scoring of one token for each row."""
        return self._prepared.pace

    @property
    def _writes_own(self) -> bool:
        return self.forked and self._rows > 1

    @torch.inference_mode()
    def read(self, ids: Tensor, positions: Tensor | None, mask: Tensor | None) -> Tensor:
        """GPT.hidden_states: int64 (R, T) -> (R, T, C)."""
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
            # finite: with -inf, a row that may look nowhere would compute 0 / 0
            mask = torch.zeros(mask.shape).masked_fill_(~mask, torch.finfo(torch.float32).min / 2)
        if self._writes_own:
            self._grow(T)
        if not self.length:
            new = min(self._max_length, self._model.config.block_size) - T
            self._prepared.begin(len(self._origin), R * T, new)
        self._prepared.count(R, T)
        x = self._model.wte(ids) + self._model.wpe(positions)  # (R, T, C)
        # read once, and ask for one token: another thread's text changes the model's blocks
        blocks = self._prepared.blocks
        if blocks is not None and T == 1 and R <= MOST_ROWS:
            self._add_blocks(blocks, x, mask)
        else:
            for n in range(len(self._layers)):
                x = self._add_attention(n, x, mask)
                x = self._add_mlp(n, x)
        self._advance(R, T)
        return self._model.ln_f(x)

    def _add_blocks(self, blocks: Blocks, x: Tensor, mask: Tensor | None) -> None:
        """Replace x (R, 1, C) by the last block's output."""
        S, W = self._shared_length, self._own_length
        if self._writes_own:
            blocks(x, self._own, W, self._shared, S, mask)
        else:
            blocks(x, self._shared, S, mask=mask)

    def _add_attention(self, n: int, x: Tensor, mask: Tensor | None) -> Tensor:
        """Block.forward's first line with CausalSelfAttention.forward: (R, T, C) -> (R, T, C).

        n: the layer. mask: added to the scores, 0 where a query may look.
        """
        layer, (R, T, _), S = self._layers[n], x.shape, self._shared_length
        qkv = layer.c_attn(layer.ln_1(x)).view(R, T, 3, self._H, self._D)
        if layer.scale != 1:
            qkv[:, :, 0] *= layer.scale
        qkv = qkv.permute(2, 0, 3, 1, 4)  # (3, R, H, T, D)
        store, past = (self._own[n], self._own_length) if self._writes_own else (self._shared[n], S)
        kv = store.narrow(3, 0, past + T)  # (2, R, H, past + T, D)
        q, kv[:, :, :, past:] = qkv[0], qkv[1:]  # each (R, H, T, D)
        if self._writes_own and S:
            y = self._attend_to_both(q, kv, self._shared[n][..., :S, :], mask)
        else:
            k, v = kv
            y = F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, is_causal=mask is None and T > 1
            )  # (R, H, T, D)
        y = y.transpose(1, 2).reshape(R, T, -1)  # (R, T, C)
        return layer.attn_c_proj.plus(y, x)

    def _add_mlp(self, n: int, x: Tensor) -> Tensor:
        """Block.forward's second line with MLP.forward, in layer n: (R, T, C) -> (R, T, C)."""
        layer = self._layers[n]
        return layer.mlp_c_proj.plus(layer.c_fc.gelu(layer.ln_2(x), layer.approximate), x)

    def _advance(self, R: int, T: int) -> None:
        """Count the positions that every layer has just been given."""
        if self._writes_own:
            self._own_length += T
            labels = torch.arange(R)[:, None].expand(R, T)
            self._origin = torch.cat([self._origin, labels], dim=1)
        else:
            self._shared_length += T

    def logits(self, x: Tensor) -> Tensor:
        """GPT.logits: (..., C) -> (..., V)."""
        self._prepared.count_head(x.numel() // x.size(-1))
        return self._prepared.head(x)

    def fork(self) -> None:
        """Read each row by itself from now on; until now a prompt was read as one row."""
        self.forked = True

    @torch.inference_mode()
    def reorder(self, parents: Tensor) -> None:
        """Make row n the continuation of row parents[n], int64 (N,), of the same prompt."""
        if not self._own_length:
            return
        self._origin = self._origin[parents]
        of_a_prompt = self._origin.view(-1, self._rows, self._own_length)
        # rows that share a token share all tokens before it
        count = int((of_a_prompt == of_a_prompt[:, :1]).all(dim=1).all(dim=0).sum())
        S, W = self._shared_length, self._own_length
        first = parents[:: self._rows]
        for shared, own in zip(self._shared, self._own, strict=True):
            if count:
                shared[..., S : S + count, :] = own[..., :count, :].index_select(1, first)
            own[..., : W - count, :] = own[..., count:W, :].index_select(1, parents)
        self._origin = self._origin[:, count:]
        self._shared_length, self._own_length = S + count, W - count

    def drop(self, count: int) -> None:
        """Forget the last positions, of a prompt with one row."""
        self._shared_length -= count

    def forget(self) -> None:
        """Begin again, with all N rows."""
        self._shared_length = self._own_length = 0
        self._origin = self._origin[:, :0]

    def _grow(self, count: int) -> None:
        """Give `own` capacity for `count` more positions."""
        *shape, capacity, D = self._own[0].shape
        W = self._own_length
        if W + count > capacity:
            capacity += max(INITIAL_CAPACITY, capacity // 4, count)
            for n, own in enumerate(self._own):
                self._own[n] = own.new_empty(*shape, capacity, D)
                self._own[n][..., :W, :] = own[..., :W, :]

    def _attend_to_both(
        self, q: Tensor, own: Tensor, shared: Tensor, mask: Tensor | None
    ) -> Tensor:
        """Attention (N, H, 1, D) to both stores: own (2, N, H, W, D), shared (2, B, H, S, D)."""
        N, H, _, D = q.shape
        S = shared.size(3)
        own_mask = None if mask is None else mask[..., S:]
        y, lse = _attention(q, own, own_mask)  # (N, H, 1, D), (N, H, 1)
        # the rows of a prompt become several queries of a single row
        queries = q.view(-1, self._rows, H, D).transpose(1, 2)  # (B, H, rows, D)
        shared_mask = None if mask is None else mask[:: self._rows, :, :, :S]
        shared_y, shared_lse = _attention(queries, shared, shared_mask)
        shared_y = shared_y.transpose(1, 2).reshape(N, H, 1, D)
        shared_lse = shared_lse.transpose(1, 2).reshape(N, H, 1)
        return y.lerp(shared_y, (shared_lse - lse).sigmoid_()[..., None])


def _attention(q: Tensor, kv: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """softmax(q k^T / sqrt(D) + mask) v, (B, H, T, D), and the log of its normaliser, (B, H, T)."""
    k, v = kv
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, attn_mask=mask)
