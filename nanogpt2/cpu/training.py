"""Faster training on a CPU, installed on a model: the same mathematics as model.py's.

`Trainer` calls `install`. Each layer of model.py keeps its class, its parameters and their names,
and gets a faster `forward` of its own. Four things change:

1. oneDNN computes the matrix products. PyTorch gives float32 products to MKL, measured at half of
   oneDNN's rate on AMD processors with AVX-512. On Intel's MKL is faster by 1.1 to 1.3 times, and
   stays.
2. A linear layer does not keep its input for the backward pass where the input came from GELU or a
   layer norm. It keeps what they were computed from, which autograd keeps anyway, and repeats them.
3. The loss multiplies by the same library.
4. The gradient of the embedding's lookup is added in place to the head's, which shares the matrix
   but for untied models.

1 to 3 need float32 on a CPU, outside autocast and torch.compile; elsewhere PyTorch's own operations
run. 2 and 3 also need kernels "torch", and 1 runs only with gradients: generation must equal
transformers'. This file does not know the loop or the optimizer.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from nanogpt2.chunked_loss import chunked_cross_entropy
from nanogpt2.classifier import GPTClassifier, Model
from nanogpt2.cpu.prepacked import can_multiply
from nanogpt2.cpu.processor import is_intel
from nanogpt2.model import GPT, MLP, LayerNorm

Function = Callable[..., Tensor]


def install(model: Model, add_lookups: bool = False) -> None:
    """Give the layers of `model` faster functions; `uninstall` takes them away again.

    add_lookups: also add the embedding's lookups to its gradient in place, where a GPT owns its
    gradients. DDP and FSDP must see every gradient come out of autograd instead.
    """
    faster: list[tuple[nn.Module, str, Function]] = [(model, "loss", _loss)]
    faster += [(m, "forward", FORWARD[type(m)]) for m in model.modules() if type(m) in FORWARD]
    # a classifier's head is a matrix of its own: its embedding has one gradient only
    if add_lookups and isinstance(model, GPT):
        faster.append((model.wte, "forward", _embedding))
    for module, name, function in faster:
        setattr(module, name, partial(function, module))


def uninstall(model: Model) -> None:
    """Bring back the layers' own functions."""
    for module in model.modules():
        for name in ("forward", "loss"):
            own = vars(module).get(name)
            if isinstance(own, partial) and own.func in (*FORWARD.values(), _loss, _embedding):
                delattr(module, name)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x weight^T + bias: (..., K) -> (..., N), for a weight (N, K)."""
    # only with gradients: generation must equal transformers' to the last bit
    if torch.is_grad_enabled() and _onednn_multiplies(x):
        return _Linear.apply(x, weight, bias, *_source(x))
    return F.linear(x, weight, bias)


def matmul(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return a b + bias by the faster library: (..., K) and (K, N) -> (..., N)."""
    if _onednn_multiplies(a) and not is_intel():
        return torch.ops.mkldnn._linear_pointwise(a, b.t(), bias, "none", [], "")
    return F.linear(a, b.t(), bias)


def recomputable(function: Function, *inputs: Tensor) -> Tensor:
    """Return function(*inputs), a cheap function, tagged with the call that `linear` may repeat."""
    y = function(*inputs)
    if y.requires_grad and _onednn_multiplies(y):
        y.source = function, *inputs  # type: ignore[attr-defined]
    return y


def _source(x: Tensor) -> tuple[Function, *tuple[Tensor, ...]]:
    """The call that computes x: as tagged, or x itself."""
    return getattr(x, "source", (torch.Tensor.detach, x))


def _onednn_multiplies(x: Tensor) -> bool:
    """True for float32 on a CPU, outside autocast and torch.compile."""
    return (
        # torch.compile refuses a model that calls oneDNN's operation: it uses that one itself
        not torch.compiler.is_compiling()
        and x.device.type == "cpu"
        and x.dtype == torch.float32
        and can_multiply()
        and not torch.is_autocast_enabled("cpu")
    )


class _Linear(torch.autograd.Function):
    """y = x W^T + b: dx = dy W, dW = dy^T x, db = the sum of dy's rows.

    `function` and `inputs` compute x again, the same to the last bit.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        function: Function,
        *inputs: Tensor,
    ) -> Tensor:
        ctx.function = function
        # a frozen weight has no gradient, so x is not needed
        ctx.save_for_backward(weight, *(inputs if ctx.needs_input_grad[1] else ()))
        return matmul(x, weight.t(), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        weight, *inputs = ctx.saved_tensors
        needs_dx, needs_dw, needs_db = ctx.needs_input_grad[:3]
        rows = dy.flatten(0, -2)  # (M, N)
        # dW first: x, computed again, is freed before dx of the same size is made
        dw = matmul(rows.t(), ctx.function(*inputs).flatten(0, -2)) if needs_dw else None
        dx = matmul(dy, weight) if needs_dx else None
        db = rows.sum(0) if needs_db else None
        return dx, dw, db, *(None for _ in ctx.needs_input_grad[3:])


# ---- the functions installed; the first argument is the module


def _linear_layer(layer: nn.Linear, x: Tensor) -> Tensor:
    return linear(x, layer.weight, layer.bias)


def _layer_norm(norm: LayerNorm, x: Tensor) -> Tensor:
    if norm.kernels != "torch":
        return LayerNorm.forward(norm, x)
    function = partial(_normalized, eps=norm.eps)
    return recomputable(function, x, norm.weight, norm.bias)


def _normalized(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return F.layer_norm(x, weight.shape, weight, bias, eps)


def _mlp(mlp: MLP, x: Tensor) -> Tensor:
    if mlp.kernels != "torch":
        return MLP.forward(mlp, x)
    x = recomputable(partial(F.gelu, approximate=mlp.approximate), mlp.c_fc(x))  # (B, T, 4C)
    return F.dropout(mlp.c_proj(x), mlp.dropout, mlp.training)


def _embedding(wte: nn.Embedding, ids: Tensor) -> Tensor:
    """Detach the lookup and add its gradient to the embedding's in place.

    Autograd would make the gradient of a few looked-up rows as large as the whole embedding. A CPU
    only: a GPU adds the rows in any order, so no run would repeat bit for bit.
    """
    vectors, weight = nn.Embedding.forward(wte, ids), wte.weight
    if not (torch.is_grad_enabled() and weight.requires_grad):
        return vectors

    def add(dx: Tensor) -> None:
        if weight.grad is None:
            weight.grad = torch.zeros_like(weight)
        weight.grad.index_add_(0, ids.flatten(), dx.flatten(0, -2))

    vectors = vectors.detach().requires_grad_()
    vectors.register_hook(add)
    return vectors


def _loss(model: Model, x: Tensor, targets: Tensor) -> Tensor:
    if model.kernels != "torch" or not _onednn_multiplies(x):
        return type(model).loss(model, x, targets)  # type: ignore[arg-type]
    weight = model.score.weight if isinstance(model, GPTClassifier) else model.head_weight
    return chunked_cross_entropy(x.flatten(0, 1), weight, targets.flatten(), matmul)


FORWARD: dict[type, Function] = {nn.Linear: _linear_layer, LayerNorm: _layer_norm, MLP: _mlp}
