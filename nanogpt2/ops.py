"""The seam between the model and what computes it: each operation of GPT-2, by PyTorch or Triton.

`model.py` calls these functions and nothing below them, so a faster kernel is one `if` here and no
line there. `kernels` is "torch" or "triton", chosen once for a model by `choose_kernels`; an error
in a kernel is an error, and nothing goes on with the other. Triton is imported where it is used and
nowhere else. This file does not know what a transformer is.
"""

from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

# logits that linear_cross_entropy makes at once at least: 32 MiB in fp32 stay near a CPU's caches,
# 1 GiB keeps a GPU busy
CHUNK_ELEMENTS = {"cpu": 2**23}
CHUNK_ELEMENTS_ELSEWHERE = 2**28
TOKENS = 2**13  # of the vocabulary, whose share of the weight's gradient is made at once

ROOMS = (
    "attention",
    "cross_entropy",
    "decode_attention",
    "gelu",
    "layer_norm",
    "sampling",
    "softmax",
)


def choose_kernels(
    asked: str, device: torch.device | str, n_embd: int = 768, n_head: int = 12
) -> str:
    """Return whose kernels are to run, "torch" or "triton", for one of config.KERNELS.

    auto is triton on a GPU where it is installed and its kernels fit the model, else torch. Raises
    ValueError for triton where it cannot run.
    """
    kind = torch.device(device).type
    if asked == "torch" or (asked == "auto" and (kind != "cuda" or find_spec("triton") is None)):
        return "torch"
    if asked not in ("auto", "triton"):
        raise ValueError(f"kernels must be auto, torch or triton, not {asked!r}")
    if find_spec("triton") is None:
        raise ValueError("kernels must be auto or torch where triton is not installed, not triton")
    from nanogpt2.kernels.attention import HEAD_SIZES, INTERPRETED
    from nanogpt2.kernels.layer_norm import MAX_COLUMNS

    if not (kind == "cuda" or (INTERPRETED and kind == "cpu")):
        raise ValueError(
            f"kernels must be auto or torch on {kind}, not triton, which runs on a GPU "
            "(and on a CPU to try it out, with TRITON_INTERPRET=1)"
        )
    if n_embd // n_head in HEAD_SIZES and n_embd <= MAX_COLUMNS:
        return "triton"
    if asked == "auto":
        return "torch"
    raise ValueError(
        f"kernels must be auto or torch for {n_head} heads of {n_embd // n_head}, not triton, "
        f"whose heads are of {', '.join(map(str, HEAD_SIZES))}, {MAX_COLUMNS} in all"
    )


def describe_kernels(asked: str, kernels: str, device: torch.device | str) -> str:
    """One line on what runs, or nothing where nobody asked and there is no choice."""
    if asked == "auto" and torch.device(device).type != "cuda":
        return ""
    if kernels == "torch":
        return f"kernels: torch {torch.__version__}"
    import triton

    how = ", interpreted" if triton.knobs.runtime.interpret else ""
    return f"kernels: triton {triton.__version__}{how} ({', '.join(ROOMS)})"


class AttentionMetadata(NamedTuple):
    """What each row's tokens may look at, as Triton's kernels read it; all int32.

    `start` (B,): the position of the row's first token, those before it are padding. Where keys and
    values come from a cache: `lengths` (B,), how many positions of it are filled, the queries' own
    among them; `ancestors` (B, max_length), the cache's row in which position t of row b lies.
    """

    start: Tensor | None = None
    lengths: Tensor | None = None
    ancestors: Tensor | None = None


Mask = Tensor | AttentionMetadata | None


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


def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, kernels: str = "torch"
) -> Tensor:
    """(x - mean) / sqrt(var + eps) * weight + bias over the last axis: (..., C) -> (..., C)."""
    if kernels == "triton":
        from nanogpt2.kernels import layer_norm as room

        return room.layer_norm(x, weight, bias, eps)
    make = partial(_layer_norm, eps=eps)
    return _with_origin(make(x, weight, bias), make, x, weight, bias)


def gelu(x: Tensor, kernels: str = "torch") -> Tensor:
    """0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))): GPT-2's tanh form, not the erf one."""
    if kernels == "triton":
        from nanogpt2.kernels import gelu as room

        return room.gelu(x)
    make = partial(F.gelu, approximate="tanh")
    return _with_origin(make(x), make, x)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool,
    mask: Mask = None,
    dropout: float = 0.0,
    kernels: str = "torch",
) -> Tensor:
    """softmax(q k^T / sqrt(D)) v.

    q: (B, H, T, D); k, v: (B, H, S, D). `causal` lets query t see keys 0 to t and needs S = T;
    `mask`, bool and broadcastable to (B, H, T, S), is True where a query may look. Triton's kernels
    know padding at a row's start and no other: they take an AttentionMetadata, whose `lengths` say
    that k and v are a cache's (rows, H, max_length, D); with a mask attention is PyTorch's.
    -> (B, H, T, D).
    """
    if kernels == "triton" and not isinstance(mask, Tensor):
        seen = mask or AttentionMetadata()
        if seen.lengths is not None:
            return _decode_attention(q, k, v, seen.lengths, seen.start, seen.ancestors)
        from nanogpt2.kernels import attention as room

        return room.attention(q, k, v, causal, start=seen.start, **_options(dropout))
    if isinstance(mask, AttentionMetadata):
        raise ValueError(
            'mask must be a tensor or None for kernels "torch", not an AttentionMetadata'
        )
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=causal, dropout_p=dropout
    )


def self_attention(
    qkv: Tensor, mask: Mask = None, dropout: float = 0.0, kernels: str = "torch"
) -> Tensor:
    """attention of queries, keys and values side by side: (B, T, 3, H, D) -> (B, T, H, D).

    Without a mask, or with an AttentionMetadata, it is causal.
    """
    if kernels == "triton" and not isinstance(mask, Tensor):
        from nanogpt2.kernels import attention as room

        # in place: no copy of q, k, v or their gradients
        start = None if mask is None else mask.start
        y = room.attention_qkv(qkv.flatten(2), qkv.size(3), start=start, **_options(dropout))
        return y.unflatten(2, qkv.shape[3:])
    q, k, v = qkv.transpose(1, 3).unbind(2)  # each (B, H, T, D)
    # a single query may see the only key: nothing to mask
    causal = mask is None and q.size(2) > 1
    return attention(q, k, v, causal=causal, mask=mask, dropout=dropout).transpose(1, 2)


def _options(dropout: float) -> dict[str, Any]:
    return {
        "dropout": dropout,
        "deterministic": torch.are_deterministic_algorithms_enabled(),
    }


def _decode_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    start: Tensor | None,
    ancestors: Tensor | None,
) -> Tensor:
    """The kernel takes a few new tokens at a time."""
    from nanogpt2.kernels.decode_attention import MAX_TOKENS, decode_attention

    T, found = q.size(2), []
    for first in range(0, T, MAX_TOKENS):
        some = q[:, :, first : first + MAX_TOKENS]
        # positions that are filled once the last of these is
        filled = lengths - (T - first - some.size(2))
        found.append(
            decode_attention(
                some, k_cache, v_cache, filled, start=start, ancestors=ancestors, trusted=True
            )
        )
    return found[0] if len(found) == 1 else torch.cat(found, dim=2)


def softmax(x: Tensor, kernels: str = "torch") -> Tensor:
    """exp(x - max) / sum over the last axis: (..., N) -> (..., N)."""
    if kernels == "triton":
        from nanogpt2.kernels import softmax as room

        return room.softmax(x)
    return F.softmax(x, dim=-1)


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    ignore_index: int = -100,
    kernels: str = "torch",
) -> Tensor:
    """Mean over the targets of -log softmax(x weight^T)[target], never holding all the logits.

    x: (M, C); weight: (V, C); targets: int64 (M,), those equal to `ignore_index` do not count.
    -> () in fp32. Works on a chunk of rows at a time and makes its gradient while the chunk's
    logits are at hand, so 50257 logits a token are neither kept nor computed twice.
    """
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight = x.to(dtype), weight.to(dtype)
    if kernels == "triton":
        from nanogpt2.kernels import cross_entropy as room

        return room.linear_cross_entropy(x, weight, targets, ignore_index)
    return _LinearCrossEntropy.apply(x, weight, targets, ignore_index, torch.is_grad_enabled())


def sample(
    scores: Tensor,
    ids: Tensor,
    seed: int,
    samples: Tensor,
    step: int,
    *,
    no_repeat_ngram_size: int,
    temperature: float,
    top_k: int,
) -> tuple[Tensor, Tensor]:
    """Ban repeated n-grams, divide by the temperature, keep the top k and draw, all in one kernel.

    scores: (R, V); ids: int64 (R, T), the texts so far; samples: int64 (R,), their numbers. -> the
    tokens, int64 (R,), -1 where none is possible, and the processed scores, float32 (R, V). Only
    Triton has it; PyTorch's way is generation/processors.py and noise.py.
    """
    from nanogpt2.kernels import sampling as room

    return room.sample(
        scores, seed, samples, step, temperature, top_k, ids, None, no_repeat_ngram_size
    )


def _by_onednn(x: Tensor) -> bool:
    """Whether oneDNN multiplies: in float32 on a CPU, where it has AVX-512 on AMD's too.

    PyTorch itself gives such products to MKL, which was measured at half the rate there.
    """
    return (
        # torch.compile's own operation: it chooses for itself, and another version may lack it
        not torch.compiler.is_compiling()
        and x.device.type == "cpu"
        and x.dtype == torch.float32
        and torch.backends.mkldnn.is_available()
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
