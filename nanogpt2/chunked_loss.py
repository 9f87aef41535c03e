"""PyTorch's side of the loss: the head's product and the cross-entropy, a few rows at a time.

A batch of 16 x 1024 tokens has 16384 x 50257 logits, 3.3 GB in float32, and as large a gradient.
Here the logits exist for one chunk of rows only. Each chunk makes its part of the gradient at once,
so the logits are neither kept nor computed twice.

This file does not know what a transformer is.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from nanogpt2.config import IGNORE_INDEX

# logits of a chunk, at least: 32 MiB in float32 stay near a CPU's caches, 1 GiB keeps a GPU busy
CHUNK_ELEMENTS = {"cpu": 2**23}
CHUNK_ELEMENTS_ELSEWHERE = 2**28
TOKENS = 2**13  # rows of the weight whose gradient is computed at once

Matmul = Callable[[Tensor, Tensor], Tensor]


def chunk_rows(vocab_size: int, width: int, device: str) -> int:
    """Return the number of rows in a chunk.

    Each chunk adds to the weight's whole gradient. With at least C / 2 rows the addition takes no
    longer than the chunk's logits.
    """
    return max(width // 2, CHUNK_ELEMENTS.get(device, CHUNK_ELEMENTS_ELSEWHERE) // vocab_size)


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """Return a b: (..., K) and (K, N) -> (..., N)."""
    return F.linear(a, b.t())


def chunked_cross_entropy(
    x: Tensor, weight: Tensor, targets: Tensor, matmul: Matmul = matmul
) -> Tensor:
    """Return the mean over the targets of -log softmax(x weight^T)[target], () in float32.

    x: (M, C); weight: (V, C), of x's dtype; targets: int64 (M,), IGNORE_INDEX does not count.
    """
    return _ChunkedCrossEntropy.apply(x, weight, targets, matmul, torch.is_grad_enabled())


class _ChunkedCrossEntropy(torch.autograd.Function):
    """z = x W^T, p = softmax(z); dz = p - onehot(target), dx = dz W / count, dW = dz^T x / count.

    The division comes last, together with the incoming gradient: float16 scales its loss, and
    dz / count alone would underflow.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, targets: Tensor, matmul: Matmul, grad_enabled: bool
    ) -> Tensor:
        needs_dx, needs_dw = (needed and grad_enabled for needed in ctx.needs_input_grad[:2])
        counted = targets != IGNORE_INDEX  # (M,)
        count = counted.sum()
        targets = targets.where(counted, 0)
        loss = torch.zeros((), dtype=torch.float32, device=x.device)
        dx = torch.empty_like(x) if needs_dx else None
        # always in float32: dw is a sum over all chunks
        dw = torch.zeros_like(weight, dtype=torch.float32) if needs_dw else None
        chunks = -(-len(x) // chunk_rows(len(weight), weight.size(1), x.device.type))
        rows = -(-len(x) // max(1, chunks))
        for start in range(0, len(x), rows):
            # free the last chunk's memory first; `columns` is a view of that memory too
            logits = dz = columns = None
            chunk = slice(start, start + rows)
            target, weighs = targets[chunk, None], counted[chunk, None].float()  # (rows, 1)
            logits = matmul(x[chunk], weight.t()).float()  # (rows, V)
            logits -= logits.amax(dim=-1, keepdim=True)
            right = logits.gather(1, target)
            # one buffer holds the logits, then exp(z), then the logits' gradient
            total = logits.exp_().sum(dim=-1, keepdim=True)
            loss += ((total.log() - right) * weighs).sum()
            if not (needs_dx or needs_dw):
                continue
            dz = logits.mul_(weighs / total).scatter_add_(1, target, -weighs).to(x.dtype)
            if dx is not None:
                dx[chunk] = matmul(dz, weight)
            if dw is not None:
                # some tokens at a time: the whole product would be as large again as dw
                for some, columns in zip(dw.split(TOKENS), dz.split(TOKENS, 1), strict=True):
                    some += matmul(columns.t(), x[chunk])
        if dw is not None:
            dw /= count
        ctx.save_for_backward(dx, dw, count)
        ctx.weight_dtype = weight.dtype
        return loss / count

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        dx, dw, count = ctx.saved_tensors
        # in float32: float16 may not hold grad
        dx = None if dx is None else (dx.float() * (grad / count)).to(dx.dtype)
        # A gradient of 1 needs no copy of dw, which is as large as the embedding. Only a CPU looks:
        # reading a GPU's number would wait for the GPU.
        if dw is not None and not (grad.device.type == "cpu" and grad == 1):
            dw = dw * grad
        dw = None if dw is None else dw.to(ctx.weight_dtype)
        return dx, dw, None, None, None
