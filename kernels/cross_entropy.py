"""Cross-entropy of logits, and of a linear layer without ever holding all of its logits.

For a row of logits z over V tokens and its target t, in fp32 whatever the input. The base is 2
because the hardware's exponential is exp2; c = log2(e).

    forward    m = max_v z_v,  a = log2 sum_v 2^(c (z_v - m))
               loss = mean over the counted rows of m - z_t + ln(2) a
    backward   dz_v = (2^(c (z_v - m) - a) - [v = t]) dloss / count

Keep m and a apart: m + a would round away the logarithm where logits are large.

With z = x W^T (linear_cross_entropy): dx = dz W and dW = dz^T x. Only one chunk of rows has its
logits in memory at a time, in the dtype of x. The kernel that computes their loss overwrites them
with dz while they are in the caches, and the two products follow. The factor dloss / count comes
last: float16, whose loss is scaled, could not hold dz / count.

Rows whose target is `ignore_index` do not count and have gradient 0. A target outside the
vocabulary makes the loss NaN. Columns from `vocab_size` on are padding: never counted, gradient 0.

A sweep takes whole blocks without a mask, requests the next block before it computes this one, and
ends with a few smaller masked blocks. The target's 1 is subtracted after the sweep.

Traffic for M rows, N columns in memory, s bytes an element: cross_entropy forward M N s, backward
2 M N s; linear_cross_entropy 2 M N s beside its three products. Overwriting takes a second sweep of
the row (100 KB of bf16), which hits the L1 or L2 that the row has just passed through.

This file does not know where logits come from. Source of the loss that computes its gradient in the
forward pass, by chunks: Liger-Kernel, "fused linear cross entropy".
"""

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# logits in memory at once in linear_cross_entropy: 512 MiB of bf16 keep a GPU busy
CHUNK_ELEMENTS = 2**28
# a chunk's rows begin at multiples of this many elements, so loads are 16 bytes wide even if V is
# 50257
ROW_ALIGNMENT = 64
# torch before 2.11 adds a product of bf16 to a matrix of bf16 only
ADDS_TO_FP32 = torch.__version__ >= "2.11"
INTERPRETED = triton.knobs.runtime.interpret
# set explicitly: Triton 3.10 changed the default
FUSED = {"enable_fp_fusion": True}

LOG2_E = tl.constexpr(math.log2(math.e))
LN_2 = tl.constexpr(math.log(2))


def cross_entropy_ref(
    logits: Tensor, targets: Tensor, ignore_index: int = -100, vocab_size: int | None = None
) -> Tensor:
    """Compute cross_entropy by the formula, in the dtype of the logits."""
    logits, counted = logits[:, :vocab_size], targets != ignore_index
    lse = logits.exp().sum(dim=1).log()
    at_target = logits.gather(1, targets.where(counted, 0)[:, None]).squeeze(1)
    return (lse - at_target)[counted].sum() / counted.sum()


@triton.jit
def _sum_blocks(
    m, total,  # scalars so far
    z_ptr,  # this row's (N,)
    lo, hi, V,  # walks columns [lo, hi)
    MASKED: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    cols = tl.arange(0, BLOCK_N)
    first = m
    sums = tl.zeros((BLOCK_N,), tl.float32)
    if not MASKED:
        ahead = tl.load(z_ptr + lo + cols, mask=lo + cols < hi, other=0.0)
    for start in range(lo, hi, BLOCK_N):
        if MASKED:
            z = tl.load(z_ptr + start + cols, mask=start + cols < V, other=-float("inf"))
            z = z.to(tl.float32)
        else:
            z = ahead.to(tl.float32)
            # the last round loads its own block again, for no mask
            after = tl.multiple_of(tl.minimum(start + BLOCK_N, hi - BLOCK_N), BLOCK_N)
            ahead = tl.load(z_ptr + after + cols)
        m_new = tl.maximum(m, tl.max(z, axis=0))
        # columns of -inf alone: subtract 0, since 2^(-inf - 0) = 0 and -inf - -inf is nan
        shift = tl.where(m_new == -float("inf"), 0.0, m_new)
        # one sum a column of the block: they are added up once, at the end
        sums = sums * tl.exp2((m - shift) * LOG2_E) + tl.exp2((z - shift) * LOG2_E)
        m = m_new
    shift = tl.where(m == -float("inf"), 0.0, m)
    return m, total * tl.exp2((first - shift) * LOG2_E) + tl.sum(sums, axis=0)


@triton.jit
def _gradient_blocks(
    z_ptr, dz_ptr,  # this row's (N,); may be the same
    m, a, scale,  # scalars
    lo, hi, N, V,  # walks columns [lo, hi); dz is 0 from V on
    MASKED: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    cols = tl.arange(0, BLOCK_N)
    if not MASKED:
        ahead = tl.load(z_ptr + lo + cols, mask=lo + cols < hi, other=0.0)
    for start in range(lo, hi, BLOCK_N):
        if MASKED:
            z = tl.load(z_ptr + start + cols, mask=start + cols < V, other=0.0).to(tl.float32)
        else:
            z = ahead.to(tl.float32)
            after = tl.multiple_of(tl.minimum(start + BLOCK_N, hi - BLOCK_N), BLOCK_N)
            ahead = tl.load(z_ptr + after + cols)
        dz = tl.exp2((z - m) * LOG2_E - a)
        if scale is not None:
            dz *= scale
        if MASKED:
            # select, do not multiply: padding and ignored rows may hold anything, even nan
            dz = tl.where(start + cols < V, dz, 0.0)
            dz = dz.to(dz_ptr.dtype.element_ty)
            tl.store(dz_ptr + start + cols, dz, mask=start + cols < N)
        else:
            tl.store(dz_ptr + start + cols, dz.to(dz_ptr.dtype.element_ty))


@triton.jit
def _cross_entropy_fwd_kernel(
    logits_ptr,  # (M, N), stride 1 along N; becomes dz where OVERWRITE
    targets_ptr,  # (M,) int64
    loss_ptr,  # (M,) in fp32, 0 where ignored
    stats_ptr,  # (M, 2) in fp32: m and a
    stride_zm,
    N,
    V,  # columns that are tokens, V <= N
    ignore_index,
    OVERWRITE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    END_N: tl.constexpr,  # columns of a masked block
):
    row = tl.program_id(0).to(tl.int64)
    z_row = logits_ptr + row * stride_zm
    target = tl.load(targets_ptr + row)
    counted = target != ignore_index
    is_token = (target >= 0) & (target < V)
    # read the target's logit before the row is overwritten
    z_target = tl.load(z_row + tl.where(is_token, target, 0)).to(tl.float32)

    tokens = tl.where(counted, V, 0)
    whole = tokens // BLOCK_N * BLOCK_N
    m, total = -float("inf"), 0.0
    m, total = _sum_blocks(m, total, z_row, 0, whole, V, False, BLOCK_N)
    m, total = _sum_blocks(m, total, z_row, whole, tokens, V, True, END_N)
    a = tl.log2(total)
    loss = tl.where(is_token, m - z_target + a * LN_2, float("nan"))
    tl.store(loss_ptr + row, tl.where(counted, loss, 0.0))
    tl.store(stats_ptr + 2 * row, m)
    tl.store(stats_ptr + 2 * row + 1, a)

    if OVERWRITE:
        _gradient_blocks(z_row, z_row, m, a, None, 0, whole, N, tokens, False, BLOCK_N)
        _gradient_blocks(z_row, z_row, m, a, None, whole, N, N, tokens, True, END_N)
        # another thread may have stored this column
        tl.debug_barrier()
        dz = tl.exp2((z_target - m) * LOG2_E - a) - 1.0
        dz = dz.to(logits_ptr.dtype.element_ty)
        tl.store(z_row + target, dz, mask=counted & is_token)


@triton.jit
def _cross_entropy_bwd_kernel(
    scale_ptr,  # () in fp32: dloss / count
    logits_ptr,  # (M, N), stride 1 along N
    targets_ptr,  # (M,) int64
    stats_ptr,  # (M, 2) in fp32: m and a
    dz_ptr,  # (M, N), contiguous
    stride_zm,
    N,
    V,  # columns that are tokens, V <= N
    ignore_index,
    BLOCK_N: tl.constexpr,
    END_N: tl.constexpr,  # columns of a masked block
):
    row = tl.program_id(0).to(tl.int64)
    z_row, dz_row = logits_ptr + row * stride_zm, dz_ptr + row * N
    target = tl.load(targets_ptr + row)
    counted = target != ignore_index
    is_token = (target >= 0) & (target < V)
    z_target = tl.load(z_row + tl.where(is_token, target, 0)).to(tl.float32)
    m, a = tl.load(stats_ptr + 2 * row), tl.load(stats_ptr + 2 * row + 1)
    scale = tl.load(scale_ptr)

    tokens = tl.where(counted, V, 0)
    whole = tokens // BLOCK_N * BLOCK_N
    _gradient_blocks(z_row, dz_row, m, a, scale, 0, whole, N, tokens, False, BLOCK_N)
    _gradient_blocks(z_row, dz_row, m, a, scale, whole, N, N, tokens, True, END_N)
    # another thread may have stored this column
    tl.debug_barrier()
    dz = (tl.exp2((z_target - m) * LOG2_E - a) - 1.0) * scale
    tl.store(dz_row + target, dz.to(dz_ptr.dtype.element_ty), mask=counted & is_token)


def _config(N: int) -> dict[str, int]:
    """BLOCK_N, END_N and num_warps for rows of N columns.

    | N            | block             | warps | because                                        |
    |--------------|-------------------|-------|------------------------------------------------|
    | to 8192      | next power of two | 1-16  | 8 or more values a thread: 16-byte loads       |
    | 50257, 50304 | 8192              | 16    | 16 values a thread; the row itself would spill |

    The end of a row takes masked blocks of at most 1024: six blocks of 8192 leave 1105 of 50257.
    """
    block = min(triton.next_power_of_2(N), 8192)
    warps = min(max(block // 256, 1), 16)
    return {"BLOCK_N": block, "END_N": min(block, 1024), "num_warps": warps, **FUSED}


def _losses(
    logits: Tensor, targets: Tensor, ignore_index: int, vocab_size: int, overwrite: bool
) -> tuple[Tensor, Tensor]:
    """Return loss (M,) and m and a (M, 2); with `overwrite` the logits (M, N) become dz."""
    M, N = logits.shape
    loss = logits.new_empty(M, dtype=torch.float32)
    stats = logits.new_empty(M, 2, dtype=torch.float32)
    if M:
        with torch.cuda.device_of(logits):
            _cross_entropy_fwd_kernel[(M,)](
                logits, targets, loss, stats, logits.stride(0), N, vocab_size, ignore_index,
                OVERWRITE=overwrite, **_config(N),
            )  # fmt: skip
    return loss, stats


def _cross_entropy_fwd(
    logits: Tensor, targets: Tensor, ignore_index: int, vocab_size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return mean loss () and m and a (M, 2), in fp32, and the number of counted rows, () int64."""
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    loss, stats = _losses(logits, targets.contiguous(), ignore_index, vocab_size, False)
    count = (targets != ignore_index).sum()
    return loss.sum() / count, stats, count


def _cross_entropy_bwd(
    scale: Tensor,
    logits: Tensor,
    targets: Tensor,
    stats: Tensor,
    ignore_index: int,
    vocab_size: int,
) -> Tensor:
    """Return dz (M, N). scale: () in fp32, dloss / count, which stays on the device."""
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    M, N = logits.shape
    dz = logits.new_empty(M, N)
    if M:
        with torch.cuda.device_of(logits):
            _cross_entropy_bwd_kernel[(M,)](
                scale, logits, targets.contiguous(), stats, dz, logits.stride(0), N, vocab_size,
                ignore_index, **_config(N),
            )  # fmt: skip
    return dz


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a b, in one pass over total (N, C) in fp32 where PyTorch's product can do so."""
    if a.dtype == torch.float32:
        total.addmm_(a, b)
    elif a.is_cuda and ADDS_TO_FP32:
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    else:
        total += a @ b


def _linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    ignore_index: int,
    vocab_size: int,
    needs_dx: bool,
    needs_dw: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the mean loss, the number of counted rows, and dx and dW without dloss / count.

    dW is a sum over all chunks, hence in fp32 whatever the input. A gradient that is not needed is
    an empty tensor.
    """
    M, V = len(x), len(weight)
    targets = targets.contiguous()
    dx = x.new_empty(x.shape if needs_dx else 0)
    dw = weight.new_zeros(weight.shape if needs_dw else 0, dtype=torch.float32)
    padded = triton.cdiv(V, ROW_ALIGNMENT) * ROW_ALIGNMENT
    # chunks of one size: a small last one would leave most of the chip idle
    chunks = triton.cdiv(M, max(1, CHUNK_ELEMENTS // padded))
    rows = max(1, triton.cdiv(M, max(1, chunks)))
    buffer = x.new_empty(rows, padded)
    losses = x.new_zeros((), dtype=torch.float32)
    for start in range(0, M, rows):
        chunk = slice(start, start + rows)
        padded_logits = buffer[: len(x[chunk])]  # (rows, padded)
        logits = padded_logits[:, :V]
        torch.mm(x[chunk], weight.t(), out=logits)
        loss, _ = _losses(
            padded_logits, targets[chunk], ignore_index, vocab_size, needs_dx or needs_dw
        )
        losses += loss.sum()
        # the logits now hold their own gradient
        if needs_dx:
            torch.mm(logits, weight, out=dx[chunk])
        if needs_dw:
            _add_product(dw, logits.t(), x[chunk])
    count = (targets != ignore_index).sum()
    return losses / count, count, dx, dw


_forward_op = torch.library.custom_op(
    "nanogpt2::cross_entropy_fwd", _cross_entropy_fwd, mutates_args=()
)
_backward_op = torch.library.custom_op(
    "nanogpt2::cross_entropy_bwd", _cross_entropy_bwd, mutates_args=()
)
_linear_op = torch.library.custom_op(
    "nanogpt2::linear_cross_entropy", _linear_cross_entropy, mutates_args=()
)


@_forward_op.register_fake
def _(
    logits: Tensor, targets: Tensor, ignore_index: int, vocab_size: int
) -> tuple[Tensor, Tensor, Tensor]:
    loss = logits.new_empty((), dtype=torch.float32)
    return loss, loss.new_empty(len(logits), 2), targets.new_empty(())


@_backward_op.register_fake
def _(
    scale: Tensor,
    logits: Tensor,
    targets: Tensor,
    stats: Tensor,
    ignore_index: int,
    vocab_size: int,
) -> Tensor:
    return logits.new_empty(logits.shape)


@_linear_op.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    ignore_index: int,
    vocab_size: int,
    needs_dx: bool,
    needs_dw: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    loss = x.new_empty((), dtype=torch.float32)
    dx = x.new_empty(x.shape if needs_dx else 0)
    dw = loss.new_empty(weight.shape if needs_dw else 0)
    return loss, targets.new_empty(()), dx, dw


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, targets, *ctx.arguments = inputs
    _, stats, count = output
    # save the unmodified logits and two numbers a row, not the probabilities
    ctx.save_for_backward(logits, targets, stats, count)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dloss: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if dloss is None:
        return None, None, None, None
    logits, targets, stats, count = ctx.saved_tensors
    dz = _backward_op(dloss / count, logits, targets, stats, *ctx.arguments)
    return dz, None, None, None


def _linear_setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, weight, *_, needs_dx, needs_dw = inputs
    ctx.needs, ctx.weight_dtype = (needs_dx, needs_dw), weight.dtype
    # save no x, weight or logits: the gradients lack only a factor
    ctx.save_for_backward(*output[1:])
    ctx.set_materialize_grads(False)


def _linear_backward(ctx: Any, dloss: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    count, dx, dw = ctx.saved_tensors
    needs_dx, needs_dw = ctx.needs
    if dloss is None:
        needs_dx = needs_dw = False
    else:
        scale = dloss / count
    # multiply in float32: the scale may exceed float16's range
    return (
        (dx.float() * scale).to(dx.dtype) if needs_dx else None,
        (dw * scale).to(ctx.weight_dtype) if needs_dw else None,
        *[None] * 5,
    )


_forward_op.register_autograd(_backward, setup_context=_setup_context)
_linear_op.register_autograd(_linear_backward, setup_context=_linear_setup_context)


def cross_entropy(
    logits: Tensor, targets: Tensor, ignore_index: int = -100, vocab_size: int | None = None
) -> Tensor:
    """Mean over the targets of -log softmax(logits)[target].

    logits: (M, N) in float32, float16 or bfloat16, not modified. targets: int64 (M,); targets equal
    to `ignore_index` do not count. vocab_size: the first columns, which are tokens, by default N.
    -> () in fp32; NaN if no target counts or a target is outside the vocabulary. Raises ValueError
    for other arguments.
    """
    vocab_size = _check("logits", logits, targets, logits.size(-1), vocab_size)
    return _forward_op(logits, targets, ignore_index, vocab_size)[0]


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    ignore_index: int = -100,
    vocab_size: int | None = None,
) -> Tensor:
    """cross_entropy(x weight^T, targets) without ever holding all the logits.

    x: (M, C). weight: (N, C), in the dtype of x. Other arguments as in cross_entropy.
    """
    if weight.dim() != 2 or weight.shape[1:] != x.shape[1:]:
        raise ValueError(f"weight must be (N, {x.size(-1)}), not {tuple(weight.shape)}")
    if (weight.dtype, weight.device) != (x.dtype, x.device):
        raise ValueError(
            f"weight must be {x.dtype} on {x.device} as x is, not {weight.dtype} on {weight.device}"
        )
    vocab_size = _check("x", x, targets, len(weight), vocab_size)
    needs = [t.requires_grad and torch.is_grad_enabled() for t in (x, weight)]
    return _linear_op(x, weight, targets, ignore_index, vocab_size, *needs)[0]


def _check(name: str, x: Tensor, targets: Tensor, columns: int, vocab_size: int | None) -> int:
    """Raise ValueError for unsupported arguments; return the vocabulary size without padding."""
    if x.dtype not in DTYPES:
        raise ValueError(f"{name} must be float32, float16 or bfloat16, not {x.dtype}")
    if not (x.is_cuda or INTERPRETED):
        raise ValueError(f"{name} must be on a CUDA device, not on {x.device}")
    if x.dim() != 2 or columns == 0:
        raise ValueError(f"{name} must have two axes, rows and columns, not {tuple(x.shape)}")
    if (targets.shape, targets.dtype) != (x.shape[:1], torch.int64):
        raise ValueError(
            f"targets must be ({len(x)},) int64, not {tuple(targets.shape)} {targets.dtype}"
        )
    if targets.device != x.device:
        raise ValueError(f"targets must be on {x.device} as {name} is, not on {targets.device}")
    vocab_size = columns if vocab_size is None else vocab_size
    if not 1 <= vocab_size <= columns:
        raise ValueError(f"vocab_size must be from 1 to {columns}, not {vocab_size}")
    return vocab_size
