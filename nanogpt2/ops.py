"""The seam between the model and what computes it: each operation of GPT-2, by PyTorch.

`model.py` calls these five functions and nothing below them, so a faster kernel is one `if` here
and no line there. This file does not know what a transformer is.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

# logits that are alive at once in linear_cross_entropy: 32 MiB in fp32 stay near a CPU's caches,
# 1 GiB keeps a GPU busy
CHUNK_ELEMENTS = {"cpu": 2**23}
CHUNK_ELEMENTS_ELSEWHERE = 2**28


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """(x - mean) / sqrt(var + eps) * weight + bias over the last axis: (..., C) -> (..., C)."""
    return F.layer_norm(x, weight.shape, weight, bias, eps)


def gelu(x: Tensor) -> Tensor:
    """0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))): GPT-2's tanh form, not the erf one."""
    return F.gelu(x, approximate="tanh")


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool,
    mask: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """softmax(q k^T / sqrt(D)) v.

    q: (B, H, T, D); k, v: (B, H, S, D). `causal` lets query t see keys 0 to t and needs S = T;
    `mask`, bool and broadcastable to (B, H, T, S), is True where a query may look. -> (B, H, T, D).
    """
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=causal, dropout_p=dropout
    )


def softmax(x: Tensor) -> Tensor:
    """exp(x - max) / sum over the last axis: (..., N) -> (..., N)."""
    return F.softmax(x, dim=-1)


def linear_cross_entropy(
    x: Tensor, weight: Tensor, targets: Tensor, ignore_index: int = -100
) -> Tensor:
    """Mean over the targets of -log softmax(x weight^T)[target], never holding all the logits.

    x: (M, C); weight: (V, C); targets: int64 (M,), those equal to `ignore_index` do not count.
    -> () in fp32. Works on a chunk of rows at a time and makes its gradient while the chunk's
    logits are at hand, so 50257 logits a token are neither kept nor computed twice.
    """
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight = x.to(dtype), weight.to(dtype)
    return _LinearCrossEntropy.apply(x, weight, targets, ignore_index, torch.is_grad_enabled())


class _LinearCrossEntropy(torch.autograd.Function):
    """z = x W^T, p = softmax(z); dz = p - onehot(target), dx = dz W / count, dW = dz^T x / count.

    The division comes last, with the gradient that arrives: float16, whose loss is scaled, could
    not hold dz / count.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        targets: Tensor,
        ignore_index: int,
        grad_enabled: bool,
    ) -> Tensor:
        needs_dx, needs_dw = (needed and grad_enabled for needed in ctx.needs_input_grad[:2])
        counted = targets != ignore_index  # (M,)
        count = counted.sum()
        targets = targets.where(counted, 0)
        loss = torch.zeros((), dtype=torch.float32, device=x.device)
        dx = torch.empty_like(x) if needs_dx else None
        # in fp32 whatever the input: it is a sum over all chunks
        dw = torch.zeros_like(weight, dtype=torch.float32) if needs_dw else None
        rows = max(1, CHUNK_ELEMENTS.get(x.device.type, CHUNK_ELEMENTS_ELSEWHERE) // len(weight))
        for start in range(0, len(x), rows):
            # the last chunk's memory is free for this one
            logits = dz = None
            chunk = slice(start, start + rows)
            target = targets[chunk, None]  # (rows, 1)
            logits = (x[chunk] @ weight.t()).float()  # (rows, V)
            lse = logits.logsumexp(dim=-1, keepdim=True)
            loss += ((lse - logits.gather(1, target)).squeeze(1) * counted[chunk]).sum()
            if not (needs_dx or needs_dw):
                continue
            # the logits' buffer becomes their gradient
            dz = logits.sub_(lse).exp_()
            dz.scatter_add_(1, target, dz.new_full((), -1.0).expand_as(target))
            dz = dz.mul_(counted[chunk, None]).to(x.dtype)
            if dx is not None:
                torch.mm(dz, weight, out=dx[chunk])
            if dw is not None:
                dw += dz.t() @ x[chunk]
        ctx.save_for_backward(dx, dw, count)
        ctx.weight_dtype = weight.dtype
        return loss / count

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        dx, dw, count = ctx.saved_tensors
        grad = grad / count
        # in float32: grad may be larger than float16 can hold
        dx = None if dx is None else (dx.float() * grad).to(dx.dtype)
        dw = None if dw is None else (dw * grad).to(ctx.weight_dtype)
        return dx, dw, None, None, None
