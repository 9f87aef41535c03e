"""The sampling kernel against the processors and the noise that it fuses."""

import math

import pytest
import torch
import triton
import triton.language as tl
from kernel_reference import DEVICE, assert_close
from torch.library import opcheck

from nanogpt2.generation import processors
from nanogpt2.generation.noise import CounterNoise
from nanogpt2.kernels import sampling as room
from nanogpt2.kernels.sampling import (
    BLOCK_V,
    DTYPES,
    LOGITS_BLOCK,
    Options,
    Text,
    candidates,
    draw,
    draw_ref,
    head_candidates,
    sample,
    scores_ref,
)

pytestmark = pytest.mark.usefixtures("poisoned")
INF = float("inf")
SEED = 2**63 - 5


def numbers(R):
    """Sample numbers, small and large."""
    return torch.tensor([0, 1, 7, 10**12, 3, 2**40], device=DEVICE)[:R]


def expected(logits, text, options):
    """As nanogpt2.generation does it: processors, softmax, CounterNoise."""
    scores, ids, given = logits.float(), text.ids, options
    if given.repetition_penalty != 1:
        first = torch.zeros_like(ids[:, 0]) if text.first is None else text.first
        penalty = tensor(given.repetition_penalty)
        scores = processors.penalise_repetition(ids, scores, penalty, first)
    if given.no_repeat_ngram_size:
        scores = processors.ban_repeated_ngrams(ids, scores, given.no_repeat_ngram_size)
    if not given.do_sample:
        return scores.argmax(dim=1), scores
    scores = processors.scale_temperature(ids, scores, tensor(given.temperature))
    if given.top_k:
        scores = processors.keep_top_k(ids, scores, given.top_k)
    if given.top_p < 1:
        scores = processors.keep_top_p(ids, scores, given.top_p)
    noise = CounterNoise(given.seed, text.samples)
    return noise.draw(scores.softmax(dim=1), 1, int(text.step.flatten()[0])).squeeze(1), scores


def tensor(x):
    """By a number PyTorch divides on a GPU as it multiplies by the inverse."""
    return torch.tensor([x], device=DEVICE)


def whole(*values):
    return torch.tensor(values, device=DEVICE)


def check(logits, step=3, ids=None, first=None, **options):
    """sample and its parts, against the path without kernels and against the references."""
    kept = logits.clone()
    options = Options(do_sample=True, seed=SEED, **options)
    text = Text(ids, None, first, numbers(len(logits)), whole(step)[0])
    tokens_ref, scores_ref_ = expected(logits, text, options)
    tokens, scores = by_sample(logits, text, options)
    assert torch.equal(logits, kept)
    assert torch.equal(scores, scores_ref_)
    assert torch.equal(tokens, tokens_ref)
    first_scores, best = candidates(logits, options, text)
    assert torch.equal(first_scores, scores_ref(logits, options, text))
    q = CounterNoise(SEED, text.samples).exponential(tuple(logits.shape), step)
    tokens_ref, scores_ref_ = draw_ref(first_scores.clone(), q, options)
    assert torch.equal(draw(first_scores, best, options, text), tokens_ref)
    assert torch.equal(draw(first_scores, best, options, text, mask=True), tokens_ref)
    assert torch.equal(first_scores, scores_ref_)


def by_sample(logits, text, options):
    return sample(
        logits,
        options.seed,
        text.samples,
        text.step,
        options.temperature,
        options.top_k,
        text.ids,
        text.lengths,
        options.no_repeat_ngram_size,
        top_p=options.top_p,
        repetition_penalty=options.repetition_penalty,
        first=text.first,
    )


@pytest.mark.parametrize(
    "V", [1, 37, LOGITS_BLOCK, 760, 2 * BLOCK_V + 1, pytest.param(50257, marks=pytest.mark.slow)]
)
def test_vocabularies(V):
    logits = 3 * torch.randn(3, V, device=DEVICE)
    check(logits)
    check(logits, top_k=5, temperature=0.7)
    check(logits, top_k=5, top_p=0.7)


@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes(dtype):
    check((3 * torch.randn(4, 130, device=DEVICE)).to(dtype), top_k=7)


@pytest.mark.parametrize("top_k", [1, 2, 50, 299, 300, 1000])
def test_top_k(top_k):
    """Negative and positive scores, many of them."""
    check(torch.randn(4, 300, device=DEVICE), top_k=top_k)


@pytest.mark.parametrize("top_k", [1, 3, 5, 9])
def test_ties_with_the_kth_stay(top_k):
    rows = [[1, 2, 2, 2, 0, -0.0, 0, -1, -1], [5, 5, 5, 5, 5, 5, 5, 5, 5], [-INF] * 6 + [1, 0, 2]]
    check(torch.tensor(rows, device=DEVICE), top_k=top_k)


def test_scores_of_every_size():
    """Tiny, huge and infinitely low: the order of the bits is the order of the numbers."""
    x = torch.randn(3, 500, device=DEVICE) * 10.0 ** torch.randint(-40, 37, (3, 500), device=DEVICE)
    x[:, ::7] = -INF
    for top_k in (1, 100, 400, 460):
        check(x, top_k=top_k)


@pytest.mark.parametrize("n", [1, 2, 3, 5])
@pytest.mark.parametrize("T", [1, 2, 4, 60])
def test_ngram_ban(n, T):
    """Texts of four tokens, so that n-grams come again and overlap."""
    ids = torch.randint(4, (5, T), device=DEVICE)
    logits = torch.randn(5, 37, device=DEVICE)
    logits[:, :4] += 5
    check(logits, ids=ids, no_repeat_ngram_size=n)
    check(logits, ids=ids, no_repeat_ngram_size=n, top_k=3, temperature=1.3)


def test_ngram_ban_in_a_long_text():
    """More n-grams than one block."""
    ids = torch.randint(30, (2, 700), device=DEVICE)
    ids[1] = 7
    check(torch.randn(2, 300, device=DEVICE), ids=ids, no_repeat_ngram_size=2)


@pytest.mark.parametrize("penalty", [1.3, 0.7])
def test_repetition_penalty(penalty):
    """Once a token, whatever its sign; not for padding; in texts longer than a block, too."""
    ids = torch.randint(300, (4, 600), device=DEVICE)
    ids[:, -300:] = ids[:, :1] % 7
    logits, first = torch.randn(4, 300, device=DEVICE), whole(0, 5, 290, 599)
    logits[:, 7:20] = 0.0
    for given in (None, first):
        check(logits, ids=ids, repetition_penalty=penalty, first=given)
        check(logits, ids=ids, repetition_penalty=penalty, first=given, top_k=9)
    check(logits, ids=ids, repetition_penalty=penalty, no_repeat_ngram_size=2, temperature=0.7)


@pytest.mark.parametrize("top_p", [0.0, 1e-3, 0.3, 0.9, 0.999])
def test_top_p(top_p):
    logits = 3 * torch.randn(4, 300, device=DEVICE)
    # one token has nearly all the probability
    logits[1, 7] = 30
    check(logits, top_p=top_p)
    check(logits, top_p=top_p, top_k=20, temperature=1.7)


@pytest.mark.parametrize("top_p", [0.0, 0.2013, 0.5017, 0.7019, 0.9523])
def test_top_p_of_equals(top_p):
    """Of equally likely tokens the first are banned first, as by a stable sort.

    torch.sort, which keep_top_p calls, promises no order of equals.
    """
    logits = torch.randint(4, (4, 307), device=DEVICE).float()
    # no share of a few hundred equals is 1 - p, where a rounding would decide
    logits[0], logits[1, 103:] = 2.0, -INF
    text = Text(None, None, None, numbers(4), whole(3)[0])
    q = CounterNoise(SEED, text.samples).exponential((4, 307), 3)
    for top_k in (0, 30):
        options = Options(True, top_k=top_k, top_p=top_p, seed=SEED)
        tokens_ref, scores_ref_ = draw_ref(logits, q, options)
        tokens, scores = by_sample(logits, text, options)
        assert torch.equal(scores, scores_ref_)
        assert torch.equal(tokens, tokens_ref)


def test_many_survivors():
    """More than the draw gives noise to at once, ties with the k-th among them."""
    logits = torch.randint(3, (2, 2000), device=DEVICE).float()
    check(logits, top_k=1100)
    check(torch.randn(2, 2000, device=DEVICE), top_k=700, top_p=0.97)


def test_lengths():
    """What is past a row's length does not count, whatever it is."""
    ids = torch.randint(4, (4, 20), device=DEVICE)
    lengths = whole(20, 11, 2, 1)
    logits, samples, step = torch.randn(4, 37, device=DEVICE), numbers(4), whole(3)[0]
    garbage = ids.where(torch.arange(20, device=DEVICE) < lengths[:, None], -(10**12))
    options = Options(True, no_repeat_ngram_size=2, repetition_penalty=1.5, seed=SEED)
    tokens, scores = by_sample(logits, Text(garbage, lengths, None, samples, step), options)
    for row, length in enumerate(lengths.tolist()):
        one = slice(row, row + 1)
        text = Text(ids[one, :length], None, None, samples[one], step)
        tokens_ref, scores_ref_ = expected(logits[one], text, options)
        assert torch.equal(scores[one], scores_ref_)
        assert torch.equal(tokens[one], tokens_ref)


def test_ids_that_are_no_tokens_ban_nothing(monkeypatch):
    """And write nowhere else: not into another row, nor behind the last."""
    buffers = []

    def with_room_behind(x, *shape, dtype=None, **_):
        size = math.prod(shape)
        buffers.append(torch.full((size + 99,), 7, dtype=dtype or x.dtype, device=DEVICE))
        return buffers[-1][:size].view(shape)

    monkeypatch.setattr(torch.Tensor, "new_empty", with_room_behind)
    ids = torch.tensor([[1, 2, 3], [1, -3, 1], [1, 37, 1]], device=DEVICE)
    logits = torch.randn(3, 37, device=DEVICE)
    _, scores = sample(logits, SEED, numbers(3), 3, ids=ids, no_repeat_ngram_size=2)
    assert scores.untyped_storage().data_ptr() in [buffer.data_ptr() for buffer in buffers]
    assert all((buffer[-99:] == 7).all() for buffer in buffers)
    assert torch.equal(scores, logits)


def test_the_draws_are_those_of_the_counter():
    """240 draws at wide and narrow temperatures, none different.

    Probabilities are rounded elsewhere than in torch.softmax, by 2^-23 or so: a draw could differ
    where the best two are as close as that, once in millions of draws.
    """
    logits, samples = 3 * torch.randn(4, 300, device=DEVICE), numbers(4)
    for seed in (0, 1, SEED):
        for step in range(0, 1000, 200):
            for temperature in (0.5, 1.0, 3.0, 20.0):
                options = Options(True, temperature, seed=seed)
                text = Text(None, None, None, samples, whole(step)[0])
                tokens, _ = by_sample(logits, text, options)
                assert torch.equal(tokens, expected(logits, text, options)[0])


def test_a_row_by_itself():
    """A draw depends on its own row, sample, seed and step alone."""
    logits, samples = torch.randn(1, 300, device=DEVICE).expand(6, 300), numbers(6)
    together, _ = sample(logits, SEED, samples, 3)
    for row in range(6):
        alone, _ = sample(logits[:1], SEED, samples[row : row + 1], 3)
        assert alone.item() == together[row].item()
    assert len(set(together.tolist())) > 3
    assert not torch.equal(sample(logits, SEED, samples, 4)[0], together)
    assert not torch.equal(sample(logits, 5, samples, 3)[0], together)


def test_the_step_on_the_device():
    logits, samples = torch.randn(4, 300, device=DEVICE), numbers(4)
    step = torch.tensor(11, device=DEVICE)
    assert torch.equal(sample(logits, SEED, samples, step)[0], sample(logits, SEED, samples, 11)[0])


def test_padded_and_strided_logits():
    wide = torch.randn(4, 64, device=DEVICE)
    wide[:, 50:] = INF
    samples = numbers(4)
    tokens, scores = sample(wide, SEED, samples, 3, vocab_size=50, top_k=4)
    text = Text(None, None, None, samples, whole(3)[0])
    tokens_ref, scores_ref_ = expected(wide[:, :50], text, Options(True, top_k=4, seed=SEED))
    assert torch.equal(tokens, tokens_ref)
    assert torch.equal(scores, scores_ref_)
    check(torch.randn(300, 4, device=DEVICE).t(), top_k=7)
    check(torch.randn(4, 600, device=DEVICE)[:, ::2])
    ids = torch.randint(3, (9, 4), device=DEVICE).t()
    check(torch.randn(4, 37, device=DEVICE), ids=ids, no_repeat_ngram_size=2)


# numpy, where kernels are interpreted
@pytest.mark.filterwarnings("ignore:All-NaN slice")
@pytest.mark.parametrize(("top_k", "top_p"), [(0, 1.0), (3, 1.0), (0, 0.9), (3, 0.9)])
def test_no_distribution(top_k, top_p):
    """-1, in that row alone."""
    logits = torch.randn(5, 3 * LOGITS_BLOCK, device=DEVICE)
    logits[0], logits[1, 5], logits[2, 7], logits[3, -1] = -INF, INF, float("nan"), float("nan")
    tokens, _ = sample(logits, SEED, numbers(5), 3, top_k=top_k, top_p=top_p)
    assert (tokens < 0).tolist() == [True, True, True, True, False]


def test_no_rows():
    tokens, scores = sample(torch.randn(0, 5, device=DEVICE), 1, numbers(0), 3)
    assert (tokens.shape, scores.shape) == ((0,), (0, 5))


def test_the_leader_of_a_block_by_noise():
    """In fp32, near enough that the draw opens the block of every possible winner."""
    logits, samples = 5 * torch.randn(6, 5000, device=DEVICE), numbers(6)
    text = Text(None, None, None, samples, whole(3)[0])
    scores, best = candidates(logits, Options(True, 0.3, seed=SEED), text)
    exact = scores.double() - CounterNoise(SEED, samples).exponential((6, 5000), 3).log()
    padded = torch.nn.functional.pad(exact, (0, -5000 % LOGITS_BLOCK), value=-INF)
    exact = padded.view(6, -1, LOGITS_BLOCK).amax(dim=2)
    slack = float(room.SLACK.value) + float(room.RELATIVE_SLACK.value) * exact.abs()
    assert ((best - exact).abs() < slack / 4).all()


@triton.jit
def _minus_log_kernel(bits_ptr, out_ptr, N, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    bits = tl.load(bits_ptr + at, mask=at < N, other=0)
    tl.store(out_ptr + at, room._roughly_minus_log(bits), mask=at < N)


def test_a_logarithm_near_0_and_1():
    """fp32 has no number between 1 - 2^-24 and 1: u itself would not do."""
    bits = [0, 1, 2, 2**20, 2**40, 2**52 - 1, 2**52, 2**53 - 2**30, 2**53 - 2**29 - 7]
    bits = whole(*bits, 2**53 - 2**20, 2**53 - 3, 2**53 - 2, 2**53 - 1)
    found = torch.empty(len(bits), device=DEVICE)
    _minus_log_kernel[(1,)](bits, found, len(bits), BLOCK=16)
    # u, and 1 - u, are exact in float64 where they are small
    u, rest = (x.double() + 0.5 for x in (bits, 2**53 - 1 - bits))
    exact = torch.where(u < rest, -(u / 2**53).log(), -torch.log1p(-rest / 2**53))
    assert ((found - exact).abs() < 1e-6 * exact).all()


# ---- greedy


def test_greedy():
    """The first of the largest; penalty and ban count, temperature, top-k and top-p do not."""
    logits = torch.randn(4, 300, device=DEVICE)
    logits[0, 200:220], logits[1, ::37], logits[2] = 9.0, 9.0, 5.0
    ids = torch.randint(300, (4, 50), device=DEVICE)
    ids[:, -2:] = ids[:, 3:5]
    for options in (
        Options(),
        Options(temperature=0.1, top_k=5, top_p=0.1),
        Options(repetition_penalty=1.3, no_repeat_ngram_size=2),
    ):
        text = Text(ids)
        scores, best = candidates(logits, options, text)
        tokens, scores_ref_ = expected(logits, text, options)
        assert torch.equal(scores, scores_ref_)
        assert torch.equal(draw(scores, best, options, text, mask=True), tokens)
        assert torch.equal(scores, scores_ref_)
    assert tokens[2] == min({*range(300)} - {*ids[2].tolist()})


# numpy, where kernels are interpreted
@pytest.mark.filterwarnings("ignore:All-NaN slice")
def test_greedy_without_a_token():
    logits = torch.randn(4, 300, device=DEVICE)
    logits[0], logits[1, 5], logits[2, 290] = -INF, INF, float("nan")
    tokens = draw(*candidates(logits, Options(), Text()), Options(), Text())
    assert (tokens < 0).tolist() == [True, True, True, False]


# ---- the head


def head(R, V, K, dtype=torch.float32):
    x = torch.randn(R, K, device=DEVICE).to(dtype)
    return x, (torch.randn(V, K, device=DEVICE) / K**0.5).to(dtype)


def check_head(x, weight, text, options):
    """The product to a rounding; then all else exactly, from the kernel's own logits."""
    plain, _ = head_candidates(x, weight, Options(), Text())
    logits = x.float() @ weight.float().t()
    assert_close(plain, logits, x.dtype)
    assert torch.equal(plain, plain.to(x.dtype).float())
    scores, best = head_candidates(x, weight, options, text)
    assert torch.equal(scores, scores_ref(plain, options, text))
    q = CounterNoise(SEED, text.samples).exponential(tuple(scores.shape), 3)
    tokens, _ = draw_ref(scores, q, options)
    # a vocabulary of one token may be banned
    tokens = tokens.where(scores.amax(dim=1) > -INF, -1)
    assert torch.equal(draw(scores, best, options, text), tokens)


EVERYTHING = Options(True, 0.7, 5, 0.9, 1.3, 2, SEED)


def texts(R, V, T=40):
    ids = torch.randint(V, (R, T), device=DEVICE) % 9
    samples = torch.arange(R, device=DEVICE)
    return Text(ids, samples % 3 + T - 2, samples % 2, samples, torch.full_like(samples, 3))


@pytest.mark.parametrize("R", range(1, 9))
def test_head_rows(R):
    check_head(*head(R, 70, 40), texts(R, 70), EVERYTHING)


@pytest.mark.parametrize("options", [Options(), Options(True, seed=SEED), EVERYTHING])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("V", "K"), [(1, 1), (33, 100), (200, 768)])
def test_head_sizes(V, K, dtype, options):
    check_head(*head(2, V, K, dtype), texts(2, V), options)


def test_head_strides():
    x, weight = head(3, 50, 20)
    for strided in (torch.cat([x, x], dim=1)[:, :20], x.t().contiguous().t()):
        found = head_candidates(strided, weight, Options(), Text())
        assert torch.equal(found[0], head_candidates(x, weight, Options(), Text())[0])


# ---- the end of a step


def test_the_end_of_a_step():
    """Rows that run, that have ended, that end here, that have no token, whose text is full."""
    logits = torch.zeros(6, 37, device=DEVICE)
    logits[torch.arange(6), whole(1, 2, 3, 4, 5, 6)] = 9.0
    logits[3] = -INF
    ids = torch.full((6, 10), 30, device=DEVICE)
    lengths, step = whole(4, 5, 6, 7, 10, 4), whole(0, 1, 2, 3, 4, 5)
    text = Text(ids, lengths, None, numbers(6), step)
    running = torch.tensor([True, False, True, True, True, True], device=DEVICE)
    failed, cache = torch.zeros(1, dtype=torch.int32, device=DEVICE), whole(*range(6)).int()
    tokens = draw(
        *candidates(logits, Options(), text),
        Options(),
        text,
        running=running,
        ends=whole(3, 6),
        filler=20,
        cache_lengths=cache,
        failed=failed,
    )
    assert tokens.tolist() == [1, 20, 3, 20, 5, 6]
    assert running.tolist() == [True, False, False, False, True, False]
    assert failed.tolist() == [1]
    assert (lengths.tolist(), step.tolist()) == ([5, 6, 7, 8, 11, 5], [1, 2, 3, 4, 5, 6])
    assert cache.tolist() == [1, 2, 3, 4, 5, 6]
    written = torch.full((6, 10), 30, device=DEVICE)
    for row, place, token in ((0, 4, 1), (1, 5, 20), (2, 6, 3), (3, 7, 20), (5, 4, 6)):
        written[row, place] = token
    assert torch.equal(ids, written)


def test_an_ended_row_without_a_token_has_not_failed():
    logits, failed = torch.full((1, 37), -INF, device=DEVICE), whole(0).int()
    text, running = (
        Text(whole(0, 0)[None], whole(1)),
        torch.zeros(1, dtype=torch.bool, device=DEVICE),
    )
    options = {"running": running, "failed": failed, "filler": 5}
    assert draw(*candidates(logits, Options(), text), Options(), text, **options).item() == 5
    assert failed.item() == 0


def test_steps_are_those_of_one_draw_after_another():
    """Ten steps of one set of buffers, against ten calls of sample on growing texts."""
    R, V = 3, 50
    options = Options(True, 0.8, 10, 0.95, 1.2, 2, SEED)
    ids = torch.randint(V, (R, 20), device=DEVICE)
    text = Text(ids.clone(), whole(5, 5, 5), None, numbers(R), whole(0, 0, 0))
    running = torch.ones(R, dtype=torch.bool, device=DEVICE)
    for step in range(10):
        logits = torch.randn(R, V, device=DEVICE)
        now = Text(ids[:, : 5 + step], None, None, numbers(R), whole(step)[0])
        ids[:, 5 + step] = by_sample(logits, now, options)[0]
        draw(*candidates(logits, options, text), options, text, running=running)
    assert torch.equal(text.ids[:, :15], ids[:, :15])


# ---- the library


def test_library():
    logits, samples = torch.randn(3, 7, device=DEVICE), numbers(3)
    ids, step = torch.randint(3, (3, 9), device=DEVICE), torch.tensor(2, device=DEVICE)
    lengths = torch.tensor([9, 4, 1], device=DEVICE)
    ops = torch.ops.nanogpt2
    text = (ids, lengths, None, samples, step)
    opcheck(ops.sample.default, (logits, *text, SEED, 0.7, 2, 0.9, 1.1, 2, 6))
    opcheck(ops.candidates.default, (logits, *text, SEED, 1.1, 2, 0.7, False, 6))
    opcheck(ops.head_candidates.default, (logits, logits, *text, SEED, 1.1, 2, 0.7, True))
    scores, best = candidates(logits, Options(), Text())
    none = (None, None, 0, None, None, None, None)
    opcheck(ops.draw.default, (scores, best, samples, step, SEED, True, 2, 0.9, True, *none))
    rest = (lengths > 1, lengths, 0, ids, lengths.clone(), lengths.int(), lengths[:1].int())
    steps = lengths.clone()
    opcheck(ops.draw.default, (scores, best, samples, steps, SEED, True, 2, 0.9, False, *rest))
    compiled = torch.compile(
        lambda z, s: sample(2 * z, SEED, s, 3)[0], backend="aot_eager", fullgraph=True
    )
    assert torch.equal(compiled(logits, samples), sample(2 * logits, SEED, samples, 3)[0])


def test_launched_directly_where_nothing_records(monkeypatch):
    def dispatched(*_):
        raise AssertionError("the dispatcher ran")

    for name in ("_sample_op", "_candidates_op", "_head_op", "_draw_op"):
        monkeypatch.setattr(room, name, dispatched)
    logits = torch.randn(3, 7, device=DEVICE)
    sample(logits, SEED, numbers(3), 3)
    draw(*candidates(logits, Options(), Text()), Options(), Text())
    head_candidates(logits, logits, Options(), Text())


def test_wrong_use():
    logits, samples = torch.randn(3, 7, device=DEVICE), numbers(3)
    ids = torch.randint(3, (3, 9), device=DEVICE)
    for message, change in {
        "logits must be float32, float16 or bfloat16, not": {"logits": logits.double()},
        r"logits must be \(R, N\), not \(7,\)": {"logits": logits[0]},
        r"samples must be \(3,\) int64": {"samples": samples[:2]},
        "seed must be from 0 to": {"seed": -1},
        "temperature must be finite and above 0, not 0": {"temperature": 0},
        "top_k must be 0 or more, not -1": {"top_k": -1},
        "no_repeat_ngram_size must be 0 or more": {"no_repeat_ngram_size": -2},
        "ids must be given": {"no_repeat_ngram_size": 2},
        r"ids must be \(3, 9\) int64": {"ids": ids[:2]},
        r"ids must be \(3, 9\) int64 .* not .* torch.int32": {"ids": ids.int()},
        r"lengths must be \(3,\) int64": {"ids": ids, "lengths": ids[0, :2]},
        r"step must be \(3,\) int64": {"step": samples[:2]},
        "vocab_size must be from 1 to 7, not 8": {"vocab_size": 8},
    }.items():
        options = {"logits": logits, "seed": 1, "samples": samples, "step": 0} | change
        with pytest.raises(ValueError, match=message):
            sample(**options)


def test_wrong_use_of_the_parts():
    logits, text = torch.randn(3, 7, device=DEVICE), texts(3, 7)
    scores, best = candidates(logits, Options(), text)
    running = torch.ones(3, dtype=torch.bool, device=DEVICE)
    sampled = Options(do_sample=True)
    for message, call in {
        "samples and step must be given to sample": lambda: candidates(logits, sampled, Text()),
        "ids must be given where repetition_penalty is": lambda: candidates(
            logits, Options(repetition_penalty=2.0), Text()
        ),
        "top_p must be from 0 to 1, not 1.5": lambda: candidates(logits, Options(top_p=1.5), text),
        r"first must be \(3,\) int64": lambda: candidates(
            logits, Options(), text._replace(first=whole(1))
        ),
        r"x must be \(R, K\), R up to 8": lambda: head_candidates(
            torch.randn(9, 7, device=DEVICE), logits, Options(), text
        ),
        r"weight must be \(V, 7\) torch.float32 .* not \(3, 7\) torch.float16": lambda: (
            head_candidates(logits, logits.half(), Options(), text)
        ),
        r"weight must be \(V, 7\)": lambda: head_candidates(logits, logits.t(), Options(), text),
        "scores and best must be those of candidates": lambda: draw(
            scores.half(), best, Options(), text
        ),
        "scores and best must be those": lambda: draw(scores, best[:2], Options(), text),
        "text must have ids, contiguous, and lengths": lambda: draw(
            scores, best, Options(), Text(), running=running
        ),
        r"step must be \(3,\) where running is given": lambda: draw(
            scores, best, Options(), text._replace(step=whole(3)[0]), running=running
        ),
        r"running must be \(3,\) bool": lambda: draw(
            scores, best, Options(), text, running=running.long()
        ),
        r"failed must be \(1,\) int32": lambda: draw(
            scores, best, Options(), text, running=running, failed=whole(0)
        ),
    }.items():
        with pytest.raises(ValueError, match=message):
            call()


def test_needs_a_gpu(monkeypatch):
    monkeypatch.setattr("nanogpt2.kernels.sampling.INTERPRETED", False)
    with pytest.raises(ValueError, match="logits must be on a CUDA device, not on cpu"):
        sample(torch.randn(3, 5), 1, torch.arange(3), 0)


@pytest.mark.gpu
def test_natively():
    R, V = 64, 50257
    logits, samples = 3 * torch.randn(R, V, device=DEVICE), torch.arange(R, device=DEVICE)
    text = Text(torch.randint(V, (R, 900), device=DEVICE), None, None, samples, whole(3)[0])
    for top_k, penalty in ((0, 1.0), (50, 1.0), (50, 1.3)):
        options = Options(True, 0.7, top_k, 1.0, penalty, 2, SEED)
        tokens, scores = by_sample(logits, text, options)
        tokens_ref, scores_ref_ = expected(logits, text, options)
        assert torch.equal(scores, scores_ref_)
        assert torch.equal(tokens, tokens_ref)


@pytest.mark.gpu
@pytest.mark.parametrize("options", [Options(), Options(True, seed=SEED), EVERYTHING])
@pytest.mark.parametrize("R", [1, 5, 8])
def test_head_natively(R, options):
    for dtype in DTYPES:
        check_head(*head(R, 50257, 768, dtype), texts(R, 50257, 900), options)


@pytest.mark.gpu
def test_in_a_cuda_graph():
    logits, samples = torch.randn(4, 50257, device=DEVICE), numbers(4)
    step = torch.tensor(0, device=DEVICE)
    sample(logits, SEED, samples, step, top_k=50)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        tokens, _ = sample(logits, SEED, samples, step, top_k=50)
    for i in range(5):
        step.fill_(i)
        graph.replay()
        assert torch.equal(tokens, sample(logits, SEED, samples, i, top_k=50)[0])


@pytest.mark.gpu
def test_a_step_in_a_cuda_graph():
    """The head and the draw, replayed: lengths and steps move on the device."""
    x, weight = head(2, 50257, 768, torch.bfloat16)
    start = texts(2, 50257, 900)._replace(lengths=whole(800, 800))
    text, other = (Text(*(t.clone() for t in start)) for _ in range(2))
    running = torch.ones(2, dtype=torch.bool, device=DEVICE)

    def step(text):
        found = head_candidates(x, weight, EVERYTHING, text)
        return draw(*found, EVERYTHING, text, running=running)

    step(Text(*(t.clone() for t in start)))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        tokens = step(text)
    for _ in range(5):
        graph.replay()
        assert torch.equal(tokens, step(other))
    assert torch.equal(text.ids, other.ids)
