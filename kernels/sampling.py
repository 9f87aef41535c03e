"""The next token of each row: n-gram ban, temperature, top-k and the draw in one kernel.

For a row of logits z over V tokens, in this order, which is transformers':

    ban            z_v = -inf for each v that would repeat an n-gram of the row's text
    temperature    s = z / temperature
    top-k          s_v = -inf where s_v is below the k-th largest; ties with it stay
    draw           argmax_v exp(s_v - max s) / q_v,  q_v = -log u_v

The draw picks v with probability softmax(s)_v. The noise u_v is a function of (seed, sample, step,
v), SplitMix64's finaliser of their sum. A draw thus depends neither on other rows nor on earlier
draws:

    key = mix(mix(sample + mix(seed)) + step),  u_v = (mix(key + v) >> 11 + 1/2) / 2^53

A radix select finds the k-th largest score, eight bits at a time from the top. It maps float32 to
unsigned integers of the same order. Four times it takes a histogram of the next eight bits among
the scores that agree with the bits found so far.

One program a row. Traffic: a row of logits in, V scores of fp32 out; all other sweeps hit the L1 or
L2. Latency-bound: up to seven sweeps of one SM over 200 KB, and a logarithm in float64 for each
token of the vocabulary.

This file knows nothing of texts. Sources: Steele, Lea and Flood 2014, "Fast splittable
pseudorandom number generators"; the draw by exponential variables is torch.multinomial's.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
BLOCK_V = 2048
# 4 values a thread: each needs float64 in the draw, and 8 would spill
NUM_WARPS = 16
INTERPRETED = triton.knobs.runtime.interpret
# set explicitly: Triton 3.10 changed the default
FUSED = {"enable_fp_fusion": True}

GOLDEN = tl.constexpr(0x9E3779B97F4A7C15)
M1 = tl.constexpr(0xBF58476D1CE4E5B9)
M2 = tl.constexpr(0x94D049BB133111EB)


def sample_ref(
    logits: Tensor,
    q: Tensor,
    temperature: float = 1.0,
    top_k: int = 0,
    ids: Tensor | None = None,
    no_repeat_ngram_size: int = 0,
) -> tuple[Tensor, Tensor]:
    """Compute sample by the formulas, from given noise q: (R, V) in float64."""
    scores, n = logits.float().clone(), no_repeat_ngram_size
    if ids is not None and n:
        for row, text in enumerate(ids.tolist()):
            ngrams = [text[i : i + n] for i in range(len(text) - n + 1)]
            banned = [g[-1] for g in ngrams if g[:-1] == text[len(text) - n + 1 :]]
            scores[row, banned] = -torch.inf
    scores = scores / temperature
    if top_k:
        kth = scores.sort(dim=1, descending=True).values[:, min(top_k, scores.size(1)) - 1]
        scores = scores.masked_fill(scores < kth[:, None], -torch.inf)
    return (scores.softmax(dim=1).double() / q).argmax(dim=1), scores


@triton.jit
def _mix(x):
    """Map uint64 to uint64: each bit of x flips about half of the output bits."""
    x = x * GOLDEN
    x = (x ^ (x >> 30)) * M1
    x = (x ^ (x >> 27)) * M2
    return x ^ (x >> 31)


@triton.jit
def _order(s):
    """Map float32 to uint32 of the same order."""
    # 0 and -0 are equal
    bits = tl.where(s == 0.0, 0.0, s).to(tl.uint32, bitcast=True)
    return tl.where(bits >= 0x80000000, bits ^ 0xFFFFFFFF, bits | 0x80000000)


@triton.jit
def _kth_largest(s_row, k, V, BLOCK_V: tl.constexpr):
    """Return the order of the k-th largest of V scores."""
    cols = tl.arange(0, BLOCK_V)
    digits = tl.arange(0, 256)
    found = tl.zeros((), tl.uint32)
    for i in range(4):
        shift = 24 - 8 * i
        counts = tl.zeros((256,), tl.int32)
        for start in range(0, V, BLOCK_V):
            order = _order(tl.load(s_row + start + cols, mask=start + cols < V, other=0.0))
            # compare all bits above these eight; the first round has none
            agrees = (start + cols < V) & ((order ^ found) >> shift >> 8 == 0)
            digit = ((order >> shift) & 255).to(tl.int32)
            counts += tl.histogram(digit, 256, mask=agrees)
        # the largest digit that at least k scores reach
        reached = tl.cumsum(counts, axis=0, reverse=True) >= k
        digit = tl.sum(reached.to(tl.int32), axis=0) - 1
        k -= tl.sum(tl.where(digits > digit, counts, 0), axis=0)
        found |= digit.to(tl.uint32) << shift
    return found


# one kernel for every k and seed: Triton would make k = 1 a constant, but the search changes k
@triton.jit(do_not_specialize=["seed", "top_k"])
def _sample_kernel(
    logits_ptr,  # (R, N), N >= V, stride 1 along N
    ids_ptr,  # (R, T) int64, contiguous, or None
    lengths_ptr,  # (R,) int64: text length in each row of ids; None for all T
    samples_ptr,  # (R,) int64
    step_ptr,  # () int64
    tokens_ptr,  # (R,) int64
    scores_ptr,  # (R, V) fp32, contiguous
    stride_zr,
    T,
    V,
    seed: tl.int64,
    temperature,
    top_k,
    TOP_K: tl.constexpr,  # top_k > 0
    NGRAM: tl.constexpr,  # n, or 0 for no ban
    BLOCK_V: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    z_row, s_row = logits_ptr + row * stride_zr, scores_ptr + row * V
    cols = tl.arange(0, BLOCK_V)
    for start in range(0, V, BLOCK_V):
        z = tl.load(z_row + start + cols, mask=start + cols < V).to(tl.float32)
        tl.store(s_row + start + cols, tl.div_rn(z, temperature), mask=start + cols < V)

    if NGRAM > 0:
        # other threads overwrite, then read, these scores: wait for all stores
        tl.debug_barrier()
        text = ids_ptr + row * T
        length = T
        if lengths_ptr is not None:
            length = tl.load(lengths_ptr + row).to(tl.int32)
        for start in range(0, length - NGRAM + 1, BLOCK_V):
            first = start + cols
            mask = first < length - NGRAM + 1
            same = mask
            for j in tl.static_range(NGRAM - 1):
                last = tl.load(text + length - NGRAM + 1 + j)
                same = same & (tl.load(text + first + j, mask=mask, other=-1) == last)
            banned = tl.load(text + first + NGRAM - 1, mask=same, other=0)
            same = same & (banned >= 0) & (banned < V)
            tl.store(s_row + banned, tl.full((BLOCK_V,), -float("inf"), tl.float32), mask=same)
    tl.debug_barrier()

    m, numbers = -float("inf"), 0
    for start in range(0, V, BLOCK_V):
        s = tl.load(s_row + start + cols, mask=start + cols < V, other=-float("inf"))
        m = tl.maximum(m, tl.max(s, axis=0))
        numbers += tl.sum((s == s).to(tl.int32), axis=0) - BLOCK_V
    if TOP_K:
        kth = _kth_largest(s_row, top_k, V, BLOCK_V)

    key = _mix(tl.load(samples_ptr + row).to(tl.uint64) + _mix(seed.to(tl.uint64)))
    key = _mix(key + tl.load(step_ptr).to(tl.uint64))
    best, token = tl.full((), -1.0, tl.float64), -1
    for start in range(0, V, BLOCK_V):
        s = tl.load(s_row + start + cols, mask=start + cols < V, other=-float("inf"))
        if TOP_K:
            s = tl.where(_order(s) >= kth, s, -float("inf"))
            tl.store(s_row + start + cols, s, mask=start + cols < V)
        bits = _mix(key + (start + cols).to(tl.uint64)) >> 11
        u = (bits.to(tl.int64).to(tl.float64) + 0.5) * (1.0 / 2**53)
        chance = tl.exp(s - m).to(tl.float64) / -tl.log(u)
        chance = tl.where(start + cols < V, chance, -1.0)
        block_best = tl.max(chance, axis=0)
        at = tl.min(tl.where(chance == block_best, start + cols, V), axis=0)
        token = tl.where(block_best > best, at, token)
        best = tl.maximum(best, block_best)
    # if every token is banned, or a score is +inf or nan, softmax is undefined: return -1
    possible = (m > -float("inf")) & (m < float("inf")) & (numbers == 0)
    tl.store(tokens_ptr + row, tl.where(possible, token, -1).to(tl.int64))


def _sample(
    logits: Tensor,
    ids: Tensor | None,
    lengths: Tensor | None,
    samples: Tensor,
    step: Tensor,
    seed: int,
    temperature: float,
    top_k: int,
    no_repeat_ngram_size: int,
    vocab_size: int,
) -> tuple[Tensor, Tensor]:
    """Return tokens, int64 (R,), and scores, (R, V) in fp32."""
    R = len(logits)
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    tokens = samples.new_empty(R)
    scores = logits.new_empty(R, vocab_size, dtype=torch.float32)
    if R:
        with torch.cuda.device_of(logits):
            _sample_kernel[(R,)](
                logits,
                None if ids is None else ids.contiguous(),
                None if lengths is None else lengths.contiguous(),
                samples.contiguous(),
                step,
                tokens,
                scores,
                logits.stride(0),
                0 if ids is None else ids.size(1),
                vocab_size,
                seed,
                temperature,
                min(top_k, vocab_size),
                TOP_K=top_k > 0,
                NGRAM=0 if ids is None else no_repeat_ngram_size,
                BLOCK_V=min(triton.next_power_of_2(vocab_size), BLOCK_V),
                num_warps=NUM_WARPS,
                **FUSED,
            )
    return tokens, scores


# save nothing: a draw has no gradient
_op = torch.library.custom_op("nanogpt2::sample", _sample, mutates_args=())


@_op.register_fake
def _(
    logits: Tensor,
    ids: Tensor | None,
    lengths: Tensor | None,
    samples: Tensor,
    step: Tensor,
    seed: int,
    temperature: float,
    top_k: int,
    no_repeat_ngram_size: int,
    vocab_size: int,
) -> tuple[Tensor, Tensor]:
    scores = logits.new_empty(len(logits), vocab_size, dtype=torch.float32)
    return samples.new_empty(len(logits)), scores


def sample(
    logits: Tensor,
    seed: int,
    samples: Tensor,
    step: int | Tensor,
    temperature: float = 1.0,
    top_k: int = 0,
    ids: Tensor | None = None,
    lengths: Tensor | None = None,
    no_repeat_ngram_size: int = 0,
    vocab_size: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Draw a token for each row; return tokens, int64 (R,), and processed scores, fp32 (R, V).

    logits: (R, N) in float32, float16 or bfloat16, not modified. seed: 0 to 2^63 - 1. samples:
    int64 (R,), the number of each row's text. step: the number of tokens drawn before, an int or an
    int64 () on the device, which a CUDA graph can read. ids: int64 (R, T), the texts so far;
    lengths: int64 (R,), the length of each text, by default T. vocab_size: the first columns, which
    are tokens, by default N. 0 turns top_k or no_repeat_ngram_size off.
    A token is -1 where every token is banned or a score is +inf or NaN. Raises ValueError for other
    arguments.
    """
    R, N = _check(logits)
    vocab_size = N if vocab_size is None else vocab_size
    if not 1 <= vocab_size <= N:
        raise ValueError(f"vocab_size must be from 1 to {N}, not {vocab_size}")
    if not 0 <= seed < 2**63:
        raise ValueError(f"seed must be from 0 to 2^63 - 1, not {seed}")
    if not 0 < temperature < float("inf"):
        raise ValueError(f"temperature must be finite and above 0, not {temperature}")
    for name, value in (("top_k", top_k), ("no_repeat_ngram_size", no_repeat_ngram_size)):
        if value < 0:
            raise ValueError(f"{name} must be 0 or more, not {value}")
    if no_repeat_ngram_size and ids is None:
        raise ValueError("ids must be given where no_repeat_ngram_size is")
    if not torch.is_tensor(step):
        step = torch.full((), step, dtype=torch.int64, device=logits.device)
    _check_whole("samples", samples, (R,), logits.device)
    _check_whole("step", step, (), logits.device)
    if ids is not None:
        _check_whole("ids", ids, (R, *ids.shape[1:2]), logits.device)
    if lengths is not None:
        _check_whole("lengths", lengths, (R,), logits.device)
    options = (seed, float(temperature), top_k, no_repeat_ngram_size, vocab_size)
    return _op(logits, ids, lengths, samples, step, *options)


def _check(logits: Tensor) -> torch.Size:
    if logits.dtype not in DTYPES:
        raise ValueError(f"logits must be float32, float16 or bfloat16, not {logits.dtype}")
    if not (logits.is_cuda or INTERPRETED):
        raise ValueError(f"logits must be on a CUDA device, not on {logits.device}")
    if logits.dim() != 2 or logits.size(1) == 0:
        raise ValueError(f"logits must be (R, N), not {tuple(logits.shape)}")
    return logits.shape


def _check_whole(name: str, tensor: Tensor, shape: tuple[int, ...], device: torch.device) -> None:
    if (tensor.shape, tensor.dtype, tensor.device) != (shape, torch.int64, device):
        raise ValueError(
            f"{name} must be {shape} int64 on {device}, "
            f"not {tuple(tensor.shape)} {tensor.dtype} on {tensor.device}"
        )
