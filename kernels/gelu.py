"""GELU in GPT-2's tanh form, alone or with the addition of a bias before it.

With c = sqrt(2 / pi) and a = 0.044715, in fp32 whatever the input:

    forward    z = x + b
               u = c (z + a z^3)
               y = z (1 + tanh u) / 2 = z s,  s = 1 / (1 + exp(-2 u))
    backward   dy/dz = s + z s (1 - s) 2 c (1 + 3 a z^2)
               dx = dy dy/dz,  db = sum over rows of dx

(1 + tanh u) / 2 is the logistic function of 2 u: it takes one exponential, and nothing cancels
where z is far below 0. The backward needs x and b, not y; it recomputes z and s.

db: each program sums ROWS rows of its columns into one partial row, and one more sum adds the
partial rows. No atomics: every run gives the same bits.

Traffic for M x N elements of s bytes: forward 2 M N s, backward 3 M N s, and 8 M N / ROWS for the
partial rows: 2 % of bf16's. Memory-bound.

This file knows nothing of models. Source: Hendrycks and Gimpel 2016.
"""

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# bytes of one tile: a thread holds 32 values of 16 bits, or 16 of 32 bits
TILE = 8192
# rows that one partial row of db sums
ROWS = 64
INTERPRETED = triton.knobs.runtime.interpret
# set explicitly: Triton 3.10 changed the default
FUSED = {"enable_fp_fusion": True}

SQRT_2_OVER_PI = tl.constexpr(math.sqrt(2 / math.pi))
CUBIC = tl.constexpr(0.044715)


def gelu_ref(x: Tensor, bias: Tensor | float = 0.0) -> Tensor:
    """Compute gelu or bias_gelu by the formula, in the dtype of x."""
    z = x + bias
    return 0.5 * z * (1 + (math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)).tanh())


@triton.jit
def _gelu_fwd_kernel(
    x_ptr,  # (M, N), stride 1 along N
    bias_ptr,  # (N,), or None
    y_ptr,  # (M, N), contiguous
    stride_xm,
    M,
    N,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    cols = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    mask = (rows < M) & (cols < N)

    z = tl.load(x_ptr + rows * stride_xm + cols, mask=mask, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        z += tl.load(bias_ptr + cols, mask=cols < N, other=0.0).to(tl.float32)
    u = SQRT_2_OVER_PI * (z + CUBIC * z * z * z)
    y = z * tl.sigmoid(2 * u)
    tl.store(y_ptr + rows * N + cols, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _gelu_bwd_kernel(
    dy_ptr,  # (M, N), stride 1 along N
    x_ptr,  # (M, N) likewise
    bias_ptr,  # (N,), or None
    dx_ptr,  # (M, N), contiguous
    partial_ptr,  # (P, N) in fp32: db of each program's rows; only with a bias
    stride_dym,
    stride_xm,
    M,
    N,
    ROWS: tl.constexpr,  # rows of one program
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    first = tl.program_id(0).to(tl.int64) * ROWS
    cols = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    db = tl.zeros((1, BLOCK_N), tl.float32)
    if bias_ptr is not None:
        b = tl.load(bias_ptr + cols, mask=cols < N, other=0.0).to(tl.float32)

    for start in range(0, ROWS, BLOCK_M):
        rows = first + start + tl.arange(0, BLOCK_M)[:, None]
        mask = (rows < M) & (cols < N)
        z = tl.load(x_ptr + rows * stride_xm + cols, mask=mask, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + rows * stride_dym + cols, mask=mask, other=0.0).to(tl.float32)
        if bias_ptr is not None:
            z += b
        u = SQRT_2_OVER_PI * (z + CUBIC * z * z * z)
        s = tl.sigmoid(2 * u)
        dx = dy * (s + z * s * (1 - s) * (2 * SQRT_2_OVER_PI * (1 + 3 * CUBIC * z * z)))
        tl.store(dx_ptr + rows * N + cols, dx.to(dx_ptr.dtype.element_ty), mask=mask)
        if bias_ptr is not None:
            # masked elements have dy = 0, so add 0
            db += tl.sum(dx, axis=0)[None, :]

    if bias_ptr is not None:
        tl.store(partial_ptr + tl.program_id(0).to(tl.int64) * N + cols, db, mask=cols < N)


def _config(x: Tensor) -> dict[str, int]:
    """BLOCK_M, BLOCK_N and num_warps for the rows of x, (M, N).

    | N             | tile, 16 bits | 32 bits   | warps | because                                |
    |---------------|---------------|-----------|-------|----------------------------------------|
    | 1024 and more | 4 x 1024      | 2 x 1024  | 4     | a thread loads 16 bytes of a row       |
    | less          | 4096 / N'     | 2048 / N' | 4     | N' is the next power of two            |

    With 4 x 1024 values of 32 bits the backward spills on sm_100 with Triton 3.8.
    """
    block = min(triton.next_power_of_2(x.size(1)), 1024)
    tile = TILE // x.element_size()
    return {"BLOCK_M": tile // block, "BLOCK_N": block, "num_warps": 4, **FUSED}


def _rows(x: Tensor) -> Tensor:
    """(..., N) -> (M, N) with stride 1 along N: a view where possible, else a copy."""
    rows = x.reshape(-1, x.size(-1))
    return rows if rows.stride(1) == 1 else rows.contiguous()


def _gelu_fwd(x: Tensor, bias: Tensor | None) -> Tensor:
    y = x.new_empty(x.shape)
    if x.numel():
        rows = _rows(x)
        M, N = rows.shape
        bias = None if bias is None else bias.contiguous()
        config = _config(rows)
        grid = (triton.cdiv(M, config["BLOCK_M"]), triton.cdiv(N, config["BLOCK_N"]))
        with torch.cuda.device_of(x):
            _gelu_fwd_kernel[grid](rows, bias, y, rows.stride(0), M, N, **config)
    return y


def _gelu_bwd(dy: Tensor, x: Tensor, bias: Tensor | None) -> list[Tensor]:
    """Return [dx], or [dx, db] with a bias."""
    dx = x.new_empty(x.shape)
    if not x.numel():
        return [dx] if bias is None else [dx, torch.zeros_like(bias)]
    rows, dy_rows = _rows(x), _rows(dy)
    M, N = rows.shape
    config = _config(rows)
    per_program = max(ROWS, config["BLOCK_M"])
    P = triton.cdiv(M, per_program)
    partial = x.new_empty((0 if bias is None else P, N), dtype=torch.float32)
    with torch.cuda.device_of(x):
        _gelu_bwd_kernel[(P, triton.cdiv(N, config["BLOCK_N"]))](
            dy_rows,
            rows,
            None if bias is None else bias.contiguous(),
            dx,
            partial,
            dy_rows.stride(0),
            rows.stride(0),
            M,
            N,
            ROWS=per_program,
            **config,
        )
    return [dx] if bias is None else [dx, partial.sum(dim=0).to(bias.dtype)]


# save x and the bias, not z = x + bias or y: x already exists where a matrix product made it
_forward_op = torch.library.custom_op("nanogpt2::gelu_fwd", _gelu_fwd, mutates_args=())
_backward_op = torch.library.custom_op("nanogpt2::gelu_bwd", _gelu_bwd, mutates_args=())


@_forward_op.register_fake
def _(x: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(x.shape)


@_backward_op.register_fake
def _(dy: Tensor, x: Tensor, bias: Tensor | None) -> list[Tensor]:
    dx = x.new_empty(x.shape)
    return [dx] if bias is None else [dx, bias.new_empty(bias.shape)]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, bias = ctx.saved_tensors
    dx, *db = _backward_op(dy, x, bias)
    return dx, db[0] if db else None


_forward_op.register_autograd(_backward, setup_context=_setup_context)


def gelu(x: Tensor) -> Tensor:
    """0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))).

    x: any shape, in float32, float16 or bfloat16. -> the shape and dtype of x, contiguous. Raises
    ValueError for other arguments.
    """
    _check("x", x)
    return _forward_op(x, None) if x.dim() else _forward_op(x[None], None)[0]


def bias_gelu(x: Tensor, bias: Tensor) -> Tensor:
    """gelu(x + bias), summed in fp32. x: (..., N); bias: (N,), on x's device."""
    _check("x", x)
    _check("bias", bias)
    if x.dim() == 0 or bias.shape != x.shape[-1:]:
        raise ValueError(f"bias must be {tuple(x.shape[-1:])} as x ends, not {tuple(bias.shape)}")
    if bias.device != x.device:
        raise ValueError(f"bias must be on {x.device} as x is, not on {bias.device}")
    return _forward_op(x, bias)


def _check(name: str, x: Tensor) -> None:
    if x.dtype not in DTYPES:
        raise ValueError(f"{name} must be float32, float16 or bfloat16, not {x.dtype}")
    if not (x.is_cuda or INTERPRETED):
        raise ValueError(f"{name} must be on a CUDA device, not on {x.device}")
