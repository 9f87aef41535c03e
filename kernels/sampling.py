"""The next token of each row, from logits or from the last hidden state.

For a row of logits z over V tokens, in this order, which is transformers':

    penalty        z_v = z_v p where z_v < 0, else z_v / p, for each v in the row's text
    ban            z_v = -inf for each v that would repeat an n-gram of the row's text
    temperature    s = z / temperature
    top-k          s_v = -inf where s_v is below the k-th largest; ties with it stay
    top-p          s_v = -inf for the least likely v, while they add up to at most 1 - p;
                   of equally likely ones the first go first, as in a stable sort; one v stays
    draw           argmax_v exp(s_v - max s) / q_v,  q_v = -log u_v; or, greedy, argmax_v s_v

The draw picks v with probability softmax(s)_v. The noise u_v is a function of (seed, sample, step,
v), SplitMix64's finaliser of their sum. A draw thus depends neither on other rows nor on earlier
draws:

    key = mix(mix(sample + mix(seed)) + step),  u_v = (mix(key + v) >> 11 + 1/2) / 2^53

Two launches. The first spreads each row over hundreds of programs: each makes the scores s of a
block of tokens and stores the block's best. `head_candidates` multiplies x by the block's rows of
the embedding before that, so the logits are processed where they arise; `candidates` reads given
logits. The second, `draw`, has one program a row and reads few blocks:

    greedy         those whose best is the row's best
    top-k          those whose best is among the k largest bests, ties included. The k largest
                   scores lie there: k blocks have a best that is no smaller than the k-th best
    neither        the best is that of s + log(1 / q), in fp32, which the largest s_v + log(1 / q_v)
                   of a row leads by the rounding at most: blocks within SLACK of the largest
    top-p alone    all blocks

Of those blocks it collects the survivors. A radix select finds the k-th largest score, eight bits
at a time from the top. It maps float32 to unsigned integers of the same order. Four times it takes
a histogram of the next eight bits among the scores that agree with the bits found so far. Top-p's
border is found a bit at a time by the probability below it. Only survivors get a logarithm in
float64.

Traffic: `head_candidates` reads V C s bytes of weights and writes 4 V a row, memory-bound;
`candidates` reads a row and writes 4 V. `draw` is latency-bound: some 50 blocks of 32 for k = 50.
Top-p alone sweeps a row some 35 times in one program.

This file knows nothing of texts but their ids. Sources: Steele, Lea and Flood 2014, "Fast
splittable pseudorandom number generators"; the draw by exponential variables is
torch.multinomial's.
"""

from typing import Any, NamedTuple, cast

import torch
import triton
import triton.language as tl
from torch import Tensor

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MAX_ROWS = 8
MAX_COLUMNS = 8192
# tokens of a block: one warp's, which multiplies a few at a time, and one of given logits
HEAD_BLOCK, LOGITS_BLOCK = 32, 128
# bytes of the embedding that a warp of the head requests at once: 64 registers a thread
WARP_BYTES = 8192
# the draw: values a sweep, and survivors that get noise at once, one a thread
BLOCK_V, NUM_WARPS = 1024, 8
INTERPRETED = triton.knobs.runtime.interpret
# set explicitly: Triton 3.10 changed the default
FUSED = {"enable_fp_fusion": True}

# tokens of a text that the ban and the penalty look at together
BLOCK_T = tl.constexpr(256)
# the rounding of s + log(1 / q) in fp32, absolute and relative: some units in the last place
SLACK = tl.constexpr(1e-4)
RELATIVE_SLACK = tl.constexpr(1e-6)
GOLDEN = tl.constexpr(0x9E3779B97F4A7C15)
M1 = tl.constexpr(0xBF58476D1CE4E5B9)
M2 = tl.constexpr(0x94D049BB133111EB)


class Options(NamedTuple):
    """Numbers that choose a token, with transformers' names; the defaults switch a step off."""

    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    seed: int = 0

    @property
    def noisy(self) -> bool:
        """Whether every token may be drawn, so that blocks compete by score and noise."""
        return self.do_sample and self.top_k == 0 and self.top_p >= 1


class Text(NamedTuple):
    """The texts so far, on the device.

    ids: int64 (R, S); lengths: int64 (R,), the tokens in each row, by default S. first: int64
    (R,), each row's first token after the padding, which repetition_penalty leaves out. samples:
    int64 (R,), the number of each row's text, and step: int64 () or (R,), the tokens drawn before;
    both are needed to sample.
    """

    ids: Tensor | None = None
    lengths: Tensor | None = None
    first: Tensor | None = None
    samples: Tensor | None = None
    step: Tensor | None = None


def scores_ref(logits: Tensor, options: Options, text: Text) -> Tensor:
    """Compute the scores before top-k by the formulas: penalty, ban, temperature."""
    scores, n = logits.float().clone(), options.no_repeat_ngram_size
    for row in range(len(scores)):
        if text.ids is None:
            break
        ids = text.ids[row, : None if text.lengths is None else int(text.lengths[row])].tolist()
        seen = sorted({*ids[0 if text.first is None else int(text.first[row]) :]})
        penalty, old = options.repetition_penalty, scores[row, seen]
        scores[row, seen] = torch.where(old < 0, old * penalty, old / penalty)
        if n:
            ngrams = [ids[i : i + n] for i in range(len(ids) - n + 1)]
            banned = [g[-1] for g in ngrams if g[:-1] == ids[len(ids) - n + 1 :]]
            scores[row, banned] = -torch.inf
    temperature = torch.tensor(options.temperature if options.do_sample else 1.0)
    return scores / temperature.to(scores.device)


def draw_ref(scores: Tensor, q: Tensor, options: Options) -> tuple[Tensor, Tensor]:
    """Compute draw by the formulas, from noise q: (R, V) in float64; return tokens and scores."""
    if not options.do_sample:
        return scores.argmax(dim=1), scores
    if options.top_k:
        k = min(options.top_k, scores.size(1))
        kth = scores.sort(dim=1, descending=True).values[:, k - 1]
        scores = scores.masked_fill(scores < kth[:, None], -torch.inf)
    if options.top_p < 1:
        ascending, order = scores.sort(dim=1, stable=True)
        banned = ascending.double().softmax(dim=1).cumsum(dim=1) <= 1 - options.top_p
        banned[:, -1] = False
        scores = scores.masked_fill(banned.scatter(1, order, banned), -torch.inf)
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


@triton.jit
def _key(samples_ptr, step_ptr, stride_step, row, seed):
    # the row's part of the noise
    key = _mix(tl.load(samples_ptr + row).to(tl.uint64) + _mix(seed.to(tl.uint64)))
    return _mix(key + tl.load(step_ptr + row * stride_step).to(tl.uint64))


@triton.jit
def _uniform_bits(key, tokens):
    # 53 random bits for each token
    return (_mix(key + tokens.to(tl.uint64)) >> 11).to(tl.int64)


@triton.jit
def _roughly_minus_log(bits):
    # -log u in fp32, to a few units in the last place wherever u is in (0, 1)
    u = (bits.to(tl.float32) + 0.5) * (1.0 / 2**53)
    # from 1/2 on by 1 - u, which fp32 holds more exactly: -log(w) (1 - u) / (1 - w), w = fp32(u)
    rest = ((2**53 - 1 - bits).to(tl.float32) + 0.5) * (1.0 / 2**53)
    w = 1.0 - rest
    near = tl.where(w == 1.0, rest, -tl.log(tl.where(w == 1.0, 0.5, w)) * rest / (1.0 - w))
    return tl.where(rest < 0.5, near, -tl.log(u))


@triton.jit
def _process(
    z, block, cols, text, length, first, penalty, temperature, V, key,
    PENALTY, NGRAM, NOISY, BLOCK_V,
):  # fmt: skip
    # scores of a block of tokens, and the block's best, +inf if a score is +inf or nan
    at = tl.arange(0, BLOCK_T)
    origin = block * BLOCK_V
    if PENALTY:
        count = tl.zeros((BLOCK_V,), tl.int32)
        for start in range(first, length, BLOCK_T):
            token = tl.load(text + start + at, mask=start + at < length, other=-1)
            here = (token >= origin) & (token < origin + BLOCK_V)
            count += tl.histogram((token - origin).to(tl.int32), BLOCK_V, mask=here)
        z = tl.where(count > 0, tl.where(z < 0, z * penalty, tl.div_rn(z, penalty)), z)
    if NGRAM > 0:
        count = tl.zeros((BLOCK_V,), tl.int32)
        for start in range(0, length - NGRAM + 1, BLOCK_T):
            same = start + at < length - NGRAM + 1
            token = tl.load(text + start + at + NGRAM - 1, mask=same, other=-1)
            same = same & (token >= origin) & (token < origin + BLOCK_V)
            for j in tl.static_range(NGRAM - 1):
                last = tl.load(text + length - NGRAM + 1 + j)
                same = same & (tl.load(text + start + at + j, mask=same, other=-1) == last)
            count += tl.histogram((token - origin).to(tl.int32), BLOCK_V, mask=same)
        z = tl.where(count > 0, -float("inf"), z)
    s = tl.div_rn(z, temperature)
    bad = (cols < V) & ((s != s) | (s == float("inf")))
    best = s
    if NOISY:
        best = s - tl.log(_roughly_minus_log(_uniform_bits(key, cols)))
    best = tl.max(tl.where((cols < V) & (s == s), best, -float("inf")), axis=0)
    return s, tl.where(tl.max(bad.to(tl.int32), axis=0) > 0, float("inf"), best)


# one kernel for every seed and length of the texts
@triton.jit(do_not_specialize=["T", "seed", "stride_zr"])
def _candidates_kernel(
    logits_ptr,  # (R, N), N >= V, stride 1 along N
    ids_ptr,  # (R, T) int64, contiguous, or None
    lengths_ptr,  # (R,) int64, or None for T
    first_ptr,  # (R,) int64, or None for 0
    samples_ptr,  # (R,) int64; this and step are None where not NOISY
    step_ptr,  # () or (R,) int64
    scores_ptr,  # (R, V) fp32, contiguous
    best_ptr,  # (R, blocks) fp32, contiguous
    stride_zr,
    stride_step,
    T,
    V,
    blocks,
    seed: tl.int64,
    penalty,
    temperature,
    PENALTY: tl.constexpr,
    NGRAM: tl.constexpr,
    NOISY: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    row, block = (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(0) % blocks
    cols = block * BLOCK_V + tl.arange(0, BLOCK_V)
    length, first, key = T.to(tl.int32), 0, tl.zeros((), tl.uint64)
    if lengths_ptr is not None:
        length = tl.minimum(tl.load(lengths_ptr + row), T).to(tl.int32)
    if first_ptr is not None:
        first = tl.maximum(tl.load(first_ptr + row), 0).to(tl.int32)
    if NOISY:
        key = _key(samples_ptr, step_ptr, stride_step, row, seed)
    text = ids_ptr
    if ids_ptr is not None:
        text += row * T
    z = tl.load(logits_ptr + row * stride_zr + cols, mask=cols < V, other=0.0).to(tl.float32)
    s, best = _process(
        z, block, cols, text, length, first, penalty, temperature, V, key,
        PENALTY, NGRAM, NOISY, BLOCK_V,
    )  # fmt: skip
    tl.store(scores_ptr + row * V + cols, s, mask=cols < V)
    tl.store(best_ptr + row * blocks + block, best)


@triton.jit(do_not_specialize=["T", "seed"])
def _head_kernel(
    x_ptr,  # (R, K), stride 1 along K
    weight_ptr,  # (V, K), contiguous
    ids_ptr,
    lengths_ptr,
    first_ptr,
    samples_ptr,
    step_ptr,
    scores_ptr,
    best_ptr,  # all of these as in _candidates_kernel
    stride_xr,
    stride_step,
    T,
    V,
    blocks,
    seed: tl.int64,
    penalty,
    temperature,
    R: tl.constexpr,
    K: tl.constexpr,
    PENALTY: tl.constexpr,
    NGRAM: tl.constexpr,
    NOISY: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,  # tokens multiplied at once
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    CHUNKS: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    block = tl.program_id(0)
    k = tl.arange(0, BLOCK_K)
    rows = tl.arange(0, BLOCK_R)[:, None]
    for start in range(0, BLOCK_V, BLOCK_N):
        n = block * BLOCK_V + start + tl.arange(0, BLOCK_N)
        at = weight_ptr + n.to(tl.int64)[:, None] * K + k[None, :]
        weights = _load_chunks(at, (n < V)[:, None], k[None, :], K, BLOCK_K, CHUNKS)
        y = tl.zeros((BLOCK_R, BLOCK_N), tl.float32)
        for r in tl.static_range(R):
            acc = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
            for c in tl.static_range(CHUNKS):
                x_ptrs = x_ptr + r * stride_xr + k + c * BLOCK_K
                x = tl.load(x_ptrs, mask=k + c * BLOCK_K < K, other=0.0).to(tl.float32)
                acc += weights[c].to(tl.float32) * x[None, :]
            y = tl.where(rows == r, tl.sum(acc, axis=1)[None, :], y)
        # logits are rounded to the dtype of x, as a product of PyTorch rounds them
        z = y.to(x_ptr.dtype.element_ty).to(tl.float32)
        at_z = scores_ptr + rows.to(tl.int64) * V + n[None, :]
        tl.store(at_z, z, mask=(rows < R) & (n < V)[None, :])

    # other threads read these logits
    tl.debug_barrier()
    cols = block * BLOCK_V + tl.arange(0, BLOCK_V)
    for row in range(R):
        length, first, key = T.to(tl.int32), 0, tl.zeros((), tl.uint64)
        if lengths_ptr is not None:
            length = tl.minimum(tl.load(lengths_ptr + row), T).to(tl.int32)
        if first_ptr is not None:
            first = tl.maximum(tl.load(first_ptr + row), 0).to(tl.int32)
        if NOISY:
            key = _key(samples_ptr, step_ptr, stride_step, row, seed)
        text = ids_ptr
        if ids_ptr is not None:
            text += row * T
        s_row = scores_ptr + row * V
        z = tl.load(s_row + cols, mask=cols < V, other=0.0)
        s, best = _process(
            z, block, cols, text, length, first, penalty, temperature, V, key,
            PENALTY, NGRAM, NOISY, BLOCK_V,
        )  # fmt: skip
        tl.store(s_row + cols, s, mask=cols < V)
        tl.store(best_ptr + row * blocks + block, best)


@triton.jit
def _load_chunks(ptrs, real, k, K, BLOCK_K, CHUNKS):
    # CHUNKS tiles of BLOCK_K columns each, the first at columns k, as a tuple; 0 where not real
    chunks = ()
    for c in tl.static_range(CHUNKS):
        chunks += (tl.load(ptrs + c * BLOCK_K, mask=real & (k + c * BLOCK_K < K), other=0.0),)
    return chunks


@triton.jit
def _select_blocks(best_row, list_row, least, blocks, BLOCK_V):
    # write the numbers of the blocks whose best is `least` or more, in order; return how many
    cols, n = tl.arange(0, BLOCK_V), 0
    for start in range(0, blocks, BLOCK_V):
        best = tl.load(best_row + start + cols, mask=start + cols < blocks, other=-float("inf"))
        kept = ((start + cols < blocks) & (_order(best) >= least)).to(tl.int32)
        at = list_row + n + tl.cumsum(kept, axis=0) - 1
        tl.store(at, start + cols, mask=kept > 0)
        n += tl.sum(kept, axis=0)
    return n


@triton.jit
def _gather(s_row, list_row, found_row, n, V, BLOCK, BLOCK_V):
    # write the scores of n listed blocks side by side, -inf past the last token
    cols = tl.arange(0, BLOCK_V)
    for start in range(0, n * BLOCK, BLOCK_V):
        inside = start + cols < n * BLOCK
        block = tl.load(list_row + (start + cols) // BLOCK, mask=inside, other=0)
        token = block * BLOCK + (start + cols) % BLOCK
        s = tl.load(s_row + token, mask=inside & (token < V), other=-float("inf"))
        tl.store(found_row + start + cols, s, mask=inside)


@triton.jit
def _survivors(found_row, list_row, s_row, token_row, least, n, BLOCK, BLOCK_V):
    # write the scores from `least` on and their tokens, in order; return how many, and the largest
    cols, count, m = tl.arange(0, BLOCK_V), 0, -float("inf")
    for start in range(0, n * BLOCK, BLOCK_V):
        inside = start + cols < n * BLOCK
        s = tl.load(found_row + start + cols, mask=inside, other=-float("inf"))
        block = tl.load(list_row + (start + cols) // BLOCK, mask=inside, other=0)
        kept = (inside & (_order(s) >= least) & (s > -float("inf"))).to(tl.int32)
        at = count + tl.cumsum(kept, axis=0) - 1
        tl.store(s_row + at, s, mask=kept > 0)
        tl.store(token_row + at, block * BLOCK + (start + cols) % BLOCK, mask=kept > 0)
        count += tl.sum(kept, axis=0)
        m = tl.maximum(m, tl.max(tl.where(kept > 0, s, -float("inf")), axis=0))
    return count, m


@triton.jit
def _below(s_row, border, m, n, BLOCK_V):
    # the sum of exp(s - m) of the scores below the border, and how many there are
    cols, mass, count = tl.arange(0, BLOCK_V), tl.zeros((), tl.float64), 0
    for start in range(0, n, BLOCK_V):
        s = tl.load(s_row + start + cols, mask=start + cols < n, other=-float("inf"))
        below = (start + cols < n) & (_order(s) < border)
        mass += tl.sum(tl.where(below, tl.exp(s - m), 0.0), axis=0).to(tl.float64)
        count += tl.sum(below.to(tl.int32), axis=0)
    return mass, count


@triton.jit
def _nucleus(s_row, m, n, rest, BLOCK_V):
    # the order of the least score that top-p keeps, and how many of its equals it bans
    total, _ = _below(s_row, 0xFFFFFFFF, m, n, BLOCK_V)
    limit = total * rest
    border = tl.zeros((), tl.uint32)
    for i in range(32):
        higher = border | (tl.full((), 1, tl.uint32) << (31 - i))
        mass, _ = _below(s_row, higher, m, n, BLOCK_V)
        border = tl.where(mass <= limit, higher, border)
    bits = tl.where(border >= 0x80000000, border ^ 0x80000000, border ^ 0xFFFFFFFF)
    each = tl.exp(bits.to(tl.float32, bitcast=True) - m).to(tl.float64)
    mass, first = _below(s_row, border, m, n, BLOCK_V)
    _, end = _below(s_row, border + 1, m, n, BLOCK_V)
    # the last of the equals stays, whatever the sums' rounding
    return border, tl.minimum(((limit - mass) / each).to(tl.int32), end - first - 1)


@triton.jit
def _lead(s_row, token_row, key, least, banned, m, n, V, TOP_P, BLOCK_S):
    # the token with the largest chance, and the first kept one of those that score `least`
    some = tl.arange(0, BLOCK_S)
    leader, token, equals, cut = tl.full((), -1.0, tl.float64), -1, 0, 0
    if TOP_P:
        cut = V
    for start in range(0, n, BLOCK_S):
        inside = start + some < n
        s = tl.load(s_row + start + some, mask=inside, other=-float("inf"))
        v = tl.load(token_row + start + some, mask=inside, other=0)
        kept = inside
        if TOP_P:
            equal = (inside & (_order(s) == least)).to(tl.int32)
            number = equals + tl.cumsum(equal, axis=0)
            kept = inside & ((_order(s) > least) | ((equal > 0) & (number > banned)))
            equals += tl.sum(equal, axis=0)
            cut = tl.minimum(cut, tl.min(tl.where(kept & (equal > 0), v, V), axis=0))
        u = (_uniform_bits(key, v).to(tl.float64) + 0.5) * (1.0 / 2**53)
        chance = tl.where(kept, tl.exp(s - m).to(tl.float64) / -tl.log(u), -1.0)
        block_leader = tl.max(chance, axis=0)
        at = tl.min(tl.where(chance == block_leader, v, V), axis=0)
        token = tl.where(block_leader > leader, at, token)
        leader = tl.maximum(leader, block_leader)
    return token, cut


@triton.jit
def _end_step(
    token, row, running_ptr, ends_ptr, ids_ptr, lengths_ptr, step_ptr, cache_lengths_ptr,
    failed_ptr, T, filler, ENDS,
):  # fmt: skip
    # write the token behind the text and count it; return it, or the filler if the row has ended
    running = tl.load(running_ptr + row).to(tl.int32) > 0
    if failed_ptr is not None:
        tl.store(failed_ptr, 1, mask=running & (token < 0))
    running = running & (token >= 0)
    token = tl.where(running, token, filler)
    for i in tl.static_range(ENDS):
        running = running & (token != tl.load(ends_ptr + i))
    tl.store(running_ptr + row, running)
    length = tl.load(lengths_ptr + row)
    tl.store(ids_ptr + row * T + length, token, mask=length < T)
    tl.store(lengths_ptr + row, length + 1)
    if step_ptr is not None:
        tl.store(step_ptr + row, tl.load(step_ptr + row) + 1)
    if cache_lengths_ptr is not None:
        tl.store(cache_lengths_ptr + row, tl.load(cache_lengths_ptr + row) + 1)
    return token


# one kernel for every k and seed: Triton would make k = 1 a constant, but the search changes k
@triton.jit(do_not_specialize=["T", "seed", "top_k", "filler"])
def _draw_kernel(
    scores_ptr,  # (R, V) fp32, contiguous
    best_ptr,  # (R, blocks) fp32, contiguous
    samples_ptr,  # (R,) int64; this and step are None where greedy
    step_ptr,  # () or (R,) int64
    found_ptr,  # (R, 2, blocks * BLOCK) fp32: scores of the listed blocks, of the survivors
    list_ptr,  # (R, blocks * (BLOCK + 1)) int32: survivors' tokens, listed blocks
    tokens_ptr,  # (R,) int64
    running_ptr,  # (R,) bool, or None: then the next pointers are not used
    ends_ptr,  # (ENDS,) int64, or None
    ids_ptr,  # (R, T) int64
    lengths_ptr,  # (R,) int64
    cache_lengths_ptr,  # (R,) int32, or None
    failed_ptr,  # (1,) int32, or None
    stride_step,
    T,
    V,
    blocks,
    seed: tl.int64,
    top_k,
    rest,  # 1 - top_p
    filler,
    GREEDY: tl.constexpr,
    TOP_K: tl.constexpr,
    TOP_P: tl.constexpr,
    MASK: tl.constexpr,  # set scores to -inf where top-k and top-p ban
    ENDS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    s_row, best_row = scores_ptr + row * V, best_ptr + row * blocks
    found_row = found_ptr + row * 2 * blocks * BLOCK
    kept_row = found_row + blocks * BLOCK
    token_row = list_ptr + row * blocks * (BLOCK + 1)
    list_row = token_row + blocks * BLOCK
    cols = tl.arange(0, BLOCK_V)

    top = -float("inf")
    for start in range(0, blocks, BLOCK_V):
        best = tl.load(best_row + start + cols, mask=start + cols < blocks, other=-float("inf"))
        top = tl.maximum(top, tl.max(best, axis=0))
    # if every token is banned, or a score is +inf or nan, softmax is undefined: return -1
    possible = (top > -float("inf")) & (top < float("inf"))

    # which blocks, then which of their scores
    if TOP_K:
        least = _kth_largest(best_row, tl.minimum(top_k, blocks), blocks, BLOCK_V)
    elif TOP_P:
        least = tl.zeros((), tl.uint32)
    elif GREEDY:
        least = _order(top)
    else:
        least = _order(top - SLACK - RELATIVE_SLACK * tl.abs(top))
    n = _select_blocks(best_row, list_row, least, blocks, BLOCK_V)
    tl.debug_barrier()
    _gather(s_row, list_row, found_row, n, V, BLOCK, BLOCK_V)
    tl.debug_barrier()
    least = tl.zeros((), tl.uint32)
    if TOP_K:
        least = _kth_largest(found_row, tl.minimum(top_k, n * BLOCK), n * BLOCK, BLOCK_V)
    elif GREEDY:
        least = _order(top)
    count, m = _survivors(found_row, list_row, kept_row, token_row, least, n, BLOCK, BLOCK_V)
    tl.debug_barrier()
    banned = 0
    if TOP_P:
        least, banned = _nucleus(kept_row, m, count, rest, BLOCK_V)

    if GREEDY:
        token, cut = tl.load(token_row, mask=count > 0, other=-1), 0
    else:
        key = _key(samples_ptr, step_ptr, stride_step, row, seed)
        token, cut = _lead(kept_row, token_row, key, least, banned, m, count, V, TOP_P, BLOCK_S)
    token = tl.where(possible, token, -1).to(tl.int64)
    if MASK:
        for start in range(0, V, BLOCK_V):
            s = tl.load(s_row + start + cols, mask=start + cols < V, other=0.0)
            out = (_order(s) < least) | ((_order(s) == least) & (start + cols < cut))
            tl.store(s_row + start + cols, -float("inf"), mask=out & (start + cols < V))
    if running_ptr is not None:
        token = _end_step(
            token, row, running_ptr, ends_ptr, ids_ptr, lengths_ptr, step_ptr, cache_lengths_ptr,
            failed_ptr, T, filler, ENDS,
        )  # fmt: skip
    tl.store(tokens_ptr + row, token)


def _candidates_fwd(
    logits: Tensor, ids: Tensor | None, lengths: Tensor | None, first: Tensor | None,
    samples: Tensor | None, step: Tensor | None, seed: int, penalty: float, n: int,
    temperature: float, noisy: bool, vocab_size: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return scores (R, V) and each block's best (R, blocks), in fp32."""
    R = len(logits)
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    blocks = triton.cdiv(vocab_size, LOGITS_BLOCK)
    scores = logits.new_empty(R, vocab_size, dtype=torch.float32)
    best = logits.new_empty(R, blocks, dtype=torch.float32)
    if R:
        texts = _texts(ids, lengths, first, samples, step, penalty, n, noisy)
        with torch.cuda.device_of(logits):
            _candidates_kernel[(R * blocks,)](
                logits, *texts, scores, best, logits.stride(0), _stride(step),
                0 if ids is None else ids.size(1), vocab_size, blocks, seed, penalty, temperature,
                PENALTY=penalty != 1, NGRAM=n, NOISY=noisy, BLOCK_V=LOGITS_BLOCK, num_warps=1,
                **FUSED,
            )  # fmt: skip
    return scores, best


def _head_fwd(
    x: Tensor, weight: Tensor, ids: Tensor | None, lengths: Tensor | None, first: Tensor | None,
    samples: Tensor | None, step: Tensor | None, seed: int, penalty: float, n: int,
    temperature: float, noisy: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return scores (R, V) and each block's best (R, blocks), in fp32."""
    (R, K), V = x.shape, len(weight)
    x = x if x.stride(1) == 1 else x.contiguous()
    blocks, size = triton.cdiv(V, HEAD_BLOCK), x.element_size()
    scores = x.new_empty(R, V, dtype=torch.float32)
    best = x.new_empty(R, blocks, dtype=torch.float32)
    # as many rows of the embedding as a warp's registers hold
    at_once = min(4 if R <= 4 else 2, max(1, 1 << (WARP_BYTES // (K * size)).bit_length() >> 1))
    texts = _texts(ids, lengths, first, samples, step, penalty, n, noisy)
    with torch.cuda.device_of(x):
        _head_kernel[(blocks,)](
            x, weight, *texts, scores, best, x.stride(0), _stride(step),
            0 if ids is None else ids.size(1), V, blocks, seed, penalty, temperature,
            R=R, K=K, PENALTY=penalty != 1, NGRAM=n, NOISY=noisy,
            BLOCK_R=triton.next_power_of_2(R), BLOCK_N=at_once, BLOCK_V=HEAD_BLOCK,
            # one row of the embedding: 16 bytes a thread
            BLOCK_K=min(512 // size, max(triton.next_power_of_2(K), 16)), num_warps=1, **FUSED,
        )  # fmt: skip
    return scores, best


def _texts(
    ids: Tensor | None, lengths: Tensor | None, first: Tensor | None, samples: Tensor | None,
    step: Tensor | None, penalty: float, n: int, noisy: bool,
) -> list[Tensor | None]:  # fmt: skip
    """Return the five tensors, None in place of those that no option reads."""
    if penalty == 1 and n == 0:
        ids = lengths = None
    first = first if penalty != 1 else None
    return [ids, lengths, first, *((samples, step) if noisy else (None, None))]


def _stride(step: Tensor | None) -> int:
    return 0 if step is None or step.dim() == 0 else 1


def _draw_fwd(
    scores: Tensor, best: Tensor, samples: Tensor | None, step: Tensor | None, seed: int,
    do_sample: bool, top_k: int, top_p: float, mask: bool, running: Tensor | None,
    ends: Tensor | None, filler: int, ids: Tensor | None, lengths: Tensor | None,
    cache_lengths: Tensor | None, failed: Tensor | None,
) -> Tensor:  # fmt: skip
    """Return tokens, int64 (R,)."""
    (R, V), blocks = scores.shape, best.size(1)
    # a block holds a power of two of tokens, more than half of them real where there are several
    block = triton.next_power_of_2(triton.cdiv(V, blocks))
    tokens = torch.empty(R, dtype=torch.int64, device=scores.device)
    if R == 0:
        return tokens
    found = scores.new_empty(R, 2, blocks * block)
    listed = torch.empty(R, blocks * (block + 1), dtype=torch.int32, device=scores.device)
    width = triton.next_power_of_2(max(blocks, 4 * block))
    # below 1, so that a border exists at top_p = 0 as well
    rest = min(1 - top_p, 1 - 2**-24)
    with torch.cuda.device_of(scores):
        _draw_kernel[(R,)](
            scores, best, samples if do_sample else None,
            step if do_sample or running is not None else None, found, listed, tokens,
            running, ends, *((ids, lengths) if running is not None else (None, None)),
            cache_lengths, failed, _stride(step), 0 if ids is None else ids.size(1), V, blocks,
            seed, min(top_k, V), rest, filler, GREEDY=not do_sample,
            TOP_K=do_sample and top_k > 0, TOP_P=do_sample and top_p < 1, MASK=mask,
            ENDS=0 if ends is None else len(ends), BLOCK=block, BLOCK_V=min(width, BLOCK_V),
            BLOCK_S=32 * NUM_WARPS, num_warps=NUM_WARPS, **FUSED,
        )  # fmt: skip
    return tokens


def _sample(
    logits: Tensor, ids: Tensor | None, lengths: Tensor | None, first: Tensor | None,
    samples: Tensor, step: Tensor, seed: int, temperature: float, top_k: int, top_p: float,
    penalty: float, n: int, vocab_size: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return tokens, int64 (R,), and scores, (R, V) in fp32."""
    noisy = Options(do_sample=True, top_k=top_k, top_p=top_p).noisy
    texts = (ids, lengths, first, samples, step, seed, penalty, n)
    scores, best = _candidates_fwd(logits, *texts, temperature, noisy, vocab_size)
    mask = top_k > 0 or top_p < 1
    tokens = _draw_fwd(
        scores, best, samples, step, seed, True, top_k, top_p, mask, None, None, 0,
        None, None, None, None,
    )  # fmt: skip
    return tokens, scores


# save nothing: a draw has no gradient
_candidates_op = torch.library.custom_op("nanogpt2::candidates", _candidates_fwd, mutates_args=())
_head_op = torch.library.custom_op("nanogpt2::head_candidates", _head_fwd, mutates_args=())
_draw_op = torch.library.custom_op(
    "nanogpt2::draw",
    _draw_fwd,
    mutates_args=("scores", "step", "running", "ids", "lengths", "cache_lengths", "failed"),
)
_sample_op = torch.library.custom_op("nanogpt2::sample", _sample, mutates_args=())


@_candidates_op.register_fake
def _(logits: Tensor, *options: object) -> tuple[Tensor, Tensor]:
    V = cast(int, options[-1])
    widths = V, triton.cdiv(V, LOGITS_BLOCK)
    scores, best = (logits.new_empty(len(logits), N, dtype=torch.float32) for N in widths)
    return scores, best


@_head_op.register_fake
def _(x: Tensor, weight: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    widths = len(weight), triton.cdiv(len(weight), HEAD_BLOCK)
    scores, best = (x.new_empty(len(x), N, dtype=torch.float32) for N in widths)
    return scores, best


@_draw_op.register_fake
def _(scores: Tensor, *_: object) -> Tensor:
    return scores.new_empty(len(scores), dtype=torch.int64)


@_sample_op.register_fake
def _(logits: Tensor, *options: object) -> tuple[Tensor, Tensor]:
    scores = logits.new_empty(len(logits), cast(int, options[-1]), dtype=torch.float32)
    return logits.new_empty(len(logits), dtype=torch.int64), scores


def _is_recorded() -> bool:
    """Whether something records the operations: torch.compile, or a dispatch mode.

    Else the launcher is called directly: the dispatcher costs as much host time as three launches.
    """
    return torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0


def candidates(
    logits: Tensor, options: Options, text: Text, vocab_size: int | None = None
) -> tuple[Tensor, Tensor]:
    """Make the scores of draw, before top-k and top-p, and each block's best.

    logits: (R, N) in float32, float16 or bfloat16, not modified; vocab_size: the first columns,
    which are tokens, by default N. -> float32 (R, V) and (R, blocks). Raises ValueError for other
    arguments.
    """
    R, N = _check(logits)
    vocab_size = N if vocab_size is None else vocab_size
    if not 1 <= vocab_size <= N:
        raise ValueError(f"vocab_size must be from 1 to {N}, not {vocab_size}")
    _check_options(options, text, R, logits.device)
    call: Any = _candidates_op if _is_recorded() else _candidates_fwd
    return call(logits, *_contiguous(text), *_first_options(options), vocab_size)


def head_candidates(
    x: Tensor, weight: Tensor, options: Options, text: Text
) -> tuple[Tensor, Tensor]:
    """Make the logits x weight^T, rounded to the dtype of x, and from them what candidates makes.

    x: (R, K), R up to 8 and K up to 8192; weight: (V, K), contiguous; both in one dtype of float32,
    float16 and bfloat16. -> float32 (R, V) and (R, blocks). Raises ValueError for other arguments.
    """
    R, K = _check(x, "x")
    if not 1 <= R <= MAX_ROWS or K > MAX_COLUMNS:
        allowed = f"(R, K), R up to {MAX_ROWS} and K up to {MAX_COLUMNS}"
        raise ValueError(f"x must be {allowed}, not {(R, K)}")
    if (
        (weight.dtype, weight.device) != (x.dtype, x.device)
        or weight.dim() != 2
        or weight.size(1) != K
        or len(weight) == 0
        or not weight.is_contiguous()
    ):
        raise ValueError(
            f"weight must be (V, {K}) {x.dtype} on {x.device} and contiguous, "
            f"not {tuple(weight.shape)} {weight.dtype}"
        )
    _check_options(options, text, R, x.device)
    call: Any = _head_op if _is_recorded() else _head_fwd
    return call(x, weight, *_contiguous(text), *_first_options(options))


def draw(
    scores: Tensor,
    best: Tensor,
    options: Options,
    text: Text,
    *,
    running: Tensor | None = None,
    ends: Tensor | None = None,
    filler: int = 0,
    cache_lengths: Tensor | None = None,
    failed: Tensor | None = None,
    mask: bool = False,
) -> Tensor:
    """Choose a token for each row: -> int64 (R,), -1 where none is possible.

    scores, best: of candidates or head_candidates with the same options. mask: set the scores that
    top-k and top-p ban to -inf. None is possible where every token is banned or a score is +inf or
    NaN.
    With `running`, bool (R,), the call also ends the step, in place. A row that is not running gets
    the filler. A running row without a possible token ends, gets the filler and sets `failed`,
    int32 (1,), to 1. The token is written to text.ids behind the row's text, if they have room, and
    text.lengths, text.step, which is (R,) then, and cache_lengths, int32 (R,), grow by 1. A row
    whose token is one of `ends`, int64 (E,), runs no more.
    Raises ValueError for other arguments.
    """
    R = len(scores)
    _check(scores, "scores")
    wrong = scores.dtype != torch.float32 or not scores.is_contiguous()
    if wrong or best.shape[:1] != (R,) or best.dim() != 2 or best.dtype != torch.float32:
        raise ValueError("scores and best must be those of candidates or head_candidates")
    device = scores.device
    _check_options(options, text, R, device)
    if running is not None:
        if text.ids is None or text.lengths is None or not text.ids.is_contiguous():
            raise ValueError("text must have ids, contiguous, and lengths where running is given")
        if text.step is not None and text.step.dim() == 0:
            raise ValueError(f"step must be ({R},) where running is given, not ()")
        _check_whole("running", running, (R,), device, torch.bool)
        _check_whole("cache_lengths", cache_lengths, (R,), device, torch.int32)
        _check_whole("failed", failed, (1,), device, torch.int32)
        if ends is not None:
            _check_whole("ends", ends, (ends.numel(),), device)
    call: Any = _draw_op if _is_recorded() else _draw_fwd
    return call(
        *(scores, best, text.samples, text.step, options.seed, options.do_sample),
        *(options.top_k, float(options.top_p), mask and options.do_sample),
        *(running, ends, filler, text.ids, text.lengths, cache_lengths, failed),
    )


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
    *,
    top_p: float = 1.0,
    repetition_penalty: float = 1.0,
    first: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Draw a token for each row; return tokens, int64 (R,), and processed scores, fp32 (R, V).

    logits: (R, N) in float32, float16 or bfloat16, not modified. seed: 0 to 2^63 - 1. samples:
    int64 (R,), the number of each row's text. step: the number of tokens drawn before, an int or an
    int64 () or (R,) on the device, which a CUDA graph can read. ids: int64 (R, T), the texts so
    far; lengths: int64 (R,), the length of each text, by default T; first: int64 (R,), the first
    token after the padding, by default 0. vocab_size: the first columns, which are tokens, by
    default N.
    0 turns top_k or no_repeat_ngram_size off, 1 top_p or repetition_penalty.
    A token is -1 where every token is banned or a score is +inf or NaN. Raises ValueError for other
    arguments.
    """
    R, N = _check(logits)
    vocab_size = N if vocab_size is None else vocab_size
    if not 1 <= vocab_size <= N:
        raise ValueError(f"vocab_size must be from 1 to {N}, not {vocab_size}")
    if not torch.is_tensor(step):
        step = torch.full((), step, dtype=torch.int64, device=logits.device)
    options = Options(
        True, temperature, top_k, top_p, repetition_penalty, no_repeat_ngram_size, seed
    )
    text = Text(ids, lengths, first, samples, step)
    _check_options(options, text, R, logits.device)
    call: Any = _sample_op if _is_recorded() else _sample
    shape = float(temperature), top_k, float(top_p), float(repetition_penalty), no_repeat_ngram_size
    return call(logits, *_contiguous(text), seed, *shape, vocab_size)


def _contiguous(text: Text) -> list[Tensor | None]:
    return [None if x is None else x.contiguous() for x in text]


def _first_options(options: Options) -> tuple[int, float, int, float, bool]:
    """What the first launch reads of the options."""
    temperature = float(options.temperature) if options.do_sample else 1.0
    penalty, n = float(options.repetition_penalty), options.no_repeat_ngram_size
    return options.seed, penalty, n, temperature, options.noisy


def _check(logits: Tensor, name: str = "logits") -> torch.Size:
    if logits.dtype not in DTYPES:
        raise ValueError(f"{name} must be float32, float16 or bfloat16, not {logits.dtype}")
    if not (logits.is_cuda or INTERPRETED):
        raise ValueError(f"{name} must be on a CUDA device, not on {logits.device}")
    if logits.dim() != 2 or logits.size(1) == 0:
        raise ValueError(f"{name} must be (R, N), not {tuple(logits.shape)}")
    return logits.shape


def _check_options(options: Options, text: Text, R: int, device: torch.device) -> None:
    """Raise ValueError for numbers out of range, and for texts that are wrong or missing."""
    if not 0 <= options.seed < 2**63:
        raise ValueError(f"seed must be from 0 to 2^63 - 1, not {options.seed}")
    for name in ("temperature", "repetition_penalty"):
        if not 0 < (value := getattr(options, name)) < float("inf"):
            raise ValueError(f"{name} must be finite and above 0, not {value}")
    if not 0 <= options.top_p <= 1:
        raise ValueError(f"top_p must be from 0 to 1, not {options.top_p}")
    for name in ("top_k", "no_repeat_ngram_size"):
        if (value := getattr(options, name)) < 0:
            raise ValueError(f"{name} must be 0 or more, not {value}")
    for name in ("no_repeat_ngram_size", "repetition_penalty"):
        if text.ids is None and getattr(options, name) != Options._field_defaults[name]:
            raise ValueError(f"ids must be given where {name} is")
    if options.do_sample and (text.samples is None or text.step is None):
        raise ValueError("samples and step must be given to sample")
    for name, tensor in text._asdict().items():
        shape: tuple[int, ...] = (R,)
        if tensor is not None and name == "ids":
            shape = (R, *tensor.shape[1:2])
        if tensor is not None and name == "step" and tensor.dim() == 0:
            shape = ()
        _check_whole(name, tensor, shape, device)


def _check_whole(
    name: str,
    tensor: Tensor | None,
    shape: tuple[int, ...],
    device: torch.device,
    dtype: torch.dtype = torch.int64,
) -> None:
    if tensor is None or (tensor.shape, tensor.dtype, tensor.device) == (shape, dtype, device):
        return
    raise ValueError(
        f"{name} must be {shape} {str(dtype).removeprefix('torch.')} on {device}, "
        f"not {tuple(tensor.shape)} {tensor.dtype} on {tensor.device}"
    )
