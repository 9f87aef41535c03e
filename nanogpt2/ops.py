"""The seam between the model and the hardware: each operation of GPT-2, computed three ways.

Each function states its result, then makes one choice by `kernels`.

    "reference"   the formula, written out with plain arithmetic. Read this one.
    "torch"       PyTorch's own operation: the same numbers, faster, on any device.
    "triton"      our kernels in nanogpt2/kernels, for a GPU.

`choose_kernels` picks one for the whole model. Two exceptions: attention with a tensor as mask and
erf GELU have no kernel, so "triton" runs PyTorch's; `sample` exists as a kernel alone. An error in
a kernel is an error and never a reason to run something else. Triton is imported only where a
kernel is called. This file does not know the model.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import register_pytree_node

from nanogpt2.chunked_loss import chunked_cross_entropy
from nanogpt2.config import IGNORE_INDEX, KERNELS

KERNEL_NAMES = (
    "attention, cross_entropy, decode_attention, decode_linear, gelu, layer_norm, sampling, softmax"
)


class Stream:
    """The residual stream of a model that runs Triton's kernels: x plus an outstanding branch.

    `stream + branch` adds nothing yet. The next layer norm reads x and the branch, and one kernel
    writes their sum and its norm, so a Block's lines `x = x + f(norm(x))` make no pass of their own
    for the addition. `sum` is then the x of the next addition. A Stream's two tensors never change:
    a block that is computed again, by activation checkpointing, finds what it was given.
    """

    def __init__(self, x: Tensor, branch: Tensor | None = None) -> None:
        self.x, self.branch = x, branch
        self.sum = x if branch is None else None

    def __add__(self, branch: Tensor) -> "Stream":
        if self.sum is None and self.branch is not None:
            self.sum = self.x + self.branch
        return Stream(self.x if self.sum is None else self.sum, branch)


# hooks that look for tensors in a module's arguments and results, as FSDP's do, find a Stream's
register_pytree_node(Stream, lambda s: ([s.x, s.branch], None), lambda xs, _: Stream(*xs))
Residual = Tensor | Stream


def residual_stream(x: Tensor, kernels: str = "torch") -> Residual:
    """Begin the residual stream with x: a Stream for Triton's kernels, else x itself.

    torch.compile fuses additions, layer norms and GELU itself, so it gets plain operations.
    """
    return Stream(x) if kernels == "triton" and not torch.compiler.is_compiling() else x


def layer_norm(
    x: Residual, weight: Tensor, bias: Tensor, eps: float, kernels: str = "torch"
) -> Tensor:
    """Bring the last axis to mean 0 and variance 1, then scale and shift: (..., C) -> (..., C).

    Triton's kernel writes autocast's dtype, which the matrix product after it reads.
    """
    if isinstance(x, Stream):
        return _layer_norm_kernel(x, weight, bias, eps)
    if kernels == "reference":
        z = _float32(x)
        mean = z.mean(dim=-1, keepdim=True)  # (..., 1)
        variance = (z - mean).pow(2).mean(dim=-1, keepdim=True)  # (..., 1)
        y = (z - mean) / (variance + eps).sqrt() * weight + bias
        return y.to(x.dtype)
    if kernels == "triton" and not torch.compiler.is_compiling():
        return _layer_norm_kernel(Stream(x), weight, bias, eps)
    return F.layer_norm(x, weight.shape, weight, bias, eps)


def gelu(x: Tensor, kernels: str = "torch", approximate: str = "tanh") -> Tensor:
    """Pass large numbers, hold back negative ones, bend smoothly between.

    approximate: "tanh" is GPT-2's form, "none" the exact one, by erf.
    """
    if kernels == "reference":
        z = _float32(x)
        if approximate == "none":
            return (0.5 * z * (1 + torch.erf(z / math.sqrt(2)))).to(x.dtype)
        y = 0.5 * z * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))
        return y.to(x.dtype)
    if _has_gelu_kernel(kernels, approximate):
        from nanogpt2.kernels import gelu as gelu_kernel

        return gelu_kernel.gelu(x)
    return F.gelu(x, approximate=approximate)


def linear_gelu(
    x: Tensor, linear: nn.Module, kernels: str = "torch", approximate: str = "tanh"
) -> Tensor:
    """gelu(linear(x)): (..., C) -> (..., N). Triton's kernel adds a plain layer's bias itself."""
    # a subclass, as LoRA's, computes more than the product and the bias
    if type(linear) is nn.Linear and _has_gelu_kernel(kernels, approximate):
        from nanogpt2.kernels import gelu as gelu_kernel

        return gelu_kernel.bias_gelu(F.linear(x, linear.weight), linear.bias)
    return gelu(linear(x), kernels, approximate)


def _has_gelu_kernel(kernels: str, approximate: str) -> bool:
    return kernels == "triton" and approximate == "tanh" and not torch.compiler.is_compiling()


def softmax(x: Tensor, kernels: str = "torch") -> Tensor:
    """Turn scores into probabilities over the last axis: (..., N) -> (..., N)."""
    if kernels == "reference":
        # subtract the maximum: the quotient stays the same and exp cannot overflow
        powers = (x - x.amax(dim=-1, keepdim=True)).exp()
        return powers / powers.sum(dim=-1, keepdim=True)
    if kernels == "triton":
        from nanogpt2.kernels import softmax as softmax_kernel

        return softmax_kernel.softmax(x)
    return F.softmax(x, dim=-1)


class AttentionMetadata(NamedTuple):
    """The positions each row's tokens may look at, as Triton's kernels read them; all int32.

    `start` (B,): the position of a row's first token; those before are padding. With a cache also
    `lengths` (B,), the filled positions, the queries' own included, and `ancestors`
    (B, max_length), the cache's row that holds position t of row b.
    """

    start: Tensor | None = None
    lengths: Tensor | None = None
    ancestors: Tensor | None = None


Mask = Tensor | AttentionMetadata | None


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
    """Average the values, weighted by how well each key answers the query.

    q: (B, H, T, D); k, v: (B, H, S, D) -> (B, H, T, D). `causal` lets query t see keys 0 to t and
    needs S = T. `mask`, bool and broadcastable to (B, H, T, S), is True where a query may look.
    Triton's kernels take an AttentionMetadata instead: they know padding at a row's start and no
    other mask. Its `lengths` say that k and v are a cache (rows, H, max_length, D); such queries
    come last and see what precedes them, so `causal` is ignored.
    """
    if kernels == "triton" and not isinstance(mask, Tensor):
        return _attention_kernel(q, k, v, causal, mask or AttentionMetadata(), dropout)
    if isinstance(mask, AttentionMetadata):
        raise ValueError(
            f'mask must be a tensor or None for kernels "{kernels}", not an AttentionMetadata'
        )
    if kernels == "reference":
        scores = _float32(q) @ _float32(k).transpose(2, 3) / math.sqrt(q.size(3))  # (B, H, T, S)
        if causal:
            before = torch.ones(scores.shape[2:], dtype=torch.bool, device=q.device).tril()
            mask = before if mask is None else mask & before
        if mask is not None:
            # not -inf: a padding token may look nowhere, and 0 / 0 would spread from there
            scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
        weights = F.dropout(softmax(scores, kernels).to(v.dtype), dropout)
        return weights @ v
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=causal, dropout_p=dropout
    )


def self_attention(
    qkv: Tensor, mask: Mask = None, dropout: float = 0.0, kernels: str = "torch"
) -> Tensor:
    """Attention of queries, keys and values side by side: (B, T, 3, H, D) -> (B, T, H, D).

    Causal without a mask, or with an AttentionMetadata.
    """
    if kernels == "triton" and not isinstance(mask, Tensor):
        from nanogpt2.kernels import attention as attention_kernel

        # this kernel reads qkv in place: no copy of q, k, v or their gradients
        start = None if mask is None else mask.start
        exact = torch.are_deterministic_algorithms_enabled()
        y = attention_kernel.attention_qkv(
            qkv.flatten(2), qkv.size(3), start=start, dropout=dropout, deterministic=exact
        )
        return y.unflatten(2, qkv.shape[3:])
    q, k, v = qkv.transpose(1, 3).unbind(2)  # each (B, H, T, D)
    # a single query sees the only key: no mask needed
    causal = mask is None and bool(q.size(2) > 1)
    y = attention(q, k, v, causal=causal, mask=mask, dropout=dropout, kernels=kernels)
    return y.transpose(1, 2)


def linear_cross_entropy(
    x: Tensor, weight: Tensor, targets: Tensor, kernels: str = "torch"
) -> Tensor:
    """Return the mean of -log softmax(x weight^T)[target], () in float32.

    x: (M, C); weight: (V, C); targets: int64 (M,), IGNORE_INDEX does not count. PyTorch's side and
    Triton's never hold all the logits.
    """
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight = x.to(dtype), _narrowed(weight, dtype)
    if kernels == "reference":
        counted = targets != IGNORE_INDEX
        z, targets = _float32(x[counted] @ weight.t()), targets[counted]  # (N, V), (N,)
        # log softmax(z)[target] = z[target] - log sum exp z
        losses = z.logsumexp(dim=-1) - z.gather(1, targets[:, None]).squeeze(1)  # (N,)
        return losses.mean()
    if kernels == "triton":
        from nanogpt2.kernels import cross_entropy as cross_entropy_kernel

        return cross_entropy_kernel.linear_cross_entropy(x, weight, targets, IGNORE_INDEX)
    return chunked_cross_entropy(x, weight, targets)


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
    """Ban repeated n-grams, divide by the temperature, keep the top k and draw, in one kernel.

    scores: (R, V); ids: int64 (R, T), the texts so far; samples: int64 (R,), their numbers.
    Returns the tokens, int64 (R,), -1 where no token is possible, and the processed scores, float32
    (R, V). Triton only: generation/processors.py and noise.py do the same in PyTorch.
    """
    from nanogpt2.kernels import sampling as sampling_kernel

    return sampling_kernel.sample(
        scores, seed, samples, step, temperature, top_k, ids, None, no_repeat_ngram_size
    )


_casts: dict[tuple[int, torch.dtype], Tensor] | None = None


@contextmanager
def keeping_casts() -> Iterator[None]:
    """Inside, `linear_cross_entropy` casts its weight once, as autocast does those of products."""
    global _casts
    _casts = {}
    try:
        yield
    finally:
        _casts = None


def _narrowed(weight: Tensor, dtype: torch.dtype) -> Tensor:
    if _casts is None or torch.compiler.is_compiling():
        return weight.to(dtype)
    key = id(weight), dtype
    if key not in _casts:
        _casts[key] = weight.to(dtype)
    return _casts[key]


def _float32(x: Tensor) -> Tensor:
    """Widen float16 and bfloat16, whose sums and powers would lose digits or overflow."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _layer_norm_kernel(stream: Stream, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    from nanogpt2.kernels import layer_norm as layer_norm_kernel

    x, dtype = stream.x, None
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
    if stream.branch is None:
        return layer_norm_kernel.layer_norm(x, weight, bias, eps, dtype)
    y, stream.sum = layer_norm_kernel.residual_layer_norm(
        stream.branch, x, weight, bias, eps, dtype
    )
    return y


def _attention_kernel(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, seen: AttentionMetadata, dropout: float
) -> Tensor:
    if seen.lengths is None:
        from nanogpt2.kernels import attention as attention_kernel

        exact = torch.are_deterministic_algorithms_enabled()
        return attention_kernel.attention(
            q, k, v, causal, start=seen.start, dropout=dropout, deterministic=exact
        )
    from nanogpt2.kernels.decode_attention import MAX_TOKENS, decode_attention

    T, parts = q.size(2), []
    for first in range(0, T, MAX_TOKENS):
        some = q[:, :, first : first + MAX_TOKENS]
        # positions filled once the last of these tokens is
        lengths = seen.lengths - (T - first - some.size(2))
        parts.append(
            decode_attention(
                some, k, v, lengths, start=seen.start, ancestors=seen.ancestors, trusted=True
            )
        )
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)


# ---- the choice


def choose_kernels(
    asked: str, device: torch.device | str, n_embd: int = 768, n_head: int = 12
) -> str:
    """Return the kernels to run, one of config.KERNELS but "auto", for the kernels asked for.

    auto is triton on a GPU where triton is installed and fits the model, else torch. Raises
    ValueError for triton where it cannot run.
    """
    kind = torch.device(device).type
    if asked not in KERNELS:
        *others, last = KERNELS
        raise ValueError(f"kernels must be {', '.join(others)} or {last}, not {asked!r}")
    installed = find_spec("triton") is not None
    if asked == "auto" and not (kind == "cuda" and installed):
        return "torch"
    if asked in ("torch", "reference"):
        return asked
    if not installed:
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
    """Say in one line which kernels run; say nothing where nobody asked and no choice exists."""
    if asked == "auto" and torch.device(device).type != "cuda":
        return ""
    if kernels == "reference":
        return "kernels: reference (the formulas in nanogpt2/ops.py)"
    if kernels == "torch":
        return f"kernels: torch {torch.__version__}"
    import triton

    how = ", interpreted" if triton.knobs.runtime.interpret else ""
    return f"kernels: triton {triton.__version__}{how} ({KERNEL_NAMES})"
