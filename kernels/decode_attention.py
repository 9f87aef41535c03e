"""Attention of one or a few new tokens over a cache of keys and values: flash-decoding.

For a new token of batch row r at position i, over the cached positions t from start[r] to i; the
base is 2, as the hardware's exponential:
    s_t = q . k_t * scale * log2(e)     m = max_t s_t     l = sum_t 2^(s_t - m)
    o = sum_t 2^(s_t - m) v_t / l       lse = m + log2(l)
One program a head would leave most of a GPU idle, so the positions are split. Each program does
the above for its share, and a second kernel joins the shares exactly:
    o = sum_s w_s o_s / sum_s w_s       w_s = 2^(lse_s - max_s lse_s)

A decoding step is one token a row: `decode_step` takes c_attn's output, writes the new key and
value into the cache and attends, in one launch. Its last program to finish joins the shares,
always in the same order. Programs count themselves in `arrived`, which the last one sets back to 0.
No program waits for another. One query is too little for tensor cores: each of BLOCK_N slots keeps
m, l and its sum for every BLOCK_N-th position, and the slots are joined once, after the loop.

`ancestors` names the cache row that holds position t of row r: k_t is k_cache[ancestors[r, t]] at
t. The beams of one prompt thus share its cache rows. A beam that continues another beam copies a
row of the table instead of a row of the cache.

Traffic: 2 D elements a position and head, read once; each share adds 4 (D + 1) bytes, written and
read. One row of GPT-2's 12 heads at 1024 positions in bf16: 3.1 MB a layer. The kernel is
memory-bound. The products of `decode_attention` run on tensor cores because 16 queries cost as much
there as one.

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

# a step: each thread loads 32 bytes of keys and of values, and the next block's as well
STEP_BYTES, STEP_WARPS = 4096, 4
# two such blocks at D = 64 in 16 bits: a share requests all at once
STEP_SHARE = 64
MAX_STEP_SPLITS = 64


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


def decode_step_ref(
    qkv: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    *,
    start: Tensor | None = None,
    ancestors: Tensor | None = None,
) -> Tensor:
    """`decode_step`, no row being full, by an assignment and decode_attention_ref."""
    R, (_, H, S, D) = len(qkv), k_cache.shape
    rows, places = torch.arange(R, device=qkv.device), lengths.long()
    q, k, v = qkv.view(R, 3, H, 1, D).unbind(1)  # each (R, H, 1, D)
    k_cache[rows, :, places], v_cache[rows, :, places] = k[:, :, 0], v[:, :, 0]
    if ancestors is None:
        ancestors = rows[:, None].repeat(1, S)
    own = torch.arange(S, device=qkv.device) == places[:, None]
    ancestors = torch.where(own, rows[:, None], ancestors)
    inputs = (q, k_cache, v_cache, lengths + 1)
    return decode_attention_ref(*inputs, start=start, ancestors=ancestors).view(R, H * D)


# one kernel for caches and batches of any size
@triton.jit(do_not_specialize=["R", "T", "S", "stride_ar", "stride_at"])
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


@triton.jit(do_not_specialize=["R", "T"])
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


@triton.jit
def _load_rows(ancestors_ptr, t, hi, r, stride_at):
    # the cache row of each position t below hi
    if ancestors_ptr is None:
        rows = r
    else:
        at = ancestors_ptr + t.to(tl.int64) * stride_at
        rows = tl.load(at, mask=t < hi, other=0).to(tl.int64)[:, None]
    return rows


@triton.jit
def _load_block(ptr, row, t, hi, dims, stride_r, stride_t):
    # (BLOCK_N, D): positions t of the cache rows `row`
    at = ptr + row * stride_r + t.to(tl.int64)[:, None] * stride_t + dims[None, :]
    return tl.load(at, mask=(t < hi)[:, None], other=0.0)


# one kernel for caches and batches of any size
@triton.jit(do_not_specialize=["S", "stride_ar", "stride_at"])
def _decode_step_kernel(
    qkv_ptr,  # (R, 3, H, D), stride 1 along all but R
    k_ptr, v_ptr,  # (cache rows, H, S, D)
    o_ptr,  # (R, H, D), contiguous
    shares_ptr,  # (R, H, SPLITS, D) fp32, or None
    lse_ptr,  # (R, H, SPLITS) fp32, base 2
    lengths_ptr, start_ptr,  # (R,) int; start may be None
    ancestors_ptr,  # (R, S) int, or None
    arrived_ptr,  # (R * H,) int32, all 0
    stride_qr,
    stride_kr, stride_kh, stride_kt,
    stride_vr, stride_vh, stride_vt,
    stride_ar, stride_at,
    H, S, scale,
    SPLITS: tl.constexpr, D: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    split, head = tl.program_id(0) % SPLITS, tl.program_id(0) // SPLITS
    r, h = (head // H).to(tl.int64), (head % H).to(tl.int64)
    dims = tl.arange(0, D)
    length = tl.minimum(tl.maximum(tl.load(lengths_ptr + r), 0), S).to(tl.int32)
    first = 0
    if start_ptr is not None:
        first = tl.minimum(tl.maximum(tl.load(start_ptr + r), 0), length).to(tl.int32)
    share = tl.cdiv(length - first, SPLITS * BLOCK_N) * BLOCK_N
    lo = first + split * share
    hi = tl.minimum(lo + share, length)
    k_ptr += h * stride_kh
    v_ptr += h * stride_vh
    table = ancestors_ptr
    if ancestors_ptr is not None:
        table += r * stride_ar

    # the table is read two blocks ahead, keys and values one
    t = lo + tl.arange(0, BLOCK_N)
    row = _load_rows(table, t, hi, r, stride_at)
    k = _load_block(k_ptr, row, t, hi, dims, stride_kr, stride_kt)
    v = _load_block(v_ptr, row, t, hi, dims, stride_vr, stride_vt)
    row = _load_rows(table, t + BLOCK_N, hi, r, stride_at)
    own = qkv_ptr + r * stride_qr + h * D + dims
    q = tl.load(own).to(tl.float32) * (scale * 1.4426950408889634)
    k_own, v_own = tl.load(own + H * D), tl.load(own + 2 * H * D)

    m_i = tl.full([BLOCK_N], float("-inf"), dtype=tl.float32)
    l_i = tl.zeros([BLOCK_N], dtype=tl.float32)
    acc = tl.zeros([BLOCK_N, D], dtype=tl.float32)
    for _ in range(lo, hi, BLOCK_N):
        ahead = t + BLOCK_N
        k_next = _load_block(k_ptr, row, ahead, hi, dims, stride_kr, stride_kt)
        v_next = _load_block(v_ptr, row, ahead, hi, dims, stride_vr, stride_vt)
        row = _load_rows(table, ahead + BLOCK_N, hi, r, stride_at)
        s = tl.where(t < hi, tl.sum(q[None, :] * k.to(tl.float32), axis=1), float("-inf"))
        m_new = tl.maximum(m_i, s)
        # a slot that has seen no position yet would get -inf - -inf = nan
        m_base = tl.where(m_new == float("-inf"), 0.0, m_new)
        alpha, p = tl.exp2(m_i - m_base), tl.exp2(s - m_base)
        l_i = l_i * alpha + p
        acc = acc * alpha[:, None] + p[:, None] * v.to(tl.float32)
        m_i, t, k, v = m_new, ahead, k_next, v_next

    # join the slots; the new token belongs to the first share, which is thus never empty
    s_own = tl.where(split == 0, tl.sum(q * k_own.to(tl.float32), axis=0), float("-inf"))
    m = tl.maximum(tl.max(m_i, axis=0), s_own)
    m_base = tl.where(m == float("-inf"), 0.0, m)
    w, w_own = tl.exp2(m_i - m_base), tl.exp2(s_own - m_base)
    l_all = tl.sum(l_i * w, axis=0) + w_own
    o = tl.sum(acc * w[:, None], axis=0) + w_own * v_own.to(tl.float32)
    o = o / tl.where(l_all == 0.0, 1.0, l_all)
    at = r * stride_kr + tl.load(lengths_ptr + r).to(tl.int64) * stride_kt + dims
    writes = (split == 0) & (tl.load(lengths_ptr + r) == length) & (length < S)
    tl.store(k_ptr + at, k_own, mask=writes)
    at = r * stride_vr + tl.load(lengths_ptr + r).to(tl.int64) * stride_vt + dims
    tl.store(v_ptr + at, v_own, mask=writes)

    done = True
    if SPLITS > 1:
        part = head.to(tl.int64) * SPLITS
        tl.store(shares_ptr + (part + split) * D + dims, o)
        tl.store(lse_ptr + part + split, m + tl.log2(tl.where(l_all == 0.0, 1.0, l_all)))
        # all threads' stores come before the count, which publishes them
        tl.debug_barrier()
        done = tl.atomic_add(arrived_ptr + head, 1, sem="acq_rel") == SPLITS - 1
        if done:
            tl.store(arrived_ptr + head, 0)
            splits = tl.arange(0, SPLITS)
            lse = tl.load(lse_ptr + part + splits)
            shares = tl.load(shares_ptr + (part + splits)[:, None] * D + dims[None, :])
            # the first share's lse is finite
            w_s = tl.exp2(lse - tl.max(lse, axis=0))
            o = tl.sum(w_s[:, None] * shares, axis=0) / tl.sum(w_s, axis=0)
    if done:
        tl.store(o_ptr + (r * H + h) * D + dims, o.to(o_ptr.dtype.element_ty))


def _splits(q: Tensor, S: int) -> int:
    """Number of shares for S positions: two programs an SM, unless shares would get too short.

    A power of two, so that few kernels are compiled for all lengths and batches.
    """
    if S <= LEAST_TO_SPLIT:
        return 1
    properties = torch.cuda.get_device_properties(q.device) if q.is_cuda else None
    processors = properties.multi_processor_count if properties else 1
    wanted = 2 * processors // (q.shape[0] * q.shape[1])
    return _power_of_two(min(wanted, S // LEAST_SHARE, MAX_SPLITS))


def _power_of_two(most: int) -> int:
    """Return the largest power of two up to `most`, at least 1."""
    return 1 << (max(most, 1).bit_length() - 1)


def step_splits(rows: int, n_head: int, positions: int, processors: int) -> int:
    """Return the `splits` of decode_step for a cache filled up to `positions`, on so many SMs.

    Two programs an SM, unless shares would get too short.
    """
    wanted = 2 * processors // (rows * n_head)
    return _power_of_two(min(wanted, positions // STEP_SHARE, MAX_STEP_SPLITS))


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


def _decode_step_fwd(
    qkv: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor, start: Tensor | None,
    ancestors: Tensor | None, splits: int, arrived: Tensor | None,
) -> Tensor:  # fmt: skip
    """Return o (R, C)."""
    R, (_, H, S, D) = len(qkv), k_cache.shape
    qkv = qkv if qkv.stride(1) == 1 else qkv.contiguous()
    o = qkv.new_empty(R, H * D)
    shares, lse = None, None
    if splits > 1:
        shares = qkv.new_empty(R, H, splits, D, dtype=torch.float32)
        lse = qkv.new_empty(R, H, splits, dtype=torch.float32)
        if arrived is None:
            arrived = torch.zeros(R * H, dtype=torch.int32, device=qkv.device)
    with torch.cuda.device_of(qkv):
        _decode_step_kernel[(R * H * splits,)](
            *(qkv, k_cache, v_cache, o, shares, lse, lengths, start, ancestors),
            *(arrived if splits > 1 else None, qkv.stride(0)),
            *k_cache.stride()[:3],
            *v_cache.stride()[:3],
            *(ancestors.stride() if ancestors is not None else (0, 0)),
            *(H, S, D**-0.5),
            SPLITS=splits,
            D=D,
            BLOCK_N=STEP_BYTES // (D * qkv.element_size()),
            num_warps=STEP_WARPS,
            **FUSED,
        )
    return o


def _rows_contiguous(x: Tensor) -> Tensor:
    """Copy x unless its stride along D is 1; the kernels take any other strides."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _empty_like(q: Tensor) -> Tensor:
    """Return an empty (R, H, T, D) laid out as (R, T, H, D): heads join into C without a copy."""
    R, H, T, D = q.shape
    return q.new_empty(R, T, H, D).transpose(1, 2)


def _decode_attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor, start: Tensor | None,
    ancestors: Tensor | None, scale: float, splits: int | None,
) -> Tensor:  # fmt: skip
    q, k_cache, v_cache = map(_rows_contiguous, (q, k_cache, v_cache))
    o = _empty_like(q)
    splits = _splits(q, k_cache.shape[2]) if splits is None else splits
    _decode_attention_fwd(q, k_cache, v_cache, o, lengths, start, ancestors, scale, splits)
    return o


_attention_op = torch.library.custom_op(
    "nanogpt2::decode_attention", _decode_attention, mutates_args=()
)
# `arrived` is 0 before and after, so it does not count as written to
_step_op = torch.library.custom_op(
    "nanogpt2::decode_step", _decode_step_fwd, mutates_args=("k_cache", "v_cache")
)


@_attention_op.register_fake
def _(q: Tensor, *_: object) -> Tensor:
    return _empty_like(q)


@_step_op.register_fake
def _(qkv: Tensor, *_: object) -> Tensor:
    return qkv.new_empty(len(qkv), qkv.size(1) // 3)


def _is_recorded() -> bool:
    """Whether something records the operations: torch.compile, or a dispatch mode.

    Else the launcher is called directly: the dispatcher costs as much host time as three launches.
    """
    return torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0


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
    call = _attention_op if _is_recorded() else _decode_attention
    return call(q, k_cache, v_cache, lengths, start, ancestors, scale, splits)


def decode_step(
    qkv: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    *,
    start: Tensor | None = None,
    ancestors: Tensor | None = None,
    splits: int = 1,
    arrived: Tensor | None = None,
) -> Tensor:
    """Write one new token a row into the cache, and attend from it to all positions up to itself.

    qkv: (R, 3C), the token's query, key and value, H heads each, in fp32, fp16 or bf16. k_cache,
    v_cache: (cache rows, H, S, D), stride 1 along D, D in 16, 32, 64, 128. lengths, integers (R,):
    the positions of row r that the cache held before; the token becomes position lengths[r] of
    cache row r. A full row is not written to. start, ancestors: as in decode_attention. splits: a
    power of two up to 64, of step_splits. arrived: int32 zeros, R H or more, which calls on one
    stream may share. They are 0 again after the call. Without them a call that splits makes its
    own, one launch more. Only the device reads lengths, start and ancestors; none is checked.
    -> (R, C). Has no gradient. Raises ValueError for other arguments.
    """
    if qkv.dim() != 2 or k_cache.dim() != 4 or qkv.size(1) != 3 * k_cache.size(1) * k_cache.size(3):
        shapes = f"{tuple(qkv.shape)} and {tuple(k_cache.shape)}"
        raise ValueError(
            f"qkv and k_cache must be (R, 3 H D) and (cache rows, H, S, D), not {shapes}"
        )
    R, (rows, H, _, D) = len(qkv), k_cache.shape
    # row r writes to cache row r, so there are as many at least
    q = qkv[:, : H * D].view(R, H, 1, D)
    _check(q, k_cache, v_cache, lengths, start, ancestors)
    if rows < R or 1 not in (k_cache.stride(3), D) or v_cache.stride(3) != k_cache.stride(3):
        raise ValueError(f"k_cache and v_cache must have {R} rows or more and stride 1 along D")
    if splits not in (1, 2, 4, 8, 16, 32, MAX_STEP_SPLITS):
        raise ValueError(f"splits must be a power of two up to {MAX_STEP_SPLITS}, not {splits}")
    if arrived is not None and (
        arrived.dtype != torch.int32
        or arrived.device != qkv.device
        or arrived.dim() != 1
        or len(arrived) < R * H
    ):
        raise ValueError(f"arrived must be int32 ({R * H},) or more on {qkv.device}")
    call = _step_op if _is_recorded() else _decode_step_fwd
    return call(qkv, k_cache, v_cache, lengths, start, ancestors, splits, arrived)


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
