"""The seam between the model and what computes it: each operation of GPT-2, by PyTorch.

`model.py` calls these six functions and nothing below them, so a faster kernel is one `if` here
and no line there. This file does not know what a transformer is.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

# logits that linear_cross_entropy makes at once at least: 32 MiB in fp32 stay near a CPU's caches,
# 1 GiB keeps a GPU busy
CHUNK_ELEMENTS = {"cpu": 2**23}
CHUNK_ELEMENTS_ELSEWHERE = 2**28
TOKENS = 2**13  # of the vocabulary, whose share of the weight's gradient is made at once


def chunk_rows(vocab_size: int, width: int, device: str) -> int:
    """Rows at a time in linear_cross_entropy.

    Each chunk's share is added to the weight's gradient, which with C / 2 rows takes no longer than
    the chunk's logits.
    """
    return max(width // 2, CHUNK_ELEMENTS.get(device, CHUNK_ELEMENTS_ELSEWHERE) // vocab_size)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x weight^T + bias: (..., K) -> (..., N), for a weight (N, K)."""
    # while training only: what is generated equals transformers' to the last bit
    if torch.is_grad_enabled() and _by_onednn(x):
        return _Linear.apply(x, weight, bias, *_origin(x))
    return F.linear(x, weight, bias)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """(x - mean) / sqrt(var + eps) * weight + bias over the last axis: (..., C) -> (..., C)."""
    make = partial(_layer_norm, eps=eps)
    return _with_origin(make(x, weight, bias), make, x, weight, bias)


def gelu(x: Tensor) -> Tensor:
    """0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))): GPT-2's tanh form, not the erf one."""
    make = partial(F.gelu, approximate="tanh")
    return _with_origin(make(x), make, x)


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


def _by_onednn(x: Tensor) -> bool:
    """Whether oneDNN multiplies: in float32 on a CPU, where it has AVX-512 on AMD's too.

    PyTorch itself gives such products to MKL, which was measured at half the rate there.
    """
    return (
        x.device.type == "cpu"
        and x.dtype == torch.float32
        and torch.backends.mkldnn.is_available()
        # torch.compile's own operation: it chooses for itself, and another version may lack it
        and not torch.compiler.is_compiling()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
        and not torch.is_autocast_enabled("cpu")
    )


def _product(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """a b + bias: (..., K) and (K, N) -> (..., N)."""
    if _by_onednn(a):
        return torch.ops.mkldnn._linear_pointwise(a, b.t(), bias, "none", [], "")
    return F.linear(a, b.t(), bias)


def _layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return F.layer_norm(x, weight.shape, weight, bias, eps)


Make = Callable[..., Tensor]


def _with_origin(y: Tensor, make: Make, *inputs: Tensor) -> Tensor:
    """Note on y, which is cheap, that it is make(*inputs), which are kept anyway."""
    if y.requires_grad and _by_onednn(y):
        y.origin = make, *inputs  # type: ignore[attr-defined]
    return y


def _origin(x: Tensor) -> tuple[Make, *tuple[Tensor, ...]]:
    """How to make x from what need be kept for it: as it was noted, or from x itself."""
    return getattr(x, "origin", (torch.Tensor.detach, x))


class _Linear(torch.autograd.Function):
    """y = x W^T + b: dx = dy W, dW = dy^T x, db = the sum of dy's rows.

    Not x is kept for that but what it was made of: GELU's and the layer norms' results are made
    again, the same to the last bit.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, make: Make, *inputs: Tensor
    ) -> Tensor:
        ctx.make = make
        # a frozen weight's gradient is not asked for
        ctx.save_for_backward(weight, *(inputs if ctx.needs_input_grad[1] else ()))
        return _product(x, weight.t(), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        weight, *inputs = ctx.saved_tensors
        needs_dx, needs_dw, needs_db = ctx.needs_input_grad[:3]
        rows = dy.flatten(0, -2)  # (M, N)
        # first: what is made again is gone when dx, which may be as large, is made
        dw = _product(rows.t(), ctx.make(*inputs).flatten(0, -2)) if needs_dw else None
        dx = _product(dy, weight) if needs_dx else None
        db = rows.sum(0) if needs_db else None
        return dx, dw, db, *(None for _ in ctx.needs_input_grad[3:])


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
        chunks = -(-len(x) // chunk_rows(len(weight), weight.size(1), x.device.type))
        rows = -(-len(x) // max(1, chunks))
        for start in range(0, len(x), rows):
            # the last chunk's memory is free for this one: `columns` is a view of it too
            logits = dz = columns = None
            chunk = slice(start, start + rows)
            target, weighs = targets[chunk, None], counted[chunk, None].float()  # (rows, 1)
            logits = _product(x[chunk], weight.t()).float()  # (rows, V)
            logits -= logits.amax(dim=-1, keepdim=True)
            right = logits.gather(1, target)
            # the logits' buffer becomes exp(z), then their gradient
            total = logits.exp_().sum(dim=-1, keepdim=True)
            loss += ((total.log() - right) * weighs).sum()
            if not (needs_dx or needs_dw):
                continue
            dz = logits.mul_(weighs / total).scatter_add_(1, target, -weighs).to(x.dtype)
            if dx is not None:
                dx[chunk] = _product(dz, weight)
            if dw is not None:
                # some tokens at a time, or the product would be as large again as dw
                for some, columns in zip(dw.split(TOKENS), dz.split(TOKENS, 1), strict=True):
                    some += _product(columns.t(), x[chunk])
        if dw is not None:
            dw /= count
        ctx.save_for_backward(dx, dw, count)
        ctx.weight_dtype = weight.dtype
        return loss / count

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        dx, dw, count = ctx.saved_tensors
        # in float32: grad may be larger than float16 can hold
        dx = None if dx is None else (dx.float() * (grad / count)).to(dx.dtype)
        # no copy, as large as the embedding, for the whole loss, whose gradient is 1; a GPU would
        # have to be waited for
        if dw is not None and not (grad.device.type == "cpu" and grad == 1):
            dw = dw * grad
        dw = None if dw is None else dw.to(ctx.weight_dtype)
        return dx, dw, None, None, None
