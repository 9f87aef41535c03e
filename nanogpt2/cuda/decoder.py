"""GPT-2 for one new token per row on a GPU: model.py's arithmetic as a graph that is replayed.

At a few rows a token takes as long as reading the weights, if the host does not hold the GPU up.
So the step is a function of static buffers alone, and graph.py replays it:

    tokens     int64 (N,)     the tokens to read
    lengths    int32 (N,)     positions of the cache that are filled; the tokens go to the next one
    start      int32 (N,)     each row's first position after the padding
    ancestors  int32 (N, S)   the cache's row that holds position t of row n; None for rows alone
    k, v       (L, N, H, S, D)

Row n writes its tokens into row n of the cache. A prompt is stored once, in one of the first B
rows, and read through `ancestors`; a row that continues another row copies a row of `ancestors`.

A step looks at the first 64, 128, 256, ... positions of the cache, its bucket, and masks those that
are not filled. There is one graph per bucket. Triton compiles the attention for each; the first
step of a text compiles them all, so that no later one waits. The prompt, a slide and several tokens
at once are read eagerly by model.py.

CUDADecoder implements the Decoder protocol of generation/decoder.py. Axes: B prompts, N rows,
L layers, H heads, S positions, D = C // H. This file does not know how a token is chosen.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from nanogpt2.cuda import ops as step_ops
from nanogpt2.cuda.graph import Graphs
from nanogpt2.kv_cache import SharedCache
from nanogpt2.model import GPT

LEAST_BUCKET = 64
DEVICES = ("cuda",)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def can_run(model: GPT) -> bool:
    """Tell whether CUDADecoder computes what this model computes."""
    weight = model.wte.weight
    return (
        weight.device.type in DEVICES
        and weight.dtype in DTYPES
        and model.kernels in ("torch", "triton")
        # not sharded
        and type(weight) in (nn.Parameter, Tensor)
        and all(_is_product(m) for block in model.h for m in _matrices(block))
    )


class CUDADecoder:
    """Mirrors model.py: GPT.hidden_states, Block, CausalSelfAttention and MLP `.forward`, in eval.

    Block, attention and MLP modules are not called after the prompt, so hooks on them do not run.
    """

    def __init__(self, model: GPT, prompts: int, rows: int, max_length: int) -> None:
        """rows: those of each prompt."""
        N, device = prompts * rows, model.wte.weight.device
        self._model = model
        self._cache = model.new_cache(N, max_length)
        # PyTorch's attention multiplies masked positions by 0, so they must hold numbers
        self._cache.k.zero_()
        self._cache.v.zero_()
        self._length = 0
        self._graphs = Graphs(device)
        scratch = step_ops.decode_scratch(N, model.config.n_head, device, model.kernels)
        self._how: dict[str, Any] = {"kernels": model.kernels, "scratch": scratch}
        self._hidden = torch.empty(N, model.config.n_embd, device=device, dtype=self._cache.k.dtype)
        self._own = torch.arange(N, dtype=torch.int32, device=device)[:, None]
        self.tokens = torch.zeros(N, dtype=torch.int64, device=device)
        self.lengths = torch.zeros(N, dtype=torch.int32, device=device)
        self.start = torch.zeros(N, dtype=torch.int32, device=device)
        self.ancestors = self._own.repeat(1, max_length) if rows > 1 else None
        self.forked = rows == 1
        self._compiled = model.kernels != "triton"

    @property
    def kernels(self) -> str:
        """The kernels that run: "torch" or "triton"."""
        return self._model.kernels

    @property
    def pace(self) -> AbstractContextManager[Any]:
        """Nothing: a CPU's threads do not matter here."""
        return nullcontext()

    @property
    def length(self) -> int:
        """Positions read, of each row."""
        return self._length

    @torch.no_grad()
    def read(self, ids: Tensor, positions: Tensor | None, mask: Tensor | None) -> Tensor:
        """GPT.hidden_states: int64 (R, T) -> (R, T, C); the next call overwrites a single token's.

        Several tokens may follow others only where each prompt has one row.
        """
        if self._length and ids.size(1) == 1:
            self.tokens.copy_(ids[:, 0])
            self.replay("hidden states", self._keep)
            return self._hidden[:, None]
        rows = self._cache.first_rows(len(ids))
        rows.length = self._length
        if self._length == 0:
            self._begin(len(ids), mask)
        if isinstance(rows, SharedCache):
            # the kernels know the padding by its end alone
            each = len(self.start) // len(ids)
            rows.start = None if mask is None else self.start[::each].contiguous()
            mask = None
        hidden = self._model.hidden_states(ids, positions, mask, rows)
        self._fill(rows.length)
        return hidden

    def replay(self, name: str, then: Callable[[Tensor], None]) -> None:
        """Read `tokens`, then call `then` with the last block's output (N, C): both in one graph.

        then: a function of static buffers, always the same one under this name; it adds 1 to
        `lengths`.
        """
        if not self._compiled:
            self._compile_buckets()
            self._compiled = True
        bucket = min(bucket_of(self._length + 1), self._cache.max_length)
        self._graphs.run((name, bucket), lambda: then(self.step(bucket)))
        self._length += 1

    def step(self, bucket: int) -> Tensor:
        """Read one token per row: buffers -> the last block's output, before ln_f: (N, C)."""
        model, how, ancestors = self._model, self._how, None
        blocks: Any = model.h
        if self.ancestors is not None:
            # a row's own new token
            self.ancestors.scatter_(1, self.lengths[:, None].long(), self._own)
            ancestors = self.ancestors[:, :bucket]
        tables = model.wte.weight, model.wpe.weight
        x = step_ops.decode_embedding(
            self.tokens, self.lengths, self.start, *tables, model.kernels
        )  # (N, C)
        for n, block in enumerate(blocks):
            kv = self._cache.k[n, :, :, :bucket], self._cache.v[n, :, :, :bucket]
            qkv = self._product(x, block.attn.c_attn, norm=_norm(block.ln_1))  # (N, 3C)
            if block.attn.scale != 1:
                qkv[:, : x.size(1)] *= block.attn.scale
            y = step_ops.decode_attention(
                qkv, *kv, self.lengths, start=self.start, ancestors=ancestors, **how
            )  # (N, C)
            x = self._product(y, block.attn.c_proj, residual=x)
            bends = block.mlp.approximate
            y = self._product(x, block.mlp.c_fc, norm=_norm(block.ln_2), bends=bends)  # (N, 4C)
            x = self._product(y, block.mlp.c_proj, residual=x)
        return x

    def _compile_buckets(self) -> None:
        """Launch the attention of every bucket once.

        It writes to the next position of the first block's cache, as the coming step does again.
        """
        N, most = len(self.tokens), self._cache.max_length
        qkv = self._hidden.new_zeros(N, 3 * self._hidden.size(1))
        end = bucket_of(most)
        sizes = [min(end >> n, most) for n in range((end // LEAST_BUCKET).bit_length())]
        for size in sizes:
            kv = self._cache.k[0, :, :, :size], self._cache.v[0, :, :, :size]
            ancestors = None if self.ancestors is None else self.ancestors[:, :size]
            step_ops.decode_attention(
                qkv, *kv, self.lengths, start=self.start, ancestors=ancestors, **self._how
            )

    def scores(self, x: Tensor) -> Tensor:
        """Score the next token by what `step` returns: (N, C) -> float32 (N, V)."""
        weight, norm = self.head
        return step_ops.decode_linear(x, weight, None, norm=norm, **self._how).float()

    @property
    def head(self) -> tuple[Tensor, tuple[Tensor, Tensor, float]]:
        """The head's weight (V, C), and weight, bias and eps of the layer norm before it."""
        return self._model.head_weight, _norm(self._model.ln_f)

    def _product(self, x: Tensor, layer: Any, **options: Any) -> Tensor:
        return step_ops.decode_linear(x, layer.weight, layer.bias, **options, **self._how)

    def logits(self, x: Tensor) -> Tensor:
        """GPT.logits: (..., C) -> (..., V)."""
        return self._model.logits(x)

    def fork(self) -> None:
        """Read each row by itself from now on; until now a prompt was read as one row."""
        self.forked = True

    def reorder(self, parents: Tensor) -> None:
        """Make row n the continuation of row parents[n], int64 (N,), of the same prompt.

        A function of static buffers: it may be part of a graph.
        """
        if self.ancestors is not None:
            self.ancestors.copy_(self.ancestors[parents])

    def drop(self, count: int) -> None:
        """Forget the last positions, of a prompt with one row."""
        self._fill(self._length - count)

    def forget(self) -> None:
        """Begin again, with all N rows."""
        self._fill(0)

    def _begin(self, rows: int, mask: Tensor | None) -> None:
        """Fill the tables for a first reading, by N rows or by one for each prompt."""
        each = len(self.tokens) // rows
        if self.ancestors is not None:
            self.ancestors.copy_(self._own[:rows].repeat_interleave(each, dim=0))
        self.start.zero_()
        if mask is not None:
            # the last token sees everything except the padding
            first = mask[:, 0, -1].int().argmax(dim=1)
            self.start.copy_(first.repeat_interleave(each))

    def _fill(self, length: int) -> None:
        self._length = length
        self.lengths.fill_(length)

    def _keep(self, x: Tensor) -> None:
        self._hidden.copy_(self._model.ln_f(x))
        self.lengths += 1


def bucket_of(length: int) -> int:
    """Return the least power of two, from LEAST_BUCKET on, that holds `length` positions."""
    return max(LEAST_BUCKET, 1 << (length - 1).bit_length())


def _norm(layer: Any) -> tuple[Tensor, Tensor, float]:
    return layer.weight, layer.bias, layer.eps


def _matrices(block: Any) -> tuple[nn.Module, ...]:
    """Return the four matrices of a Block."""
    return block.attn.c_attn, block.attn.c_proj, block.mlp.c_fc, block.mlp.c_proj


def _is_product(layer: nn.Module) -> bool:
    """Tell whether a layer computes x W^T + b and nothing more; LoRA's layers add a product."""
    parameters = {name for name, _ in layer.named_parameters()}
    return isinstance(layer, nn.Linear) and parameters == {"weight", "bias"}
