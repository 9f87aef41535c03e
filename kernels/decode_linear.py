"""Linear layers of one new token a row: layer norm, product, bias, GELU and residual in one kernel.

For rows x of K columns, 1 to 8 of them, and weights W (N, K), in fp32 whatever the inputs:

    norm       x = w (x - mean) / sqrt(var + eps) + b        over the K columns, optional
    product    y_n = sum_k x_k W_nk + bias_n
    gelu       y = y / (1 + exp(-2 u)),  u = sqrt(2 / pi) (y + 0.044715 y^3)        optional
    residual   y = y + residual        optional

A layer of a decoding step thus takes four launches of this kernel and one of decode_attention.
`decode_embed` adds the embeddings of the token and its position: the first x.

Traffic: N K s bytes of weights, once, and R (K + N) s of rows. Memory-bound: 2 R operations for s
bytes. Each warp owns one to four rows of W and keeps them whole in registers: it requests all of
them, 16 bytes a thread, before it waits for x. It multiplies without tensor cores: for so few rows
they would only add a trip through shared memory.

A long K is split where it would not fit the registers. Each share then writes an fp32 partial sum,
and the last program to finish adds the shares, always in the same order: all runs give the same
bits. Programs count themselves in `arrived`, which the last one sets back to 0. None waits.

No backward: nobody trains on one token. This file knows nothing of models.
Source: the four formulas are those of layer_norm.py and gelu.py.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MAX_ROWS = 8
MAX_COLUMNS = 8192
# entries of `arrived`: at most one for each program
ARRIVED = 16384
# bytes of W that a warp keeps: 64 registers a thread
WARP_BYTES = 8192
# one warp a program: its sums need no barrier
NUM_WARPS = 1
# eight programs for each of 132 SMs
PROGRAMS = 1056
INTERPRETED = triton.knobs.runtime.interpret
# set explicitly: Triton 3.10 changed the default
FUSED = {"enable_fp_fusion": True}

SQRT_2_OVER_PI = tl.constexpr(math.sqrt(2 / math.pi))
CUBIC = tl.constexpr(0.044715)


def decode_linear_ref(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    norm: tuple[Tensor, Tensor, float] | None = None,
    gelu: bool = False,
    residual: Tensor | None = None,
) -> Tensor:
    """Compute decode_linear by the formulas, in fp32."""
    x = x.float()
    if norm is not None:
        w, b, eps = norm
        centred = x - x.mean(dim=1, keepdim=True)
        x = w.float() * centred * (centred.pow(2).mean(dim=1, keepdim=True) + eps).rsqrt() + b
    y = x @ weight.float().t()
    if bias is not None:
        y = y + bias
    if gelu:
        y = 0.5 * y * (1 + (math.sqrt(2 / math.pi) * (y + 0.044715 * y**3)).tanh())
    return y if residual is None else y + residual


def decode_embed_ref(
    tokens: Tensor, lengths: Tensor, wte: Tensor, wpe: Tensor, start: Tensor | None = None
) -> Tensor:
    """Compute decode_embed by indexing, in fp32."""
    positions = lengths if start is None else lengths - start
    return wte[tokens].float() + wpe[positions.clamp(0, len(wpe) - 1)]


@triton.jit
def _load_chunks(ptrs, real, k, K, BLOCK_K, CHUNKS):
    # CHUNKS tiles of BLOCK_K columns each, the first at columns k, as a tuple; 0 where not real
    chunks = ()
    for c in tl.static_range(CHUNKS):
        chunks += (tl.load(ptrs + c * BLOCK_K, mask=real & (k + c * BLOCK_K < K), other=0.0),)
    return chunks


@triton.jit
def _decode_linear_kernel(
    x_ptr,  # (R, K), stride 1 along K
    weight_ptr,  # (N, K), contiguous
    bias_ptr,  # (N,), or None
    norm_weight_ptr,  # (K,), or None
    norm_bias_ptr,  # (K,)
    residual_ptr,  # (R, N), stride 1 along N, or None
    y_ptr,  # (R, N), contiguous
    partial_ptr,  # (SPLITS, R, N) in fp32, or None
    arrived_ptr,  # (blocks of N,) int32, all 0, or None
    stride_xr,
    stride_rr,
    N,
    eps,
    R: tl.constexpr,
    K: tl.constexpr,
    SPLITS: tl.constexpr,
    GELU: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    CHUNKS: tl.constexpr = (K + BLOCK_K * SPLITS - 1) // (BLOCK_K * SPLITS)
    block, split = tl.program_id(0) // SPLITS, tl.program_id(0) % SPLITS
    n = block * BLOCK_N + tl.arange(0, BLOCK_N)
    k = split * CHUNKS * BLOCK_K + tl.arange(0, BLOCK_K)
    rows = tl.arange(0, BLOCK_R)[:, None]

    # request all the weights before anything waits for x
    at = weight_ptr + n.to(tl.int64)[:, None] * K + k[None, :]
    weights = _load_chunks(at, (n < N)[:, None], k[None, :], K, BLOCK_K, CHUNKS)
    if norm_weight_ptr is not None:
        norm_weights = _load_chunks(norm_weight_ptr + k, k < K, k, K, BLOCK_K, CHUNKS)
        norm_biases = _load_chunks(norm_bias_ptr + k, k < K, k, K, BLOCK_K, CHUNKS)
    # keep the compiler from moving them behind the sums of the norm; one warp does not wait here
    tl.debug_barrier()

    y = tl.zeros((BLOCK_R, BLOCK_N), tl.float32)
    for r in tl.static_range(R):
        x_ptrs = x_ptr + r * stride_xr + k
        if norm_weight_ptr is not None:
            xs = _load_chunks(x_ptrs, k < K, k, K, BLOCK_K, CHUNKS)
            total = tl.zeros((BLOCK_K,), tl.float32)
            for c in tl.static_range(CHUNKS):
                total += xs[c].to(tl.float32)
            mean = tl.sum(total, axis=0) / K
            square = tl.zeros((BLOCK_K,), tl.float32)
            for c in tl.static_range(CHUNKS):
                centred = tl.where(k + c * BLOCK_K < K, xs[c].to(tl.float32) - mean, 0.0)
                square += centred * centred
            rstd = tl.rsqrt(tl.sum(square, axis=0) / K + eps)
        acc = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
        for c in tl.static_range(CHUNKS):
            if norm_weight_ptr is not None:
                x = (xs[c].to(tl.float32) - mean) * rstd
                x = norm_weights[c].to(tl.float32) * x + norm_biases[c].to(tl.float32)
            else:
                x = tl.load(x_ptrs + c * BLOCK_K, mask=k + c * BLOCK_K < K, other=0.0)
            acc += weights[c].to(tl.float32) * x.to(tl.float32)[None, :]
        y = tl.where(rows == r, tl.sum(acc, axis=1)[None, :], y)

    mask = (rows < R) & (n < N)[None, :]
    done = True
    if SPLITS > 1:
        part = rows * N + n[None, :]
        tl.store(partial_ptr + split.to(tl.int64) * R * N + part, y, mask=mask)
        # all threads' stores come before the count, which publishes them
        tl.debug_barrier()
        done = tl.atomic_add(arrived_ptr + block, 1, sem="acq_rel") == SPLITS - 1
        if done:
            tl.store(arrived_ptr + block, 0)
            y = tl.zeros((BLOCK_R, BLOCK_N), tl.float32)
            for s in tl.static_range(SPLITS):
                y += tl.load(partial_ptr + s * R * N + part, mask=mask, other=0.0)
    if done:
        if bias_ptr is not None:
            y += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
        if GELU:
            u = SQRT_2_OVER_PI * (y + CUBIC * y * y * y)
            y = y * tl.sigmoid(2 * u)
        if residual_ptr is not None:
            others = residual_ptr + rows * stride_rr + n[None, :]
            y += tl.load(others, mask=mask, other=0.0).to(tl.float32)
        tl.store(y_ptr + rows * N + n[None, :], y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _decode_embed_kernel(
    tokens_ptr,  # (R,) int64
    lengths_ptr,  # (R,) int
    start_ptr,  # (R,) int, or None
    wte_ptr,  # (V, C), contiguous
    wpe_ptr,  # (positions, C), contiguous
    x_ptr,  # (R, C), contiguous
    V,
    positions,
    C,
    BLOCK_C: tl.constexpr,
):
    r = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    token = tl.minimum(tl.maximum(tl.load(tokens_ptr + r), 0), V - 1)
    position = tl.load(lengths_ptr + r)
    if start_ptr is not None:
        position -= tl.load(start_ptr + r)
    position = tl.minimum(tl.maximum(position, 0), positions - 1).to(tl.int64)
    x = tl.load(wte_ptr + token * C + cols, mask=cols < C).to(tl.float32)
    x += tl.load(wpe_ptr + position * C + cols, mask=cols < C).to(tl.float32)
    tl.store(x_ptr + r * C + cols, x.to(x_ptr.dtype.element_ty), mask=cols < C)


def _config(R: int, N: int, K: int, size: int, normed: bool) -> dict[str, int]:
    """Rows of W a warp, and shares of K, for weights of `size` bytes.

    | choice              | because                                                             |
    |---------------------|---------------------------------------------------------------------|
    | BLOCK_K 512 bytes   | 32 threads load 16 bytes each: one row of W, and no sum over warps   |
    | 4 (fp32: 2) rows    | x is read once for them; a warp keeps at most WARP_BYTES             |
    | fewer rows          | until each SM has two programs                                       |
    | not below 2, R > 2  | R rows of x for one of W would be more than the L1 delivers          |
    | SPLITS              | where the rows still do not fit. A norm needs all of x: never split  |
    """
    per_warp = 8 // size
    least = 1 if R <= 2 else min(2, per_warp)
    while per_warp > least and (
        per_warp * K * size > WARP_BYTES or triton.cdiv(N, per_warp) < PROGRAMS
    ):
        per_warp //= 2
    if normed and per_warp * K * size > WARP_BYTES:
        per_warp = 1
    splits = 1 if normed else triton.next_power_of_2(triton.cdiv(per_warp * K * size, WARP_BYTES))
    block_k = 512 // size
    return {
        "SPLITS": splits,
        "BLOCK_N": per_warp,
        "BLOCK_K": min(block_k, max(triton.next_power_of_2(K), 16)),
        "num_warps": NUM_WARPS,
        **FUSED,
    }


def _decode_linear_fwd(
    x: Tensor, weight: Tensor, bias: Tensor | None, norm_weight: Tensor | None,
    norm_bias: Tensor | None, eps: float, gelu: bool, residual: Tensor | None,
    arrived: Tensor | None,
) -> Tensor:  # fmt: skip
    """Return y (R, N)."""
    (R, K), N = x.shape, len(weight)
    x = x if x.stride(1) == 1 else x.contiguous()
    if residual is not None and residual.stride(1) != 1:
        residual = residual.contiguous()
    y = x.new_empty(R, N)
    config = _config(R, N, K, weight.element_size(), norm_weight is not None)
    partial = None
    if config["SPLITS"] > 1:
        partial = x.new_empty(config["SPLITS"], R, N, dtype=torch.float32)
        if arrived is None:
            arrived = torch.zeros(ARRIVED, dtype=torch.int32, device=x.device)
    with torch.cuda.device_of(x):
        _decode_linear_kernel[(triton.cdiv(N, config["BLOCK_N"]) * config["SPLITS"],)](
            x, weight, bias, norm_weight, norm_bias, residual, y, partial,
            arrived if config["SPLITS"] > 1 else None,
            x.stride(0), 0 if residual is None else residual.stride(0), N, eps,
            R=R, K=K, GELU=gelu, BLOCK_R=triton.next_power_of_2(R), **config,
        )  # fmt: skip
    return y


def _decode_embed_fwd(
    tokens: Tensor, lengths: Tensor, wte: Tensor, wpe: Tensor, start: Tensor | None
) -> Tensor:
    """Return x (R, C)."""
    R, (V, C) = len(tokens), wte.shape
    x = wte.new_empty(R, C)
    with torch.cuda.device_of(wte):
        _decode_embed_kernel[(R, triton.cdiv(C, 1024))](
            tokens, lengths, start, wte, wpe, x, V, len(wpe), C,
            BLOCK_C=min(triton.next_power_of_2(C), 1024), **FUSED,
        )  # fmt: skip
    return x


# `arrived` is 0 before and after, so the op counts as one that writes to nothing
_linear_op = torch.library.custom_op("nanogpt2::decode_linear", _decode_linear_fwd, mutates_args=())
_embed_op = torch.library.custom_op("nanogpt2::decode_embed", _decode_embed_fwd, mutates_args=())


@_linear_op.register_fake
def _(x: Tensor, weight: Tensor, *_: object) -> Tensor:
    return x.new_empty(len(x), len(weight))


@_embed_op.register_fake
def _(tokens: Tensor, lengths: Tensor, wte: Tensor, *_: object) -> Tensor:
    return wte.new_empty(len(tokens), wte.size(1))


def _is_recorded() -> bool:
    """Whether something records the operations: torch.compile, or a dispatch mode.

    Else the launcher is called directly: the dispatcher costs as much host time as three launches.
    """
    return torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0


def decode_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    norm: tuple[Tensor, Tensor, float] | None = None,
    gelu: bool = False,
    residual: Tensor | None = None,
    arrived: Tensor | None = None,
) -> Tensor:
    """gelu(norm(x) weight^T + bias) + residual, for up to 8 rows; only x and weight are needed.

    x: (R, K), K up to 8192; weight: (N, K), contiguous; bias: (N,); norm: the layer norm's weight
    and bias, (K,), and eps; residual: (R, N). All on one device, in one dtype of float32, float16
    and bfloat16. arrived: int32 zeros, ARRIVED of them, which calls on one stream may share. They
    are 0 again after the call. Without them a call that splits K makes its own, one launch more.
    -> (R, N), contiguous. Has no gradient. Raises ValueError for other arguments.
    """
    _check(x, weight, bias, norm, residual, arrived)
    norm_weight, norm_bias, eps = norm or (None, None, 0.0)
    call = _linear_op if _is_recorded() else _decode_linear_fwd
    return call(x, weight, bias, norm_weight, norm_bias, eps, gelu, residual, arrived)


def decode_embed(
    tokens: Tensor, lengths: Tensor, wte: Tensor, wpe: Tensor, start: Tensor | None = None
) -> Tensor:
    """Embeddings of each row's token and of its position, lengths - start: -> (R, C).

    tokens: int64 (R,); lengths, start: int32 or int64 (R,), the number of tokens before, padding
    included, and of padding tokens. wte: (V, C) and wpe: (positions, C), contiguous, in one dtype
    of float32, float16 and bfloat16. Ids and positions outside a table count as its nearest row.
    Has no gradient. Raises ValueError for other arguments.
    """
    _check_floats({"wte": wte, "wpe": wpe})
    if wte.dim() != 2 or wpe.dim() != 2 or wpe.size(1) != wte.size(1) or 0 in wte.shape:
        shapes = f"not {tuple(wte.shape)} and {tuple(wpe.shape)}"
        raise ValueError(f"wte and wpe must be (V, C) and (positions, C), {shapes}")
    for name, x in (("tokens", tokens), ("lengths", lengths), ("start", start)):
        allowed = (torch.int64,) if name == "tokens" else (torch.int32, torch.int64)
        if x is not None and (
            x.shape != tokens.shape
            or x.dim() != 1
            or x.dtype not in allowed
            or x.device != wte.device
            or not x.is_contiguous()
        ):
            raise ValueError(f"{name} must be integers (R,) on the device of wte")
    call = _embed_op if _is_recorded() else _decode_embed_fwd
    return call(tokens, lengths, wte, wpe, start)


def _check(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm: tuple[Tensor, Tensor, float] | None,
    residual: Tensor | None,
    arrived: Tensor | None,
) -> None:
    floats = {"x": x, "weight": weight, "bias": bias, "residual": residual}
    if norm is not None:
        floats |= {"norm's weight": norm[0], "norm's bias": norm[1]}
    _check_floats(floats)
    if x.dim() != 2 or not 1 <= len(x) <= MAX_ROWS or not 1 <= x.size(1) <= MAX_COLUMNS:
        allowed = f"(R, K), R up to {MAX_ROWS} and K up to {MAX_COLUMNS}"
        raise ValueError(f"x must be {allowed}, not {tuple(x.shape)}")
    R, K = x.shape
    if weight.dim() != 2 or weight.size(1) != K or not weight.is_contiguous() or not len(weight):
        raise ValueError(f"weight must be (N, {K}) and contiguous, not {tuple(weight.shape)}")
    shapes = {"bias": (len(weight),), "residual": (R, len(weight))}
    shapes |= {"norm's weight": (K,), "norm's bias": (K,)}
    for name, shape in shapes.items():
        tensor = floats.get(name)
        if tensor is not None and tensor.shape != shape:
            raise ValueError(f"{name} must be {shape}, not {tuple(tensor.shape)}")
    if arrived is not None and (
        arrived.dtype != torch.int32 or arrived.shape != (ARRIVED,) or arrived.device != x.device
    ):
        raise ValueError(f"arrived must be ({ARRIVED},) int32 on {x.device}")


def _check_floats(tensors: dict[str, Tensor | None]) -> None:
    """Raise ValueError unless all have one supported dtype and device."""
    given = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    first = next(iter(given.values()))
    for name, tensor in given.items():
        if tensor.dtype not in DTYPES or tensor.dtype != first.dtype:
            allowed = "float32, float16 or bfloat16, all the same"
            raise ValueError(f"{name} must be {allowed}, not {tensor.dtype}")
        if not (tensor.is_cuda or INTERPRETED) or tensor.device != first.device:
            raise ValueError(f"{name} must be on a CUDA device, not on {tensor.device}")
