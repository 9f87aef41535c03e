"""Softmax and log-softmax over the last axis, with an optional causal mask and scale.

For a row x of N columns, in fp32 whatever the input:

    forward    m = max_n x_n,  l = sum_n 2^(c (x_n - m))
               y_n = 2^(c (x_n - m)) / l               softmax
               y_n = scale (x_n - m) - ln(2) log2 l    log-softmax
    backward   dx_n = scale y_n (dy_n - sum_k y_k dy_k)             softmax
               dx_n = scale (dy_n - 2^(log2(e) y_n) sum_k dy_k)     log-softmax

c = scale log2(e), so one product serves the scale and the base, which is the hardware's exp2's.

The backward needs y, not x. Causal: row t of T sees the columns up to t + N - T. The kernels do not
read unseen columns; their y and dx are 0. A row of -inf alone gives NaN, as in PyTorch.

Traffic, s bytes an element: forward 2 M N s (x in, y out), backward 3 M N s (y and dy in, dx out).
A row up to MAX_WHOLE_ROW columns stays in registers. A longer row would spill, so one sweep makes
its maximum and sum (correcting m and l block by block) and a second sweep reads the row again. The
second read hits the L1 or L2 that the row has just passed through: memory still sees one read and
one write.

This file does not know who made the rows. Source of the sweep: Milakov and Gimelshein 2018, "Online
normalizer calculation for softmax".
"""

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MAX_COLUMNS = 65536
MAX_WHOLE_ROW = 16384
# a block of a longer row: 16 values a thread. One or two programs fit on an SM, so the L2 holds all
# their rows (100 KB of bf16 each) at once
LONG_ROW_BLOCK = 8192
INTERPRETED = triton.knobs.runtime.interpret
# set explicitly: Triton 3.10 changed the default
FUSED = {"enable_fp_fusion": True}

LOG2_E = tl.constexpr(math.log2(math.e))
LN_2 = tl.constexpr(math.log(2))


def softmax_ref(x: Tensor, causal: bool = False, scale: float = 1.0) -> Tensor:
    """Compute softmax by the formulas, in the dtype of x."""
    T, N = x.shape[-2:]
    z = x * scale
    if causal:
        seen = torch.ones(T, N, dtype=torch.bool, device=x.device).tril(N - T)
        z = z.masked_fill(~seen, -torch.inf)
    e = (z - z.amax(dim=-1, keepdim=True)).exp()
    return e / e.sum(dim=-1, keepdim=True)


@triton.jit
def _sum_blocks(
    m_i, l_i,  # scalars so far
    x_row,  # (N,)
    lo, hi, c,  # walks columns [lo, hi)
    MASKED: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    cols = tl.arange(0, BLOCK_N)
    first = m_i
    sums = tl.zeros((BLOCK_N,), tl.float32)
    for start in range(lo, hi, BLOCK_N):
        if MASKED:
            x = tl.load(x_row + start + cols, mask=start + cols < hi, other=-float("inf"))
        else:
            x = tl.load(x_row + start + cols)
        x = x.to(tl.float32)
        m_new = tl.maximum(m_i, tl.max(x, axis=0))
        # a block of -inf alone: subtract 0, since 2^(-inf - 0) = 0 and -inf - -inf is nan
        shift = tl.where(m_new == -float("inf"), 0.0, m_new)
        # one sum a column of the block: they are added up once, at the end
        sums = sums * tl.exp2((m_i - shift) * c) + tl.exp2((x - shift) * c)
        m_i = m_new
    shift = tl.where(m_i == -float("inf"), 0.0, m_i)
    return m_i, l_i * tl.exp2((first - shift) * c) + tl.sum(sums, axis=0)


@triton.jit
def _write_blocks(
    x_row, y_row,  # (N,)
    m_i, l_i,  # scalars
    lo, hi, seen, scale, c,  # walks columns [lo, hi)
    LOG: tl.constexpr, MASKED: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    log_l, one_over_l = tl.log2(l_i) * LN_2, 1.0 / l_i
    for start in range(lo, hi, BLOCK_N):
        cols = start + tl.arange(0, BLOCK_N)
        if MASKED:
            x = tl.load(x_row + cols, mask=cols < seen, other=-float("inf")).to(tl.float32)
        else:
            x = tl.load(x_row + cols).to(tl.float32)
        y = (x - m_i) * scale - log_l if LOG else tl.exp2((x - m_i) * c) * one_over_l
        y = y.to(y_row.dtype.element_ty)
        if MASKED:
            tl.store(y_row + cols, y, mask=cols < hi)
        else:
            tl.store(y_row + cols, y)


@triton.jit
def _softmax_fwd_kernel(
    x_ptr,  # (M, N), stride 1 along N
    y_ptr,  # (M, N), contiguous
    stride_xm,
    N,
    T,  # rows of one causal mask
    scale,
    CAUSAL: tl.constexpr,
    LOG: tl.constexpr,
    WHOLE_ROW: tl.constexpr,  # BLOCK_N >= N
    BLOCK_N: tl.constexpr,
    END_N: tl.constexpr,  # columns of a masked block of a longer row
):
    row = tl.program_id(0).to(tl.int64)
    x_row, y_row = x_ptr + row * stride_xm, y_ptr + row * N
    cols = tl.arange(0, BLOCK_N)
    seen, c = N, scale * LOG2_E
    if CAUSAL:
        seen = (row % T).to(tl.int32) + N - T + 1

    if WHOLE_ROW:
        x = tl.load(x_row + cols, mask=cols < seen, other=-float("inf")).to(tl.float32)
        m_i = tl.max(x, axis=0)
        e = tl.exp2((x - m_i) * c)
        l_i = tl.sum(e, axis=0)
        y = (x - m_i) * scale - tl.log2(l_i) * LN_2 if LOG else e * (1.0 / l_i)
        tl.store(y_row + cols, y.to(y_ptr.dtype.element_ty), mask=cols < N)
    else:
        whole = seen // BLOCK_N * BLOCK_N
        m_i, l_i = -float("inf"), 0.0
        m_i, l_i = _sum_blocks(m_i, l_i, x_row, 0, whole, c, False, BLOCK_N)
        m_i, l_i = _sum_blocks(m_i, l_i, x_row, whole, seen, c, True, END_N)
        _write_blocks(x_row, y_row, m_i, l_i, 0, whole, seen, scale, c, LOG, False, BLOCK_N)
        _write_blocks(x_row, y_row, m_i, l_i, whole, N, seen, scale, c, LOG, True, END_N)


@triton.jit
def _sum_products(
    total,  # scalar so far
    y_row, dy_row,  # (N,)
    lo, hi,  # walks columns [lo, hi)
    LOG: tl.constexpr, MASKED: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    sums = tl.zeros((BLOCK_N,), tl.float32)
    for start in range(lo, hi, BLOCK_N):
        cols = start + tl.arange(0, BLOCK_N)
        mask = cols < hi if MASKED else None
        other = 0.0 if MASKED else None
        dy = tl.load(dy_row + cols, mask=mask, other=other).to(tl.float32)
        if not LOG:
            dy *= tl.load(y_row + cols, mask=mask, other=other).to(tl.float32)
        sums += dy
    return total + tl.sum(sums, axis=0)


@triton.jit
def _gradient_blocks(
    y_row, dy_row, dx_row,  # (N,)
    total,  # scalar
    lo, hi, seen, scale,  # walks columns [lo, hi)
    LOG: tl.constexpr, MASKED: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    for start in range(lo, hi, BLOCK_N):
        cols = start + tl.arange(0, BLOCK_N)
        # unseen columns read as 0 and get the gradient 0
        mask = cols < seen if MASKED else None
        other = 0.0 if MASKED else None
        y = tl.load(y_row + cols, mask=mask, other=other).to(tl.float32)
        dy = tl.load(dy_row + cols, mask=mask, other=other).to(tl.float32)
        dx = dy - tl.exp2(y * LOG2_E) * total if LOG else y * (dy - total)
        dx = (dx * scale).to(dx_row.dtype.element_ty)
        tl.store(dx_row + cols, dx, mask=cols < hi if MASKED else None)


@triton.jit
def _softmax_bwd_kernel(
    y_ptr,  # (M, N), contiguous
    dy_ptr,  # (M, N), stride 1 along N
    dx_ptr,  # (M, N), contiguous
    stride_dym,
    N,
    T,  # rows of one causal mask
    scale,
    CAUSAL: tl.constexpr,
    LOG: tl.constexpr,
    WHOLE_ROW: tl.constexpr,  # BLOCK_N >= N
    BLOCK_N: tl.constexpr,
    END_N: tl.constexpr,  # columns of a masked block of a longer row
):
    row = tl.program_id(0).to(tl.int64)
    y_row, dy_row, dx_row = y_ptr + row * N, dy_ptr + row * stride_dym, dx_ptr + row * N
    cols = tl.arange(0, BLOCK_N)
    seen = N
    if CAUSAL:
        seen = (row % T).to(tl.int32) + N - T + 1

    if WHOLE_ROW:
        # unseen columns read as 0 and get the gradient 0
        y = tl.load(y_row + cols, mask=cols < seen, other=0.0).to(tl.float32)
        dy = tl.load(dy_row + cols, mask=cols < seen, other=0.0).to(tl.float32)
        total = tl.sum(dy if LOG else y * dy, axis=0)
        dx = dy - tl.exp2(y * LOG2_E) * total if LOG else y * (dy - total)
        tl.store(dx_row + cols, (dx * scale).to(dx_ptr.dtype.element_ty), mask=cols < N)
    else:
        whole = seen // BLOCK_N * BLOCK_N
        total = 0.0
        total = _sum_products(total, y_row, dy_row, 0, whole, LOG, False, BLOCK_N)
        total = _sum_products(total, y_row, dy_row, whole, seen, LOG, True, END_N)
        _gradient_blocks(y_row, dy_row, dx_row, total, 0, whole, seen, scale, LOG, False, BLOCK_N)
        _gradient_blocks(y_row, dy_row, dx_row, total, whole, N, seen, scale, LOG, True, END_N)


def _config(N: int) -> dict[str, Any]:
    """WHOLE_ROW, BLOCK_N, END_N and num_warps for rows of N columns.

    | N        | block             | warps | because                                           |
    |----------|-------------------|-------|---------------------------------------------------|
    | to 16384 | next power of two | 1-16  | 8 or more values a thread: 16-byte loads of bf16  |
    | to 65536 | 8192, two sweeps  | 16    | 64 or more values a thread would spill            |
    """
    block = triton.next_power_of_2(N) if N <= MAX_WHOLE_ROW else LONG_ROW_BLOCK
    warps = min(max(block // 256, 1), 16)
    blocks = {"BLOCK_N": block, "END_N": min(block, 1024)}
    return {"WHOLE_ROW": block >= N, **blocks, "num_warps": warps, **FUSED}


def _rows(x: Tensor) -> Tensor:
    """(..., N) -> (M, N) with stride 1 along N: a view where possible, else a copy."""
    rows = x.reshape(-1, x.size(-1))
    return rows if rows.stride(1) == 1 else rows.contiguous()


def _softmax_fwd(x: Tensor, causal: bool, log: bool, scale: float) -> Tensor:
    y = x.new_empty(x.shape)
    if x.numel():
        rows, T = _rows(x), x.size(-2) if causal else 1
        M, N = rows.shape
        with torch.cuda.device_of(x):
            _softmax_fwd_kernel[(M,)](
                rows, y, rows.stride(0), N, T, scale, CAUSAL=causal, LOG=log, **_config(N)
            )
    return y


def _softmax_bwd(dy: Tensor, y: Tensor, causal: bool, log: bool, scale: float) -> Tensor:
    dx = y.new_empty(y.shape)
    if y.numel():
        rows, T = _rows(dy), y.size(-2) if causal else 1
        M, N = rows.shape
        with torch.cuda.device_of(y):
            _softmax_bwd_kernel[(M,)](
                y, rows, dx, rows.stride(0), N, T, scale, CAUSAL=causal, LOG=log, **_config(N)
            )
    return dx


# save only y: the backward does not need x, and the caller may hold y anyway
_forward_op = torch.library.custom_op("nanogpt2::softmax_fwd", _softmax_fwd, mutates_args=())
_backward_op = torch.library.custom_op("nanogpt2::softmax_bwd", _softmax_bwd, mutates_args=())


@_forward_op.register_fake
def _(x: Tensor, causal: bool, log: bool, scale: float) -> Tensor:
    return x.new_empty(x.shape)


@_backward_op.register_fake
def _(dy: Tensor, y: Tensor, causal: bool, log: bool, scale: float) -> Tensor:
    return y.new_empty(y.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(output)
    ctx.arguments = inputs[1:]


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    (y,) = ctx.saved_tensors
    return _backward_op(dy, y, *ctx.arguments), None, None, None


_forward_op.register_autograd(_backward, setup_context=_setup_context)


def softmax(x: Tensor, causal: bool = False, scale: float = 1.0) -> Tensor:
    """exp(scale x - max) / sum over the last axis.

    x: (..., N) in float32, float16 or bfloat16, N up to 65536. With `causal` x is (..., T, N) with
    T <= N, and row t sees the columns up to t + N - T. -> the shape and dtype of x, contiguous.
    Raises ValueError for other arguments.
    """
    _check(x)
    if causal and (x.dim() < 2 or x.size(-2) > x.size(-1)):
        raise ValueError(f"x must be (..., T, N) with T <= N where causal, not {tuple(x.shape)}")
    if not 0 < scale < float("inf"):
        raise ValueError(f"scale must be finite and above 0, not {scale}")
    return _forward_op(x, causal, False, float(scale))


def log_softmax(x: Tensor) -> Tensor:
    """x - max - log(sum exp(x - max)) over the last axis; x and the result as in softmax."""
    _check(x)
    return _forward_op(x, False, True, 1.0)


def _check(x: Tensor) -> None:
    if x.dtype not in DTYPES:
        raise ValueError(f"x must be float32, float16 or bfloat16, not {x.dtype}")
    if not (x.is_cuda or INTERPRETED):
        raise ValueError(f"x must be on a CUDA device, not on {x.device}")
    if x.dim() == 0 or x.size(-1) > MAX_COLUMNS:
        raise ValueError(f"x must be (..., N) with N up to {MAX_COLUMNS}, not {tuple(x.shape)}")
