"""Layer normalisation of rows, alone or with the residual addition before it.

For a row x of N columns, in fp32 whatever the input:

    forward    mean = sum_n x_n / N
               rstd = 1 / sqrt(sum_n (x_n - mean)^2 / N + eps)
               xhat = (x - mean) rstd
               y = w xhat + b
    backward   g = w dy
               dx = rstd (g - sum_n g_n / N - xhat sum_n g_n xhat_n / N)
               dw = sum over rows of dy xhat,  db = sum over rows of dy

With a residual, x = (a layer's output) + residual comes first, rounded to the residual's dtype as
the next layer will read it. The backward adds the gradient that reaches x around the norm. The
layer's output may be narrower than the residual, and y than both: under autocast the residual
stream is fp32 and the matrix products around the norm are bf16, so the kernels cast for nobody.

dw and db: each of P programs sums its own rows in registers and writes one partial row of each; a
second kernel adds the P partial rows, always in the same order. No locks, no atomics: every run on
a chip gives the same bits.

Traffic, s bytes an element: forward 2 M N s and 8 M for the statistics, with a residual 4 M N s;
backward 3 M N s (4 with a residual), and 16 P N for the partial rows: 3 % at 65536 rows of bf16 on
132 SMs. Memory-bound: the backward loads the next row while it works on the current row.

This file knows nothing of models. Source: Ba, Kiros and Hinton 2016.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MAX_COLUMNS = 8192
# warps of the backward on an SM: with up to 128 registers a thread all its programs run at once, so
# no second wave follows. The interpreter runs a few programs
WARPS_PER_SM = 16
INTERPRETED_PROGRAMS = 3
# the tile of the kernel that adds the partial rows: 128 bytes of a row, and 48 programs for N = 768
SUM_ROWS, SUM_COLUMNS = 128, 32
INTERPRETED = triton.knobs.runtime.interpret
# set explicitly: Triton 3.10 changed the default
FUSED = {"enable_fp_fusion": True}


def layer_norm_ref(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
    """Compute layer_norm by the formulas, in the dtype of x."""
    centred = x - x.mean(dim=-1, keepdim=True)
    rstd = (centred.pow(2).mean(dim=-1, keepdim=True) + eps).rsqrt()
    return weight * (centred * rstd) + bias


@triton.jit
def _layer_norm_fwd_kernel(
    x_ptr,  # (M, N), stride 1 along N
    residual_ptr,  # (M, N) likewise, of its own dtype, or None
    weight_ptr,  # (N,)
    bias_ptr,  # (N,)
    y_ptr,  # (M, N), contiguous
    sum_ptr,  # (M, N), contiguous: x + residual in the residual's dtype, or None
    mean_ptr,  # (M,) in fp32
    rstd_ptr,  # (M,) in fp32
    stride_xm,
    stride_rm,
    N,
    eps,
    BLOCK_N: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK_N)
    mask = cols < N

    x = tl.load(x_ptr + row * stride_xm + cols, mask=mask, other=0.0).to(tl.float32)
    if residual_ptr is not None:
        x += tl.load(residual_ptr + row * stride_rm + cols, mask=mask, other=0.0).to(tl.float32)
        rounded = x.to(sum_ptr.dtype.element_ty)
        tl.store(sum_ptr + row * N + cols, rounded, mask=mask)
        x = rounded.to(tl.float32)
    w = tl.load(weight_ptr + cols, mask=mask, other=0.0).to(tl.float32)
    b = tl.load(bias_ptr + cols, mask=mask, other=0.0).to(tl.float32)

    mean = tl.sum(x, axis=0) / N
    # centre first: sum x^2 - N mean^2 would cancel where the mean is large
    centred = tl.where(mask, x - mean, 0.0)
    rstd = tl.rsqrt(tl.sum(centred * centred, axis=0) / N + eps)
    y = w * (centred * rstd) + b

    tl.store(y_ptr + row * N + cols, y.to(y_ptr.dtype.element_ty), mask=mask)
    tl.store(mean_ptr + row, mean)
    tl.store(rstd_ptr + row, rstd)


@triton.jit
def _layer_norm_bwd_kernel(
    dy_ptr,  # (M, N), stride 1 along N
    dsum_ptr,  # (M, N) likewise: the gradient that reaches x around the norm, or None
    x_ptr,  # (M, N) likewise
    weight_ptr,  # (N,)
    mean_ptr,  # (M,) in fp32
    rstd_ptr,  # (M,) in fp32
    dx_ptr,  # (M, N), contiguous
    narrow_ptr,  # (M, N), contiguous: dx in a narrower dtype too, or None
    partial_ptr,  # (P, 2, N) in fp32: dw and db of each program's rows
    stride_dym,
    stride_dsm,
    stride_xm,
    M,
    N,
    ROWS,  # rows of one program
    BLOCK_N: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    first = program * ROWS
    last = tl.minimum(first + ROWS, M)
    cols = tl.arange(0, BLOCK_N)
    mask = cols < N
    w = tl.load(weight_ptr + cols, mask=mask, other=0.0).to(tl.float32)
    dw = tl.zeros((BLOCK_N,), tl.float32)
    db = tl.zeros((BLOCK_N,), tl.float32)

    next_x = tl.load(x_ptr + first * stride_xm + cols, mask=mask, other=0.0)
    next_dy = tl.load(dy_ptr + first * stride_dym + cols, mask=mask, other=0.0)
    for row in range(first, last):
        x, dy = next_x.to(tl.float32), next_dy.to(tl.float32)
        # load the next row while computing this row
        ahead = tl.minimum(row + 1, last - 1)
        next_x = tl.load(x_ptr + ahead * stride_xm + cols, mask=mask, other=0.0)
        next_dy = tl.load(dy_ptr + ahead * stride_dym + cols, mask=mask, other=0.0)
        mean, rstd = tl.load(mean_ptr + row), tl.load(rstd_ptr + row)
        if dsum_ptr is not None:
            # before the sums over the row, which it need not wait for
            dsum = tl.load(dsum_ptr + row * stride_dsm + cols, mask=mask, other=0.0)

        # past the last column xhat is not 0, but w and dy are 0
        xhat = (x - mean) * rstd
        g = w * dy
        dx = rstd * (g - tl.sum(g, axis=0) / N - xhat * (tl.sum(g * xhat, axis=0) / N))
        dw += dy * xhat
        db += dy

        if dsum_ptr is not None:
            dx += dsum.to(tl.float32)
        tl.store(dx_ptr + row * N + cols, dx.to(dx_ptr.dtype.element_ty), mask=mask)
        if narrow_ptr is not None:
            tl.store(narrow_ptr + row * N + cols, dx.to(narrow_ptr.dtype.element_ty), mask=mask)

    tl.store(partial_ptr + (2 * program) * N + cols, dw, mask=mask)
    tl.store(partial_ptr + (2 * program + 1) * N + cols, db, mask=mask)


@triton.jit
def _layer_norm_sum_kernel(
    partial_ptr,  # (P, 2, N) in fp32
    dw_ptr,  # (N,)
    db_ptr,  # (N,)
    P,
    N,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    which = tl.program_id(1)
    cols = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros((BLOCK_P, BLOCK_N), tl.float32)
    for first in range(0, P, BLOCK_P):
        rows = (first + tl.arange(0, BLOCK_P))[:, None]
        offsets = (2 * rows + which) * N + cols[None, :]
        total += tl.load(partial_ptr + offsets, mask=(rows < P) & (cols < N)[None, :], other=0.0)
    total = tl.sum(total, axis=0).to(dw_ptr.dtype.element_ty)
    if which == 0:
        tl.store(dw_ptr + cols, total, mask=cols < N)
    else:
        tl.store(db_ptr + cols, total, mask=cols < N)


def _config(N: int) -> dict[str, int]:
    """BLOCK_N and num_warps for rows of N columns, N up to 8192.

    | N              | warps | because                                                            |
    |----------------|-------|--------------------------------------------------------------------|
    | 768 and 1024   | 4     | 8 values a thread: one 16-byte load of bf16 from each tensor       |
    | 1280 and 1600  | 8     | likewise                                                           |
    | past 4096      | 16    | limit common to all chips; the backward keeps 5 values a column    |
    """
    block = triton.next_power_of_2(N)
    return {"BLOCK_N": block, "num_warps": min(max(block // 256, 1), 16), **FUSED}


def _programs(x: Tensor, warps: int) -> int:
    if not x.is_cuda:
        return INTERPRETED_PROGRAMS
    processors = torch.cuda.get_device_properties(x.device).multi_processor_count
    return processors * (WARPS_PER_SM // warps)


def _rows(x: Tensor) -> Tensor:
    """(..., N) -> (M, N) with stride 1 along N: a view where possible, else a copy."""
    rows = x.reshape(-1, x.size(-1))
    return rows if rows.stride(1) == 1 else rows.contiguous()


def _layer_norm_fwd(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    dtype: torch.dtype | None,
) -> list[Tensor]:
    """Return [y, mean, rstd], y in `dtype`, and x + residual last with a residual."""
    rows = _rows(x)
    M, N = rows.shape
    y = x.new_empty(x.shape, dtype=dtype)
    mean, rstd = (x.new_empty(M, dtype=torch.float32) for _ in range(2))
    others, total = None, None
    if residual is not None:
        others, total = _rows(residual), residual.new_empty(x.shape)
    if M:
        stride_rm = 0 if others is None else others.stride(0)
        weight, bias = weight.contiguous(), bias.contiguous()
        with torch.cuda.device_of(x):
            _layer_norm_fwd_kernel[(M,)](
                rows, others, weight, bias, y, total, mean, rstd,
                rows.stride(0), stride_rm, N, eps, **_config(N),
            )  # fmt: skip
    return [y, mean, rstd] if total is None else [y, mean, rstd, total]


def _layer_norm_bwd(
    dy: Tensor,
    dsum: Tensor | None,
    x: Tensor,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    narrow: torch.dtype | None,
) -> list[Tensor]:
    """Return [dx, dw, db], and dx in the dtype `narrow` last where one is given."""
    rows, dy_rows = _rows(x), _rows(dy)
    M, N = rows.shape
    config = _config(N)
    per_program = triton.cdiv(M, _programs(x, config["num_warps"]))
    P = triton.cdiv(M, per_program) if M else 0
    dx = x.new_empty(x.shape)
    narrow_dx = None if narrow is None else x.new_empty(x.shape, dtype=narrow)
    partial = x.new_empty((P, 2, N), dtype=torch.float32)
    if M:
        dsum_rows = None if dsum is None else _rows(dsum)
        stride_dsm = 0 if dsum_rows is None else dsum_rows.stride(0)
        with torch.cuda.device_of(x):
            _layer_norm_bwd_kernel[(P,)](
                dy_rows, dsum_rows, rows, weight.contiguous(), mean, rstd, dx, narrow_dx,
                partial,
                dy_rows.stride(0), stride_dsm, rows.stride(0), M, N, per_program, **config,
            )  # fmt: skip
    dw, db = (weight.new_empty(N) for _ in range(2))
    with torch.cuda.device_of(x):
        _layer_norm_sum_kernel[(triton.cdiv(N, SUM_COLUMNS), 2)](
            partial, dw, db, P, N, BLOCK_P=SUM_ROWS, BLOCK_N=SUM_COLUMNS, num_warps=8, **FUSED
        )
    return [dx, dw, db] if narrow_dx is None else [dx, dw, db, narrow_dx]


# save x (or the sum), w and two statistics a row: recomputing xhat is cheaper than reading it
_forward_op = torch.library.custom_op("nanogpt2::layer_norm_fwd", _layer_norm_fwd, mutates_args=())
_backward_op = torch.library.custom_op("nanogpt2::layer_norm_bwd", _layer_norm_bwd, mutates_args=())


@_forward_op.register_fake
def _(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    dtype: torch.dtype | None,
) -> list[Tensor]:
    M = x.numel() // x.size(-1)
    results = [x.new_empty(x.shape, dtype=dtype)]
    results += [x.new_empty(M, dtype=torch.float32) for _ in range(2)]
    return results if residual is None else [*results, residual.new_empty(x.shape)]


@_backward_op.register_fake
def _(
    dy: Tensor,
    dsum: Tensor | None,
    x: Tensor,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    narrow: torch.dtype | None,
) -> list[Tensor]:
    dw, db = (weight.new_empty(weight.shape) for _ in range(2))
    narrow_dx = [] if narrow is None else [x.new_empty(x.shape, dtype=narrow)]
    return [x.new_empty(x.shape), dw, db, *narrow_dx]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    x, residual, weight, *_ = inputs
    normed = x if residual is None else output[3]
    ctx.save_for_backward(normed, weight, *output[1:3])
    ctx.narrow = None if x.dtype == normed.dtype else x.dtype
    # make no zeros for the unused gradients of mean and rstd
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grads: list[Tensor | None]) -> tuple[Tensor | None, ...]:
    x, weight, mean, rstd = ctx.saved_tensors
    dy, dsum = grads[0], grads[3] if len(grads) > 3 else None
    if dy is None:
        dy = torch.zeros_like(x)
    dx, dw, db, *narrow = _backward_op(dy, dsum, x, weight, mean, rstd, ctx.narrow)
    dresidual = dx if len(grads) > 3 else None
    return narrow[0] if narrow else dx, dresidual, dw, db, None, None


_forward_op.register_autograd(_backward, setup_context=_setup_context)


def layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float = 1e-5,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """(x - mean) / sqrt(var + eps) * weight + bias over the last axis.

    x: (..., N) in float32, float16 or bfloat16, N up to 8192. weight, bias: (N,), both of one of
    these dtypes. dtype: the result's, one of these, by default that of x. -> the shape of x,
    contiguous. Raises ValueError for other arguments.
    """
    _check(x, weight, bias, dtype)
    return _forward_op(x, None, weight, bias, eps, dtype)[0]


def residual_layer_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float = 1e-5,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Return layer_norm(x + residual) and x + residual, the next residual, from one pass.

    residual: the shape and device of x, and its dtype or float32; the sum has the residual's dtype.
    Other arguments as in layer_norm.
    """
    _check(x, weight, bias, dtype)
    right = (residual.shape, residual.device) == (x.shape, x.device)
    if not (right and residual.dtype in (x.dtype, torch.float32)):
        wider = "" if x.dtype == torch.float32 else " or torch.float32"
        raise ValueError(
            f"residual must be {tuple(x.shape)} {x.dtype}{wider} on {x.device} as x is, "
            f"not {tuple(residual.shape)} {residual.dtype} on {residual.device}"
        )
    y, _, _, total = _forward_op(x, residual, weight, bias, eps, dtype)
    return y, total


def _check(x: Tensor, weight: Tensor, bias: Tensor, dtype: torch.dtype | None) -> None:
    if dtype not in (None, *DTYPES):
        raise ValueError(f"dtype must be float32, float16 or bfloat16, not {dtype}")
    for name, tensor in (("x", x), ("weight", weight), ("bias", bias)):
        if tensor.dtype not in DTYPES:
            raise ValueError(f"{name} must be float32, float16 or bfloat16, not {tensor.dtype}")
        if not (tensor.is_cuda or INTERPRETED) or tensor.device != x.device:
            raise ValueError(f"{name} must be on a CUDA device, that of x, not on {tensor.device}")
    if x.dim() == 0 or not 1 <= x.size(-1) <= MAX_COLUMNS:
        raise ValueError(f"x must be (..., N), N from 1 to {MAX_COLUMNS}, not {tuple(x.shape)}")
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor.shape != x.shape[-1:] or tensor.dtype != weight.dtype:
            raise ValueError(
                f"{name} must be ({x.size(-1)},) {weight.dtype}, "
                f"not {tuple(tensor.shape)} {tensor.dtype}"
            )
