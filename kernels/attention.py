"""Flash attention: softmax(q k^T * scale) v without the T x T matrix, forward and backward.

Forward, for one query row i; s and p are rows of the T x T matrices. The base is 2 because the
hardware's exponential is exp2: scale * log2(e) folds into one multiply-add.
    s_j = q_i . k_j                      over the keys that row i may see
    m   = max_j s_j * scale * log2(e)    lse = m + log2(sum_j 2^(s_j * scale * log2(e) - m))
    p_j = 2^(s_j * scale * log2(e) - lse)
    o_i = sum_j keep_ij p_j v_j / (1 - dropout)
Keys come in blocks. A block that raises m to m' first multiplies the running sums by 2^(m - m').

Backward, from lse and the recomputed p (no T x T matrix is stored):
    delta_i = do_i . o_i
    dv_j = sum_i keep_ij p_ij do_i / (1 - dropout)
    dp_ij = keep_ij (do_i . v_j) / (1 - dropout)
    ds_ij = p_ij (dp_ij - delta_i)
    dk_j = scale sum_i ds_ij q_i         dq_i = scale sum_j ds_ij k_j
Each pair of blocks takes five matrix products (s, dv, dp, dk, dq). A program keeps one block of
keys, walks down the queries and adds its share of dq to an fp32 buffer by atomics. The order of the
atomics, and with it dq's last bits, may differ from run to run. `deterministic=True` gives the same
bits every time for seven products: the same walk computes dk and dv, and a second kernel, which
keeps a block of queries, computes dq.

Traffic, in elements of the input's type: forward reads q, k, v and writes o, 4 B H T D. Every block
of queries reads k and v again, from L2; T x T never leaves the chip. Work: 4 B H T^2 D
floating-point operations forward, half as many if causal, and 2.5 times as many backward.

keep_ij depends only on seed, b * H + h, i and j. Philox-4x32-10 with the seed as key and
(i, j // 4, b * H + h, 0) as counter gives the 32 bits of four neighbouring keys; backward draws the
same bits again. A row that sees no key (padding before its batch row's start) gives o = 0 and a
gradient of 0.

This file knows neither GPT-2 nor the cache. Sources: Dao et al., FlashAttention (2022) and
FlashAttention-2 (2023); Salmon et al., Parallel random numbers: as easy as 1, 2, 3 (2011).
"""

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

HEAD_SIZES = (16, 32, 64, 128)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# True under Triton's interpreter, which runs on tensors in main memory
INTERPRETED = triton.knobs.runtime.interpret
# set explicitly: Triton 3.10 changed the default
FUSED = {"enable_fp_fusion": True}

# (bytes an element, D) -> (BLOCK_M queries, BLOCK_N keys, num_warps, num_stages). GPT-2's D = 64
# spills no register, as tests/kernel_table.py shows; other D may spill a few bytes. Not timed yet
FORWARD = {
    # D = 64: one warpgroup a program and room for two programs on an SM, which share no barrier:
    # one exponentiates while the other multiplies
    (2, 16): (128, 64, 8, 3),
    (2, 32): (128, 64, 8, 3),
    (2, 64): (64, 128, 4, 3),
    (2, 128): (128, 64, 8, 2),
    # small tiles: an fp32 operand is split in two and multiplied three times
    (4, 16): (32, 32, 8, 1),
    (4, 32): (32, 32, 8, 1),
    (4, 64): (32, 32, 8, 1),
    (4, 128): (32, 32, 8, 1),
}
BACKWARD = {
    # half of forward's queries: two tiles of scores and two accumulators are live at once
    (2, 16): (64, 64, 4, 2),
    (2, 32): (64, 64, 4, 2),
    (2, 64): (64, 64, 4, 3),
    (2, 128): (64, 32, 8, 2),
    (4, 16): (32, 32, 8, 1),
    (4, 32): (32, 16, 8, 1),
    (4, 64): (32, 32, 8, 1),
    (4, 128): (32, 16, 8, 1),
}


def attention_ref(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool = True,
    scale: float | None = None,
    start: Tensor | None = None,
    keep: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """`attention` in fp32 by PyTorch, with T x T matrices; `keep`: dropout's mask, (B, H, T, T)."""
    T, D = q.shape[-2:]
    q, k, v = q.float(), k.float(), v.float()
    scores = q @ k.transpose(-1, -2) * (D**-0.5 if scale is None else scale)  # (B, H, T, T)
    position = torch.arange(T, device=q.device)
    seen = torch.ones(T, T, dtype=torch.bool, device=q.device)
    if causal:
        seen = position[:, None] >= position[None, :]
    if start is not None:
        seen = seen & (position >= start[:, None, None, None])  # (B, 1, T, T)
    p = scores.masked_fill(~seen, -math.inf).softmax(dim=-1)
    # a row that sees no key is 0 / 0 = NaN here
    p = torch.where(seen, p, 0.0)
    if keep is not None:
        p = torch.where(keep, p, 0.0) / (1 - dropout)
    return p @ v


@triton.jit
def _keep_tile(
    seed,  # scalar, the Philox key
    head,  # scalar, b * H + h
    rows,  # (M,) queries
    start_n,  # scalar, first key of the tile
    keep_below,  # scalar, (1 - dropout) * 2^31
    BLOCK_N: tl.constexpr,
):
    fours = start_n // 4 + tl.arange(0, BLOCK_N // 4)
    a, b, c, d = tl.philox(seed, rows[:, None], fours[None, :], head, 0)
    a, b = (a >> 1).to(tl.int32) < keep_below, (b >> 1).to(tl.int32) < keep_below
    c, d = (c >> 1).to(tl.int32) < keep_below, (d >> 1).to(tl.int32) < keep_below
    # each join adds a last axis, so the order is a, b, c, d
    keep = tl.join(tl.join(a, c), tl.join(b, d))  # (M, BLOCK_N / 4, 2, 2)
    return tl.reshape(keep, (rows.shape[0], BLOCK_N))


@triton.jit
def _attention_fwd_blocks(
    acc, l_i, m_i,  # (M, D), (M,), (M,) so far
    q,  # (M, D)
    k_ptr, v_ptr, stride_kt, stride_vt,  # this head's (T, D)
    k_desc, v_desc, b, h,  # all heads' (B, H, T, D), or None; which head this is
    rows,  # (M,) queries
    lo, hi, first_key, T,  # walks keys [lo, hi); [first_key, T) exist
    scale_log2,
    seed, head, keep_below,
    CAUSAL: tl.constexpr, MASKED: tl.constexpr, PADDED: tl.constexpr, DROPOUT: tl.constexpr,
    BLOCK_N: tl.constexpr, D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    tile, dims = tl.arange(0, BLOCK_N)[:, None], tl.arange(0, D)[None, :]
    # step one address; the offsets of a tile from it stay the same and fit in 32 bits
    k_ptr += tl.cast(lo, tl.int64) * stride_kt
    v_ptr += tl.cast(lo, tl.int64) * stride_vt
    for start_n in tl.range(lo, hi, BLOCK_N):
        keys = start_n + tl.arange(0, BLOCK_N)
        real = keys < T
        if PADDED:
            real = real & (keys >= first_key)
        k_ptrs, v_ptrs = k_ptr + (tile * stride_kt + dims), v_ptr + (tile * stride_vt + dims)
        if k_desc is not None:
            # a descriptor gives 0 past the end
            k = tl.reshape(k_desc.load([b, start_n, h, 0]), (BLOCK_N, D))
            v = tl.reshape(v_desc.load([b, start_n, h, 0]), (BLOCK_N, D))
        elif MASKED:
            k = tl.load(k_ptrs, mask=real[:, None], other=0.0)
            v = tl.load(v_ptrs, mask=real[:, None], other=0.0)
        else:
            k, v = tl.load(k_ptrs), tl.load(v_ptrs)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION)  # (M, N)
        if MASKED:
            # a row of the text sees no key past the end where causal
            seen = rows[:, None] >= keys[None, :] if CAUSAL else real[None, :]
            if PADDED:
                seen = seen & (keys >= first_key)[None, :]
            s = tl.where(seen, s, float("-inf"))
        m_new = tl.maximum(m_i, tl.max(s, axis=1) * scale_log2)
        # a row that has seen no key yet would get -inf - -inf = nan
        m_base = tl.where(m_new == float("-inf"), 0.0, m_new)
        alpha = tl.exp2(m_i - m_base)
        p = tl.exp2(s * scale_log2 - m_base[:, None])
        l_i = l_i * alpha + tl.sum(p, axis=1)
        if DROPOUT:
            p = tl.where(_keep_tile(seed, head, rows, start_n, keep_below, BLOCK_N), p, 0.0)
        acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision=PRECISION)
        m_i = m_new
        k_ptr += BLOCK_N * stride_kt
        v_ptr += BLOCK_N * stride_vt
    return acc, l_i, m_i


@triton.jit
def _attention_fwd_kernel(
    q_ptr, k_ptr, v_ptr, o_ptr,  # (B, H, T, D)
    k_desc, v_desc,  # (B, H, T, D) in tiles (1, 1, BLOCK_N, D), or None
    lse_ptr,  # (B, H, T) fp32, base 2
    start_ptr, seed_ptr,  # (B,) int, (1,) int64
    stride_qb, stride_qh, stride_qt,
    stride_kb, stride_kh, stride_kt,
    stride_vb, stride_vh, stride_vt,
    stride_ob, stride_oh, stride_ot,
    H, T, scale, keep_below, keep_scale,
    CAUSAL: tl.constexpr, HAS_START: tl.constexpr, DROPOUT: tl.constexpr,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    # neighbouring programs share a head, so its k and v stay in L2; the longest goes first
    blocks = tl.cdiv(T, BLOCK_M)
    head = tl.program_id(0) // blocks
    start_m = (blocks - 1 - tl.program_id(0) % blocks) * BLOCK_M
    b32, h32 = head // H, head % H
    b, h = b32.to(tl.int64), h32.to(tl.int64)
    q_ptr += b * stride_qb + h * stride_qh
    k_ptr += b * stride_kb + h * stride_kh
    v_ptr += b * stride_vb + h * stride_vh
    o_ptr += b * stride_ob + h * stride_oh
    lse_ptr += head.to(tl.int64) * T
    rows = start_m + tl.arange(0, BLOCK_M)
    dims = tl.arange(0, D)
    in_range = rows < T
    offsets = rows.to(tl.int64)[:, None]
    first_key, seed = 0, 0
    if HAS_START:
        first_key = tl.minimum(tl.maximum(tl.load(start_ptr + b), 0), T).to(tl.int32)
    if DROPOUT:
        seed = tl.load(seed_ptr)

    q = tl.load(q_ptr + offsets * stride_qt + dims[None, :], mask=in_range[:, None], other=0.0)
    acc = tl.zeros([BLOCK_M, D], dtype=tl.float32)
    l_i = tl.zeros([BLOCK_M], dtype=tl.float32)
    m_i = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    scale_log2 = scale * 1.4426950408889634

    # walk keys [lo, hi); only the blocks at the padding, the diagonal and the end need a mask
    lo = first_key // BLOCK_N * BLOCK_N
    hi = T
    whole = T // BLOCK_N * BLOCK_N
    if CAUSAL:
        hi = tl.minimum(start_m + BLOCK_M, T)
        whole = start_m // BLOCK_N * BLOCK_N
    if HAS_START:
        # by address: padding may hold anything, and 0 times nan is nan
        acc, l_i, m_i = _attention_fwd_blocks(
            acc, l_i, m_i, q, k_ptr, v_ptr, stride_kt, stride_vt,
            None, None, b32, h32, rows,
            lo, tl.minimum(lo + BLOCK_N, hi), first_key, T, scale_log2, seed, head, keep_below,
            CAUSAL, True, True, DROPOUT, BLOCK_N, D, PRECISION,
        )  # fmt: skip
        lo += BLOCK_N
    acc, l_i, m_i = _attention_fwd_blocks(
        acc, l_i, m_i, q, k_ptr, v_ptr, stride_kt, stride_vt,
        k_desc, v_desc, b32, h32, rows, lo, whole, first_key, T, scale_log2, seed, head, keep_below,
        CAUSAL, False, False, DROPOUT, BLOCK_N, D, PRECISION,
    )  # fmt: skip
    acc, l_i, m_i = _attention_fwd_blocks(
        acc, l_i, m_i, q, k_ptr, v_ptr, stride_kt, stride_vt,
        k_desc, v_desc, b32, h32, rows,
        tl.maximum(lo, whole), hi, first_key, T, scale_log2, seed, head, keep_below,
        CAUSAL, True, False, DROPOUT, BLOCK_N, D, PRECISION,
    )  # fmt: skip

    # a row that saw no key: o = 0, and lse = inf makes backward's p = 2^(s - lse) zero too
    empty = l_i == 0.0
    l_i = tl.where(empty, 1.0, l_i)
    o = acc * (keep_scale / l_i)[:, None]
    lse = tl.where(empty, float("inf"), m_i + tl.log2(l_i))
    o_ptrs = o_ptr + offsets * stride_ot + dims[None, :]
    tl.store(o_ptrs, o.to(o_ptr.dtype.element_ty), mask=in_range[:, None])
    tl.store(lse_ptr + rows, lse, mask=in_range)


@triton.jit
def _attention_delta_kernel(
    o_ptr, do_ptr,  # (B, H, T, D)
    delta_ptr,  # (B, H, T) fp32
    stride_ob, stride_oh, stride_ot,
    stride_gb, stride_gh, stride_gt,
    H, T,
    D: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(T, BLOCK_M)
    head = tl.program_id(0) // blocks
    b, h = (head // H).to(tl.int64), (head % H).to(tl.int64)
    rows = tl.program_id(0) % blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    in_range = rows < T
    offsets = rows.to(tl.int64)[:, None]
    dims = tl.arange(0, D)[None, :]
    o_ptrs = o_ptr + b * stride_ob + h * stride_oh + offsets * stride_ot + dims
    do_ptrs = do_ptr + b * stride_gb + h * stride_gh + offsets * stride_gt + dims
    o = tl.load(o_ptrs, mask=in_range[:, None], other=0.0).to(tl.float32)
    do = tl.load(do_ptrs, mask=in_range[:, None], other=0.0).to(tl.float32)
    tl.store(delta_ptr + head.to(tl.int64) * T + rows, tl.sum(o * do, axis=1), mask=in_range)


@triton.jit
def _attention_bwd_rows(
    dk, dv,  # (N, D) so far
    k, v,  # (N, D)
    q_ptr, do_ptr, dq_ptr, stride_qt, stride_gt,  # this head's (T, D)
    q_desc, do_desc, b, h,  # all heads' (B, H, T, D), or None; which head this is
    lse_ptr, delta_ptr,  # this head's (T,)
    keys, start_n,  # (N,) and its first key
    lo, hi, first_key, T,  # walks queries [lo, hi)
    scale_log2, seed, head, keep_below, keep_scale,
    CAUSAL: tl.constexpr, MASKED: tl.constexpr, HAS_START: tl.constexpr,
    DROPOUT: tl.constexpr, ATOMIC_DQ: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    dims = tl.arange(0, D)[None, :]
    tile = tl.arange(0, BLOCK_M)
    # step one address; the offsets of a tile from it stay the same and fit in 32 bits
    q_ptr += tl.cast(lo, tl.int64) * stride_qt
    do_ptr += tl.cast(lo, tl.int64) * stride_gt
    lse_ptr += lo
    delta_ptr += lo
    if ATOMIC_DQ:
        dq_ptr += lo * D
    for start_m in tl.range(lo, hi, BLOCK_M):
        rows = start_m + tile
        in_range = rows < T
        q_ptrs = q_ptr + (tile[:, None] * stride_qt + dims)
        do_ptrs = do_ptr + (tile[:, None] * stride_gt + dims)
        if q_desc is not None:
            # a descriptor gives 0 past the end
            q = tl.reshape(q_desc.load([b, start_m, h, 0]), (BLOCK_M, D))
            do = tl.reshape(do_desc.load([b, start_m, h, 0]), (BLOCK_M, D))
        elif MASKED:
            q = tl.load(q_ptrs, mask=in_range[:, None], other=0.0)
            do = tl.load(do_ptrs, mask=in_range[:, None], other=0.0)
        else:
            q, do = tl.load(q_ptrs), tl.load(do_ptrs)
        if MASKED:
            # past the end p = 2^(0 - inf) = 0
            lse = tl.load(lse_ptr + tile, mask=in_range, other=float("inf"))
            delta = tl.load(delta_ptr + tile, mask=in_range, other=0.0)
        else:
            lse, delta = tl.load(lse_ptr + tile), tl.load(delta_ptr + tile)
        s_t = tl.dot(k, tl.trans(q), input_precision=PRECISION)  # (N, M)
        if MASKED:
            # a row of the text sees no key past the end where causal
            seen = rows[None, :] >= keys[:, None] if CAUSAL else (keys < T)[:, None]
            if HAS_START:
                seen = seen & (keys >= first_key)[:, None]
            s_t = tl.where(seen, s_t, float("-inf"))
        p_t = tl.exp2(s_t * scale_log2 - lse[None, :])
        dp_t = tl.dot(v, tl.trans(do), input_precision=PRECISION)
        kept = p_t
        if DROPOUT:
            keep = tl.trans(_keep_tile(seed, head, rows, start_n, keep_below, BLOCK_N))
            kept = tl.where(keep, p_t, 0.0)
            dp_t = tl.where(keep, dp_t * keep_scale, 0.0)
        dv = tl.dot(kept.to(do.dtype), do, dv, input_precision=PRECISION)
        ds_t = (p_t * (dp_t - delta[None, :])).to(q.dtype)
        dk = tl.dot(ds_t, q, dk, input_precision=PRECISION)
        if ATOMIC_DQ:
            dq = tl.dot(tl.trans(ds_t), k, input_precision=PRECISION)
            dq_ptrs = dq_ptr + (tile[:, None] * D + dims)
            if MASKED:
                tl.atomic_add(dq_ptrs, dq, mask=in_range[:, None], sem="relaxed")
            else:
                tl.atomic_add(dq_ptrs, dq, sem="relaxed")
            dq_ptr += BLOCK_M * D
        q_ptr += BLOCK_M * stride_qt
        do_ptr += BLOCK_M * stride_gt
        lse_ptr += BLOCK_M
        delta_ptr += BLOCK_M
    return dk, dv


@triton.jit
def _attention_bwd_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr,  # (B, H, T, D)
    q_desc, do_desc,  # (B, H, T, D) in tiles (1, 1, BLOCK_M, D), or None
    lse_ptr, delta_ptr,  # (B, H, T) fp32
    dq_ptr,  # (B, H, T, D) fp32, contiguous, zeroed; gets dq / scale; only with ATOMIC_DQ
    dk_ptr, dv_ptr,  # (B, H, T, D)
    start_ptr, seed_ptr,  # (B,) int, (1,) int64
    stride_qb, stride_qh, stride_qt,
    stride_kb, stride_kh, stride_kt,
    stride_vb, stride_vh, stride_vt,
    stride_gb, stride_gh, stride_gt,  # of do
    stride_db, stride_dh, stride_dt,  # of dk and dv
    H, T, scale, keep_below, keep_scale,
    CAUSAL: tl.constexpr, HAS_START: tl.constexpr, DROPOUT: tl.constexpr, ATOMIC_DQ: tl.constexpr,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    # most queries see the first block of keys, so the longest program goes first
    blocks = tl.cdiv(T, BLOCK_N)
    head = tl.program_id(0) // blocks
    start_n = tl.program_id(0) % blocks * BLOCK_N
    b32, h32 = head // H, head % H
    b, h = b32.to(tl.int64), h32.to(tl.int64)
    q_ptr += b * stride_qb + h * stride_qh
    do_ptr += b * stride_gb + h * stride_gh
    lse_ptr += head.to(tl.int64) * T
    delta_ptr += head.to(tl.int64) * T
    if ATOMIC_DQ:
        dq_ptr += head.to(tl.int64) * T * D
    keys = start_n + tl.arange(0, BLOCK_N)
    offsets = keys.to(tl.int64)[:, None]
    dims = tl.arange(0, D)[None, :]
    first_key, seed = 0, 0
    if HAS_START:
        first_key = tl.minimum(tl.maximum(tl.load(start_ptr + b), 0), T).to(tl.int32)
    if DROPOUT:
        seed = tl.load(seed_ptr)

    real = ((keys >= first_key) & (keys < T))[:, None]
    k_ptrs = k_ptr + b * stride_kb + h * stride_kh + offsets * stride_kt + dims
    v_ptrs = v_ptr + b * stride_vb + h * stride_vh + offsets * stride_vt + dims
    k = tl.load(k_ptrs, mask=real, other=0.0)
    v = tl.load(v_ptrs, mask=real, other=0.0)
    dk = tl.zeros([BLOCK_N, D], dtype=tl.float32)
    dv = tl.zeros([BLOCK_N, D], dtype=tl.float32)
    scale_log2 = scale * 1.4426950408889634

    # queries [lo, T) see some of these keys; queries from `whole` on see all
    lo, whole = 0, 0
    if CAUSAL:
        lo = tl.maximum(start_n, first_key) // BLOCK_M * BLOCK_M
        whole = tl.cdiv(start_n + BLOCK_N - 1, BLOCK_M) * BLOCK_M
    if (start_n < first_key) | (start_n + BLOCK_N > T):
        # the block holds padding or crosses the end
        whole = T
    if start_n + BLOCK_N <= first_key:
        lo = T
    whole = tl.minimum(tl.maximum(lo, whole), T)
    last = tl.maximum(T // BLOCK_M * BLOCK_M, whole)
    dk, dv = _attention_bwd_rows(
        dk, dv, k, v, q_ptr, do_ptr, dq_ptr, stride_qt, stride_gt,
        q_desc, do_desc, b32, h32, lse_ptr, delta_ptr, keys, start_n, lo, whole, first_key, T,
        scale_log2, seed, head, keep_below, keep_scale,
        CAUSAL, True, HAS_START, DROPOUT, ATOMIC_DQ, BLOCK_M, BLOCK_N, D, PRECISION,
    )  # fmt: skip
    dk, dv = _attention_bwd_rows(
        dk, dv, k, v, q_ptr, do_ptr, dq_ptr, stride_qt, stride_gt,
        q_desc, do_desc, b32, h32, lse_ptr, delta_ptr, keys, start_n, whole, last, first_key, T,
        scale_log2, seed, head, keep_below, keep_scale,
        CAUSAL, False, HAS_START, DROPOUT, ATOMIC_DQ, BLOCK_M, BLOCK_N, D, PRECISION,
    )  # fmt: skip
    dk, dv = _attention_bwd_rows(
        dk, dv, k, v, q_ptr, do_ptr, dq_ptr, stride_qt, stride_gt,
        q_desc, do_desc, b32, h32, lse_ptr, delta_ptr, keys, start_n, last, T, first_key, T,
        scale_log2, seed, head, keep_below, keep_scale,
        CAUSAL, True, HAS_START, DROPOUT, ATOMIC_DQ, BLOCK_M, BLOCK_N, D, PRECISION,
    )  # fmt: skip

    places = b * stride_db + h * stride_dh + offsets * stride_dt + dims
    in_range = (keys < T)[:, None]
    tl.store(dk_ptr + places, (dk * scale).to(dk_ptr.dtype.element_ty), mask=in_range)
    tl.store(dv_ptr + places, (dv * keep_scale).to(dv_ptr.dtype.element_ty), mask=in_range)


@triton.jit
def _attention_bwd_dq_blocks(
    dq,  # (M, D) so far
    q, do, lse, delta,  # (M, D), (M, D), (M,), (M,)
    k_ptr, v_ptr, stride_kt, stride_vt,  # this head's (T, D)
    rows,  # (M,) queries
    lo, hi, first_key, T,  # walks keys [lo, hi); [first_key, T) exist
    scale_log2, seed, head, keep_below, keep_scale,
    CAUSAL: tl.constexpr, MASKED: tl.constexpr, PADDED: tl.constexpr, DROPOUT: tl.constexpr,
    BLOCK_N: tl.constexpr, D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    tile, dims = tl.arange(0, BLOCK_N)[:, None], tl.arange(0, D)[None, :]
    # addresses as in forward
    k_ptr += tl.cast(lo, tl.int64) * stride_kt
    v_ptr += tl.cast(lo, tl.int64) * stride_vt
    for start_n in tl.range(lo, hi, BLOCK_N):
        keys = start_n + tl.arange(0, BLOCK_N)
        real = keys < T
        if PADDED:
            real = real & (keys >= first_key)
        k_ptrs, v_ptrs = k_ptr + (tile * stride_kt + dims), v_ptr + (tile * stride_vt + dims)
        if MASKED:
            k = tl.load(k_ptrs, mask=real[:, None], other=0.0)
            v = tl.load(v_ptrs, mask=real[:, None], other=0.0)
        else:
            k, v = tl.load(k_ptrs), tl.load(v_ptrs)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION)  # (M, N)
        if MASKED:
            seen = rows[:, None] >= keys[None, :] if CAUSAL else real[None, :]
            if PADDED:
                seen = seen & (keys >= first_key)[None, :]
            s = tl.where(seen, s, float("-inf"))
        p = tl.exp2(s * scale_log2 - lse[:, None])
        dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)
        if DROPOUT:
            keep = _keep_tile(seed, head, rows, start_n, keep_below, BLOCK_N)
            dp = tl.where(keep, dp * keep_scale, 0.0)
        ds = p * (dp - delta[:, None])
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)
        k_ptr += BLOCK_N * stride_kt
        v_ptr += BLOCK_N * stride_vt
    return dq


@triton.jit
def _attention_bwd_dq_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr,  # (B, H, T, D)
    lse_ptr, delta_ptr,  # (B, H, T) fp32
    dq_ptr,  # (B, H, T, D)
    start_ptr, seed_ptr,  # (B,) int, (1,) int64
    stride_qb, stride_qh, stride_qt,
    stride_kb, stride_kh, stride_kt,
    stride_vb, stride_vh, stride_vt,
    stride_gb, stride_gh, stride_gt,  # of do
    stride_db, stride_dh, stride_dt,  # of dq
    H, T, scale, keep_below, keep_scale,
    CAUSAL: tl.constexpr, HAS_START: tl.constexpr, DROPOUT: tl.constexpr,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    # as in forward: the last queries see the most keys and go first
    blocks = tl.cdiv(T, BLOCK_M)
    head = tl.program_id(0) // blocks
    start_m = (blocks - 1 - tl.program_id(0) % blocks) * BLOCK_M
    b, h = (head // H).to(tl.int64), (head % H).to(tl.int64)
    k_ptr += b * stride_kb + h * stride_kh
    v_ptr += b * stride_vb + h * stride_vh
    rows = start_m + tl.arange(0, BLOCK_M)
    in_range = rows < T
    offsets = rows.to(tl.int64)[:, None]
    dims = tl.arange(0, D)[None, :]
    first_key, seed = 0, 0
    if HAS_START:
        first_key = tl.minimum(tl.maximum(tl.load(start_ptr + b), 0), T).to(tl.int32)
    if DROPOUT:
        seed = tl.load(seed_ptr)

    q_ptrs = q_ptr + b * stride_qb + h * stride_qh + offsets * stride_qt + dims
    do_ptrs = do_ptr + b * stride_gb + h * stride_gh + offsets * stride_gt + dims
    q = tl.load(q_ptrs, mask=in_range[:, None], other=0.0)
    do = tl.load(do_ptrs, mask=in_range[:, None], other=0.0)
    lse = tl.load(lse_ptr + head.to(tl.int64) * T + rows, mask=in_range, other=float("inf"))
    delta = tl.load(delta_ptr + head.to(tl.int64) * T + rows, mask=in_range, other=0.0)
    dq = tl.zeros([BLOCK_M, D], dtype=tl.float32)
    scale_log2 = scale * 1.4426950408889634

    # keys as in forward
    lo = first_key // BLOCK_N * BLOCK_N
    hi = T
    whole = T // BLOCK_N * BLOCK_N
    if CAUSAL:
        hi = tl.minimum(start_m + BLOCK_M, T)
        whole = start_m // BLOCK_N * BLOCK_N
    if HAS_START:
        dq = _attention_bwd_dq_blocks(
            dq, q, do, lse, delta, k_ptr, v_ptr, stride_kt, stride_vt, rows,
            lo, tl.minimum(lo + BLOCK_N, hi), first_key, T,
            scale_log2, seed, head, keep_below, keep_scale,
            CAUSAL, True, True, DROPOUT, BLOCK_N, D, PRECISION,
        )  # fmt: skip
        lo += BLOCK_N
    dq = _attention_bwd_dq_blocks(
        dq, q, do, lse, delta, k_ptr, v_ptr, stride_kt, stride_vt, rows,
        lo, whole, first_key, T, scale_log2, seed, head, keep_below, keep_scale,
        CAUSAL, False, False, DROPOUT, BLOCK_N, D, PRECISION,
    )  # fmt: skip
    dq = _attention_bwd_dq_blocks(
        dq, q, do, lse, delta, k_ptr, v_ptr, stride_kt, stride_vt, rows,
        tl.maximum(lo, whole), hi, first_key, T,
        scale_log2, seed, head, keep_below, keep_scale,
        CAUSAL, True, False, DROPOUT, BLOCK_N, D, PRECISION,
    )  # fmt: skip
    dq_ptrs = dq_ptr + b * stride_db + h * stride_dh + offsets * stride_dt + dims
    tl.store(dq_ptrs, (dq * scale).to(dq_ptr.dtype.element_ty), mask=in_range[:, None])


def _numbers(H: int, T: int, scale: float, dropout: float) -> tuple[int, int, float, int, float]:
    """H, T, scale, keep_below (keeps a key with 31 random bits below it) and keep_scale."""
    return H, T, scale, round((1 - dropout) * 2**31) if dropout else 0, 1 / (1 - dropout)


def _descriptors(x: Tensor, y: Tensor, rows: int) -> list[TensorDescriptor] | list[None]:
    """x and y (B, H, T, D) for loads by descriptor (TMA), in tiles of `rows` positions of a head.

    None twice before Hopper, for fp32, and where an address or a layout does not suit: a stride
    must be a multiple of 16 bytes and of the next smaller stride. c_attn's output suits.
    """
    if torch.version.hip is not None or x.element_size() != 2:
        return [None, None]
    if not INTERPRETED and torch.cuda.get_device_capability(x.device) < (9, 0):
        return [None, None]
    for each in (x, y):
        b, h, t, _ = each.stride()
        if each.data_ptr() % 16 or h == 0 or h % 8 or t == 0 or t % h or b % t:
            return [None, None]
    # (B, T, H, D)
    ordered = [each.transpose(1, 2) for each in (x, y)]
    return [
        TensorDescriptor(each, [*each.shape], [*each.stride()], [1, rows, 1, each.size(3)])
        for each in ordered
    ]


def _options(
    table: dict[tuple[int, int], tuple[int, int, int, int]],
    q: Tensor, causal: bool, start: Tensor | None, dropout: float,
) -> dict[str, Any]:  # fmt: skip
    """The kernels' compile-time values."""
    D = q.shape[-1]
    BLOCK_M, BLOCK_N, num_warps, num_stages = table[q.element_size(), D]
    if dropout > 0:
        # dropout's draws take registers too
        BLOCK_N = max(BLOCK_N // 2, 16)
    if torch.version.hip is not None:
        # AMD: a wave is two warps, and shared memory a third of Hopper's
        num_warps, num_stages = 4, 1
    # TF32 tensor cores compute an fp32 product as three TF32 products, within about 2^-21
    split = q.dtype == torch.float32 and torch.version.hip is None
    return {
        "CAUSAL": causal,
        "HAS_START": start is not None,
        "DROPOUT": dropout > 0,
        "D": D,
        "BLOCK_M": BLOCK_M,
        "BLOCK_N": BLOCK_N,
        "PRECISION": "tf32x3" if split else "ieee",
        "num_warps": num_warps,
        "num_stages": num_stages,
        **FUSED,
    }


def _strides(*tensors: Tensor) -> list[int]:
    """Strides along B, H and T; the stride along D is 1."""
    return [stride for x in tensors for stride in x.stride()[:3]]


def _attention_fwd(
    q: Tensor, k: Tensor, v: Tensor, o: Tensor, start: Tensor | None, seed: Tensor | None,
    causal: bool, scale: float, dropout: float,
) -> Tensor:  # fmt: skip
    """Fill o (B, H, T, D); return lse (B, H, T) in fp32."""
    B, H, T, _ = q.shape
    lse = torch.empty(B, H, T, dtype=torch.float32, device=q.device)
    options = _options(FORWARD, q, causal, start, dropout)
    with torch.cuda.device_of(q):
        _attention_fwd_kernel[(triton.cdiv(T, options["BLOCK_M"]) * B * H,)](
            *(q, k, v, o, *_descriptors(k, v, options["BLOCK_N"]), lse, start, seed),
            *_strides(q, k, v, o),
            *_numbers(H, T, scale, dropout),
            **options,
        )
    return lse


def _attention_bwd(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor,
    dq: Tensor, dk: Tensor, dv: Tensor, start: Tensor | None, seed: Tensor | None,
    causal: bool, scale: float, dropout: float, deterministic: bool,
) -> None:  # fmt: skip
    """Fill dq, dk and dv, all (B, H, T, D) with the same strides."""
    B, H, T, D = q.shape
    options = _options(BACKWARD, q, causal, start, dropout)
    by_queries = (triton.cdiv(T, options["BLOCK_M"]) * B * H,)
    by_keys = (triton.cdiv(T, options["BLOCK_N"]) * B * H,)
    numbers = _numbers(H, T, scale, dropout)
    by_descriptor = _descriptors(q, do, options["BLOCK_M"])
    delta = torch.empty_like(lse)
    dq_sum = None if deterministic else torch.zeros(q.shape, dtype=torch.float32, device=q.device)
    with torch.cuda.device_of(q):
        _attention_delta_kernel[by_queries](
            *(o, do, delta), *_strides(o, do), H, T, D=D, BLOCK_M=options["BLOCK_M"], **FUSED
        )
        _attention_bwd_kernel[by_keys](
            *(q, k, v, do, *by_descriptor, lse, delta, dq_sum, dk, dv, start, seed),
            *_strides(q, k, v, do, dk),
            *numbers,
            ATOMIC_DQ=dq_sum is not None,
            **options,
        )
        if dq_sum is not None:
            torch.mul(dq_sum, scale, out=dq)
            return
        _attention_bwd_dq_kernel[by_queries](
            *(q, k, v, do, lse, delta, dq, start, seed),
            *_strides(q, k, v, do, dq),
            *numbers,
            **options,
        )


def _rows_contiguous(x: Tensor) -> Tensor:
    """Copy x unless its stride along D is 1 and 32 bits hold the offsets of a tile."""
    return x if x.stride(-1) == 1 and x.stride(-2) < 2**24 else x.contiguous()


def _empty_like(q: Tensor) -> Tensor:
    """Return an empty (B, H, T, D) laid out as (B, T, H, D): heads join into C without a copy."""
    B, H, T, D = q.shape
    return q.new_empty(B, T, H, D).transpose(1, 2)


def _split(qkv: Tensor, n_head: int) -> list[Tensor]:
    """(B, T, 3C) -> q, k, v as views (B, H, T, D)."""
    return [x.unflatten(2, (n_head, -1)).transpose(1, 2) for x in qkv.chunk(3, dim=2)]


@torch.library.custom_op("nanogpt2::attention", mutates_args=())
def _attention(
    q: Tensor, k: Tensor, v: Tensor, start: Tensor | None, seed: Tensor | None,
    causal: bool, scale: float, dropout: float, deterministic: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    q, k, v = map(_rows_contiguous, (q, k, v))
    o = _empty_like(q)
    return o, _attention_fwd(q, k, v, o, start, seed, causal, scale, dropout)


@_attention.register_fake
def _(q: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return _empty_like(q), q.new_empty(q.shape[:3], dtype=torch.float32)


@torch.library.custom_op("nanogpt2::attention_backward", mutates_args=())
def _attention_backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor,
    start: Tensor | None, seed: Tensor | None,
    causal: bool, scale: float, dropout: float, deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    do, q, k, v = map(_rows_contiguous, (do, q, k, v))
    dq, dk, dv = _empty_like(q), _empty_like(q), _empty_like(q)
    options = (start, seed, causal, scale, dropout, deterministic)
    _attention_bwd(do, q, k, v, o, lse, dq, dk, dv, *options)
    return dq, dk, dv


@_attention_backward.register_fake
def _(do: Tensor, q: Tensor, *_: object) -> tuple[Tensor, Tensor, Tensor]:
    return _empty_like(q), _empty_like(q), _empty_like(q)


@torch.library.custom_op("nanogpt2::attention_qkv", mutates_args=())
def _attention_qkv(
    qkv: Tensor, start: Tensor | None, seed: Tensor | None, n_head: int,
    causal: bool, scale: float, dropout: float, deterministic: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    q, k, v = _split(_rows_contiguous(qkv), n_head)
    o = _empty_like(q)
    lse = _attention_fwd(q, k, v, o, start, seed, causal, scale, dropout)
    return o.transpose(1, 2).flatten(2), lse


@_attention_qkv.register_fake
def _(qkv: Tensor, start: Tensor | None, seed: Tensor | None, n_head: int, *_: object) -> Any:
    B, T, C3 = qkv.shape
    return qkv.new_empty(B, T, C3 // 3), qkv.new_empty(B, n_head, T, dtype=torch.float32)


@torch.library.custom_op("nanogpt2::attention_qkv_backward", mutates_args=())
def _attention_qkv_backward(
    do: Tensor, qkv: Tensor, o: Tensor, lse: Tensor, start: Tensor | None, seed: Tensor | None,
    n_head: int, causal: bool, scale: float, dropout: float, deterministic: bool,
) -> Tensor:  # fmt: skip
    q, k, v = _split(_rows_contiguous(qkv), n_head)
    do, o = (x.unflatten(2, (n_head, -1)).transpose(1, 2) for x in (_rows_contiguous(do), o))
    dqkv = qkv.new_empty(qkv.shape)
    dq, dk, dv = _split(dqkv, n_head)
    options = (start, seed, causal, scale, dropout, deterministic)
    _attention_bwd(do, q, k, v, o, lse, dq, dk, dv, *options)
    return dqkv


@_attention_qkv_backward.register_fake
def _(do: Tensor, qkv: Tensor, *_: object) -> Tensor:
    return qkv.new_empty(qkv.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    """Save the inputs, o and lse, 4 B H T D + B H T elements; backward recomputes p from them."""
    tensors = [x for x in inputs if isinstance(x, Tensor) or x is None]
    ctx.options = [x for x in inputs if not (isinstance(x, Tensor) or x is None)]
    *projections, start, seed = tensors
    ctx.save_for_backward(*projections, *output, start, seed)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, do: Tensor, _: None) -> tuple[Tensor | None, ...]:
    grads = _attention_backward(do, *ctx.saved_tensors, *ctx.options)
    return *grads, *[None] * (2 + len(ctx.options))


def _qkv_backward(ctx: Any, do: Tensor, _: None) -> tuple[Tensor | None, ...]:
    dqkv = _attention_qkv_backward(do, *ctx.saved_tensors, *ctx.options)
    return dqkv, *[None] * (2 + len(ctx.options))


_attention.register_autograd(_backward, setup_context=_save)
_attention_qkv.register_autograd(_qkv_backward, setup_context=_save)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool = True,
    scale: float | None = None,
    *,
    start: Tensor | None = None,
    dropout: float = 0.0,
    seed: Tensor | None = None,
    deterministic: bool = False,
) -> Tensor:
    """softmax(q k^T * scale) v over the keys that a query may see.

    q, k, v: (B, H, T, D) in fp32, fp16 or bf16, any strides, D in 16, 32, 64, 128. With `causal`,
    query i sees keys 0 to i. `scale` defaults to 1 / sqrt(D). `start`, integers (B,), is the
    position of each batch row's first key; keys before `start` are padding. `dropout` is the
    probability of zeroing an entry of the softmax. `seed`, int64 (1,), selects the entries;
    PyTorch's generator draws a seed by default. `deterministic` gives the same gradient bits every
    time, for more work.
    -> (B, H, T, D), laid out as (B, T, H, D). Raises ValueError for other arguments.
    """
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dim() != 4 or 0 in x.shape or x.shape[-1] not in HEAD_SIZES:
            raise ValueError(
                f"{name} must be (B, H, T, D) with D in {HEAD_SIZES}, not {[*x.shape]}"
            )
        if x.shape != q.shape or x.dtype != q.dtype or x.device != q.device:
            raise ValueError(f"{name} must have the shape, dtype and device of q")
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    seed = _check(q, "q", start, scale, dropout, seed)
    return _attention(q, k, v, start, seed, causal, scale, dropout, deterministic)[0]


def attention_qkv(
    qkv: Tensor,
    n_head: int,
    causal: bool = True,
    scale: float | None = None,
    *,
    start: Tensor | None = None,
    dropout: float = 0.0,
    seed: Tensor | None = None,
    deterministic: bool = False,
) -> Tensor:
    """`attention` on the output of GPT-2's c_attn, without copies of q, k, v or their gradients.

    qkv: (B, T, 3C), q then k then v, each n_head heads side by side; other arguments as
    `attention`'s. -> (B, T, C), the input of c_proj; the gradient is one (B, T, 3C).
    """
    sizes = [3 * n_head * D for D in HEAD_SIZES]
    if qkv.dim() != 3 or 0 in qkv.shape or n_head < 1 or qkv.shape[-1] not in sizes:
        raise ValueError(
            f"qkv must be (B, T, 3 * n_head * D) with D in {HEAD_SIZES}, not {[*qkv.shape]}"
            f" with n_head {n_head}"
        )
    scale = (qkv.shape[-1] // (3 * n_head)) ** -0.5 if scale is None else scale
    seed = _check(qkv, "qkv", start, scale, dropout, seed)
    return _attention_qkv(qkv, start, seed, n_head, causal, scale, dropout, deterministic)[0]


def _check(
    x: Tensor, name: str, start: Tensor | None, scale: float, dropout: float, seed: Tensor | None
) -> Tensor | None:
    """Raise ValueError for unsupported arguments; return the seed, or None without dropout."""
    if x.dtype not in DTYPES:
        raise ValueError(f"{name} must be float32, float16 or bfloat16, not {x.dtype}")
    if not (x.is_cuda or (INTERPRETED and x.is_cpu)):
        raise ValueError(f"{name} must be on a CUDA device, not on {x.device}")
    if not 0 < scale < math.inf:
        raise ValueError(f"scale must be positive and finite, not {scale}")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout must be at least 0 and below 1, not {dropout}")
    if start is not None and (
        start.shape != x.shape[:1]
        or start.dtype not in (torch.int32, torch.int64)
        or start.device != x.device
        or not start.is_contiguous()
    ):
        raise ValueError(f"start must be int32 or int64 ({len(x)},) on the device of {name}")
    if dropout == 0:
        return None
    if seed is None:
        return torch.randint(2**63 - 1, (1,), device=x.device)
    if seed.shape != (1,) or seed.dtype != torch.int64 or seed.device != x.device:
        raise ValueError(f"seed must be int64 (1,) on the device of {name}")
    return seed
