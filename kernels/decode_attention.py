"""Attention of one or a few new tokens over a cache of keys and values: flash-decoding.

For a new token of batch row r at position i, over the cached positions t from start[r] to i; the
base is 2, as the hardware's exponential:
    s_t = q . k_t * scale * log2(e)     m = max_t s_t     l = sum_t 2^(s_t - m)
    o = sum_t 2^(s_t - m) v_t / l       lse = m + log2(l)
One program a head would leave most of a GPU idle, so the positions are split. Each program does
the above for its share, and a second kernel joins the shares exactly:
    o = sum_s w_s o_s / sum_s w_s       w_s = 2^(lse_s - max_s lse_s)

`ancestors` names the cache row that holds position t of row r: k_t is k_cache[ancestors[r, t]] at
t. The beams of one prompt thus share its cache rows. A beam that continues another beam copies a
row of the table instead of a row of the cache.

Traffic: 2 D elements a position and head, read once; each share adds 4 (D + 1) bytes, written and
read. One row of GPT-2's 12 heads at 1024 positions in bf16: 3.1 MB a layer. The kernel is
memory-bound. The products run on tensor cores because 16 queries cost as much there as one.

No backward: nobody trains through a cache. This file does not know who fills the cache.
Source: Dao et al., Flash-Decoding for long-context inference (2023).
"""

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

HEAD_SIZES = (16, 32, 64, 128)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# new tokens a row: the smallest tile of tl.dot holds 16
MAX_TOKENS = 16
# True under Triton's interpreter, which runs on tensors in main memory
INTERPRETED = triton.knobs.runtime.interpret
# set explicitly: Triton 3.10 changed the default
FUSED = {"enable_fp_fusion": True}

# bytes an element -> (BLOCK_N positions, num_warps, num_stages): enough loads in flight, 16 bytes a
# thread each, to hide memory latency. Not timed yet
CONFIG = {2: (64, 4, 3), 4: (32, 4, 3)}
# fewer positions than this do not pay for the second kernel
LEAST_TO_SPLIT = 256
LEAST_SHARE = 128
# the second kernel holds all the shares at once
MAX_SPLITS = 128


def decode_attention_ref(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    scale: float | None = None,
    *,
    start: Tensor | None = None,
    ancestors: Tensor | None = None,
) -> Tensor:
    """`decode_attention` in fp32 by PyTorch, from a gathered copy of the cache."""
    R, _, T, D = q.shape
    t = torch.arange(k_cache.shape[2], device=q.device)
    rows = torch.arange(R, device=q.device)[:, None] if ancestors is None else ancestors.long()
    # unseen entries may hold anything, so look up row 0 there
    rows = torch.where(t < lengths[:, None], rows, 0)  # (R, S)
    k, v = (x[rows, :, t].transpose(1, 2).float() for x in (k_cache, v_cache))  # (R, H, S, D)
    position = lengths[:, None] - T + torch.arange(T, device=q.device)  # (R, T)
    seen = t <= position[:, :, None]  # (R, T, S)
    if start is not None:
        seen &= t >= start[:, None, None]
    seen = seen[:, None]  # (R, 1, T, S)
    scores = q.float() @ k.transpose(-1, -2) * (D**-0.5 if scale is None else scale)
    p = scores.masked_fill(~seen, -math.inf).softmax(dim=-1)
    # a token that sees no position is 0 / 0 = NaN here
    p = torch.where(seen, p, 0.0)
    return p @ torch.where(seen.any(dim=2)[..., None], v, 0.0)


@triton.jit
def _decode_attention_kernel(
    q_ptr,  # (R, H, T, D)
    k_ptr, v_ptr,  # (cache rows, H, S, D)
    o_ptr,  # (SPLITS, R, H, T, D)
    lse_ptr,  # (SPLITS, R, H, T) fp32, base 2
    lengths_ptr, start_ptr,  # (R,) int
    ancestors_ptr,  # (R, S) int
    stride_qr, stride_qh, stride_qt,
    stride_kr, stride_kh, stride_kt,
    stride_vr, stride_vh, stride_vt,
    stride_os, stride_or, stride_oh, stride_ot,
    stride_ar, stride_at,
    R, H, T, S, scale,
    SPLITS: tl.constexpr, HAS_START: tl.constexpr, HAS_ANCESTORS: tl.constexpr,
    D: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    split = (tl.program_id(0) % SPLITS).to(tl.int64)
    r = (tl.program_id(0) // SPLITS // H).to(tl.int64)
    h = (tl.program_id(0) // SPLITS % H).to(tl.int64)
    tokens = tl.arange(0, BLOCK_T)
    dims = tl.arange(0, D)[None, :]
    real = tokens < T

    # this program's share of positions [first, length): as many whole blocks as every other's
    length = tl.minimum(tl.load(lengths_ptr + r), S).to(tl.int32)
    first = 0
    if HAS_START:
        first = tl.minimum(tl.maximum(tl.load(start_ptr + r), 0), S).to(tl.int32)
    share = tl.cdiv(tl.maximum(length - first, 0), SPLITS * BLOCK_N) * BLOCK_N
    lo = first + split.to(tl.int32) * share
    hi = tl.minimum(lo + share, length)
    position = length - T + tokens

    q_ptrs = q_ptr + r * stride_qr + h * stride_qh + tokens[:, None] * stride_qt + dims
    q = tl.load(q_ptrs, mask=real[:, None], other=0.0)
    acc = tl.zeros([BLOCK_T, D], dtype=tl.float32)
    l_i = tl.zeros([BLOCK_T], dtype=tl.float32)
    m_i = tl.full([BLOCK_T], float("-inf"), dtype=tl.float32)
    scale_log2 = scale * 1.4426950408889634
    for start_n in tl.range(lo, hi, BLOCK_N):
        t = start_n + tl.arange(0, BLOCK_N)
        inside = t < hi
        offsets = t.to(tl.int64)
        row = r
        if HAS_ANCESTORS:
            at = ancestors_ptr + r * stride_ar + offsets * stride_at
            row = tl.load(at, mask=inside, other=0).to(tl.int64)
        k_at = row * stride_kr + h * stride_kh + offsets * stride_kt
        v_at = row * stride_vr + h * stride_vh + offsets * stride_vt
        k = tl.load(k_ptr + k_at[:, None] + dims, mask=inside[:, None], other=0.0)
        v = tl.load(v_ptr + v_at[:, None] + dims, mask=inside[:, None], other=0.0)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION)  # (BLOCK_T, BLOCK_N)
        s = tl.where(t[None, :] <= position[:, None], s, float("-inf"))
        m_new = tl.maximum(m_i, tl.max(s, axis=1) * scale_log2)
        # a token that has seen no position yet would get -inf - -inf = nan
        m_base = tl.where(m_new == float("-inf"), 0.0, m_new)
        alpha = tl.exp2(m_i - m_base)
        p = tl.exp2(s * scale_log2 - m_base[:, None])
        l_i = l_i * alpha + tl.sum(p, axis=1)
        acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision=PRECISION)
        m_i = m_new

    # an empty share: o = 0 / 1, and lse = -inf gives it no weight
    l_i = tl.where(l_i == 0.0, 1.0, l_i)
    o_ptrs = o_ptr + split * stride_os + r * stride_or + h * stride_oh
    o_ptrs += tokens[:, None] * stride_ot + dims
    tl.store(o_ptrs, (acc / l_i[:, None]).to(o_ptr.dtype.element_ty), mask=real[:, None])
    if SPLITS > 1:
        lse = m_i + tl.log2(l_i)
        tl.store(lse_ptr + ((split * R + r) * H + h) * T + tokens, lse, mask=real)


@triton.jit
def _decode_attention_join_kernel(
    shares_ptr,  # (SPLITS, R, H, T, D) fp32, contiguous
    lse_ptr,  # (SPLITS, R, H, T) fp32
    o_ptr,  # (R, H, T, D)
    stride_or, stride_oh, stride_ot,
    R, H, T,
    SPLITS: tl.constexpr, BLOCK_S: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    # one program for one token of one head
    i = tl.program_id(0).to(tl.int64)
    r, h, t = i // T // H, i // T % H, i % T
    splits = tl.arange(0, BLOCK_S)
    dims = tl.arange(0, D)
    real = splits < SPLITS
    at = splits.to(tl.int64) * R * H * T + i

    lse = tl.load(lse_ptr + at, mask=real, other=float("-inf"))
    shares = tl.load(shares_ptr + at[:, None] * D + dims[None, :], mask=real[:, None], other=0.0)
    m = tl.max(lse, axis=0)
    # m is -inf if no share saw a position: then every weight is 0
    w = tl.exp2(lse - tl.where(m == float("-inf"), 0.0, m))
    total = tl.sum(w, axis=0)
    o = tl.sum(w[:, None] * shares, axis=0) / tl.where(total == 0.0, 1.0, total)
    o_ptrs = o_ptr + r * stride_or + h * stride_oh + t * stride_ot + dims
    tl.store(o_ptrs, o.to(o_ptr.dtype.element_ty))


def _splits(q: Tensor, S: int) -> int:
    """Number of shares for S positions: two programs an SM, unless shares would get too short."""
    if S <= LEAST_TO_SPLIT:
        return 1
    properties = torch.cuda.get_device_properties(q.device) if q.is_cuda else None
    processors = properties.multi_processor_count if properties else 1
    wanted = 2 * processors // (q.shape[0] * q.shape[1])
    return max(1, min(wanted, S // LEAST_SHARE, MAX_SPLITS))


def _decode_attention_fwd(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, o: Tensor, lengths: Tensor,
    start: Tensor | None, ancestors: Tensor | None, scale: float, splits: int,
) -> None:  # fmt: skip
    """Fill o (R, H, T, D)."""
    R, H, T, D = q.shape
    shares, lse = o[None], None
    if splits > 1:
        shares = torch.empty(splits, R, H, T, D, dtype=torch.float32, device=q.device)
        lse = torch.empty(splits, R, H, T, dtype=torch.float32, device=q.device)
    BLOCK_N, num_warps, num_stages = CONFIG[q.element_size()]
    # TF32 tensor cores compute an fp32 product as three TF32 products, within about 2^-21
    split_fp32 = q.dtype == torch.float32 and torch.version.hip is None
    with torch.cuda.device_of(q):
        _decode_attention_kernel[(R * H * splits,)](
            *(q, k_cache, v_cache, shares, lse, lengths, start, ancestors),
            *q.stride()[:3],
            *k_cache.stride()[:3],
            *v_cache.stride()[:3],
            *shares.stride()[:4],
            *(ancestors.stride() if ancestors is not None else (0, 0)),
            *(R, H, T, k_cache.shape[2], scale),
            SPLITS=splits,
            HAS_START=start is not None,
            HAS_ANCESTORS=ancestors is not None,
            D=D,
            BLOCK_T=MAX_TOKENS,
            BLOCK_N=BLOCK_N,
            PRECISION="tf32x3" if split_fp32 else "ieee",
            num_warps=num_warps,
            num_stages=num_stages if torch.version.hip is None else 1,
            **FUSED,
        )
        if splits > 1:
            _decode_attention_join_kernel[(R * H * T,)](
                *(shares, lse, o, *o.stride()[:3], R, H, T),
                SPLITS=splits,
                BLOCK_S=triton.next_power_of_2(splits),
                D=D,
                **FUSED,
            )


def _rows_contiguous(x: Tensor) -> Tensor:
    """Copy x unless its stride along D is 1; the kernels take any other strides."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _empty_like(q: Tensor) -> Tensor:
    """Return an empty (R, H, T, D) laid out as (R, T, H, D): heads join into C without a copy."""
    R, H, T, D = q.shape
    return q.new_empty(R, T, H, D).transpose(1, 2)


@torch.library.custom_op("nanogpt2::decode_attention", mutates_args=())
def _decode_attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor, start: Tensor | None,
    ancestors: Tensor | None, scale: float, splits: int | None,
) -> Tensor:  # fmt: skip
    q, k_cache, v_cache = map(_rows_contiguous, (q, k_cache, v_cache))
    o = _empty_like(q)
    splits = _splits(q, k_cache.shape[2]) if splits is None else splits
    _decode_attention_fwd(q, k_cache, v_cache, o, lengths, start, ancestors, scale, splits)
    return o


@_decode_attention.register_fake
def _(q: Tensor, *_: object) -> Tensor:
    return _empty_like(q)


def decode_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    scale: float | None = None,
    *,
    start: Tensor | None = None,
    ancestors: Tensor | None = None,
    splits: int | None = None,
    trusted: bool = False,
) -> Tensor:
    """softmax(q k^T * scale) v for the last T positions of each row, which the cache already holds.

    q: (R, H, T, D) in fp32, fp16 or bf16, T up to 16, D in 16, 32, 64, 128. k_cache, v_cache:
    (cache rows, H, S, D), any strides. lengths, integers (R,): row r has positions 0 to
    lengths[r] - 1 in the cache, its T new ones included. `start`, integers (R,), is each row's
    first position after the padding. `scale` defaults to 1 / sqrt(D). `ancestors`, integers (R, S),
    names the cache row that holds position t of row r, by default row r; entries from lengths[r] on
    are not read. `splits` defaults to a number chosen by the size. By default the call checks that
    lengths and ancestors lie inside the cache, which waits for the device. With `trusted` only the
    device reads these tensors, so a CUDA graph follows their changes.
    -> (R, H, T, D), laid out as (R, T, H, D). Has no gradient. Raises ValueError for other
    arguments.
    """
    _check(q, k_cache, v_cache, lengths, start, ancestors)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if not 0 < scale < math.inf:
        raise ValueError(f"scale must be positive and finite, not {scale}")
    if splits is not None and not 1 <= splits <= MAX_SPLITS:
        raise ValueError(f"splits must be 1 to {MAX_SPLITS}, not {splits}")
    if not trusted:
        _check_places(k_cache, lengths, ancestors)
    return _decode_attention(q, k_cache, v_cache, lengths, start, ancestors, scale, splits)


def _check(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor, start: Tensor | None,
    ancestors: Tensor | None,
) -> None:  # fmt: skip
    """Raise ValueError for tensors that the kernels do not support."""
    if q.dtype not in DTYPES:
        raise ValueError(f"q must be float32, float16 or bfloat16, not {q.dtype}")
    if not (q.is_cuda or (INTERPRETED and q.is_cpu)):
        raise ValueError(f"q must be on a CUDA device, not on {q.device}")
    if q.dim() != 4 or 0 in q.shape or q.shape[2] > MAX_TOKENS or q.shape[-1] not in HEAD_SIZES:
        allowed = f"(R, H, T, D) with T up to {MAX_TOKENS} and D in {HEAD_SIZES}"
        raise ValueError(f"q must be {allowed}, not {[*q.shape]}")
    R, H, _, D = q.shape
    cache_rows = R if ancestors is None else k_cache.shape[0]
    S = k_cache.shape[2] if k_cache.dim() == 4 else 0
    for name, x in (("k_cache", k_cache), ("v_cache", v_cache)):
        if S == 0 or cache_rows == 0 or x.shape != (cache_rows, H, S, D):
            rows = "R" if ancestors is None else "cache rows"
            raise ValueError(f"{name} must be ({rows}, H, S, D) to q's {[*q.shape]}")
        if x.dtype != q.dtype or x.device != q.device:
            raise ValueError(f"{name} must have the dtype and device of q")
    tables: list[Any] = [("lengths", lengths, (R,)), ("start", start, (R,))]
    for name, x, shape in [*tables, ("ancestors", ancestors, (R, S))]:
        if x is not None and (
            x.shape != shape
            or x.dtype not in (torch.int32, torch.int64)
            or x.device != q.device
            or (x.dim() == 1 and not x.is_contiguous())
        ):
            raise ValueError(f"{name} must be int32 or int64 {shape} on the device of q")


def _check_places(k_cache: Tensor, lengths: Tensor, ancestors: Tensor | None) -> None:
    """Raise ValueError for positions outside the cache."""
    rows, _, S, _ = k_cache.shape
    if (longest := int(lengths.max())) > S:
        raise ValueError(f"lengths must be up to {S}, the cache's positions, not {longest}")
    if ancestors is None:
        return
    is_read = torch.arange(S, device=lengths.device) < lengths[:, None]
    least, most = (int(x) for x in ancestors.where(is_read, 0).aminmax())
    if least < 0 or most >= rows:
        wrong = least if least < 0 else most
        raise ValueError(f"ancestors must be rows of the cache, 0 to {rows - 1}, not {wrong}")
