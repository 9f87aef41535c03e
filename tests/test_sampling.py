"""The sampling kernel against the processors and the noise that it fuses."""

import math

import pytest
import torch
from kernel_reference import DEVICE
from torch.library import opcheck

from nanogpt2.generation import processors
from nanogpt2.generation.noise import CounterNoise
from nanogpt2.kernels.sampling import BLOCK_V, DTYPES, sample, sample_ref

pytestmark = pytest.mark.usefixtures("poisoned")
INF = float("inf")
SEED = 2**63 - 5


def numbers(R):
    """Sample numbers, small and large."""
    return torch.tensor([0, 1, 7, 10**12, 3, 2**40], device=DEVICE)[:R]


def expected(logits, samples, step, top_k=0, temperature=1.0, ids=None, n=0, seed=SEED):
    """As nanogpt2.generation does it: processors, softmax, CounterNoise."""
    scores = logits.float()
    if n:
        scores = processors.ban_repeated_ngrams(ids, scores, n)
    scores = processors.scale_temperature(ids, scores, divisor(temperature))
    if top_k:
        scores = processors.keep_top_k(ids, scores, top_k)
    tokens = CounterNoise(seed, samples).draw(scores.softmax(dim=1), 1, step)
    return tokens.squeeze(1), scores


def divisor(temperature):
    """As a tensor: by a number PyTorch divides on a GPU as it multiplies by the inverse."""
    return torch.tensor([temperature], device=DEVICE)


def check(logits, step=3, top_k=0, temperature=1.0, ids=None, n=0):
    samples = numbers(len(logits))
    kept = logits.clone()
    tokens, scores = sample(
        logits,
        SEED,
        samples,
        step,
        temperature=temperature,
        top_k=top_k,
        ids=ids,
        no_repeat_ngram_size=n,
    )
    tokens_ref, scores_ref = expected(logits, samples, step, top_k, temperature, ids, n)
    assert torch.equal(logits, kept)
    assert torch.equal(scores, scores_ref)
    assert torch.equal(tokens, tokens_ref)
    q = CounterNoise(SEED, samples).exponential(tuple(logits.shape), step)
    tokens_ref, scores_ref = sample_ref(logits, q, divisor(temperature), top_k, ids, n)
    assert torch.equal(scores, scores_ref)
    assert torch.equal(tokens, tokens_ref)


@pytest.mark.parametrize("V", [1, 37, 64, 760, BLOCK_V + 1, 50257])
def test_vocabularies(V):
    logits = 3 * torch.randn(3, V, device=DEVICE)
    check(logits)
    check(logits, top_k=5, temperature=0.7)


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
    check(logits, ids=ids, n=n)
    check(logits, ids=ids, n=n, top_k=3, temperature=1.3)


def test_ngram_ban_in_a_long_text():
    """More n-grams than one block."""
    ids = torch.randint(30, (2, BLOCK_V + 300), device=DEVICE)
    ids[1] = 7
    check(torch.randn(2, BLOCK_V + 50, device=DEVICE), ids=ids, n=2)


def test_lengths():
    """What is past a row's length does not count, whatever it is."""
    ids = torch.randint(4, (4, 20), device=DEVICE)
    lengths = torch.tensor([20, 11, 2, 0], device=DEVICE)
    logits, samples = torch.randn(4, 37, device=DEVICE), numbers(4)
    garbage = ids.where(torch.arange(20, device=DEVICE) < lengths[:, None], -(10**12))
    tokens, scores = sample(
        logits, SEED, samples, 3, ids=garbage, lengths=lengths, no_repeat_ngram_size=2
    )
    for row, length in enumerate(lengths.tolist()):
        one = slice(row, row + 1)
        tokens_ref, scores_ref = expected(
            logits[one], samples[one], 3, ids=ids[one, :length], n=2 if length > 1 else 0
        )
        assert torch.equal(scores[one], scores_ref)
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
                tokens, _ = sample(logits, seed, samples, step, temperature=temperature)
                tokens_ref, _ = expected(logits, samples, step, temperature=temperature, seed=seed)
                assert torch.equal(tokens, tokens_ref)


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
    tokens_ref, scores_ref = expected(wide[:, :50], samples, 3, top_k=4)
    assert torch.equal(tokens, tokens_ref)
    assert torch.equal(scores, scores_ref)
    check(torch.randn(300, 4, device=DEVICE).t(), top_k=7)
    check(torch.randn(4, 600, device=DEVICE)[:, ::2])
    check(torch.randn(4, 37, device=DEVICE), ids=torch.randint(3, (9, 4), device=DEVICE).t(), n=2)


# numpy, where kernels are interpreted
@pytest.mark.filterwarnings("ignore:All-NaN slice")
@pytest.mark.parametrize("top_k", [0, 3])
def test_no_distribution(top_k):
    """-1, in that row alone."""
    logits = torch.randn(5, 2 * BLOCK_V, device=DEVICE)
    logits[0], logits[1, 5], logits[2, 7], logits[3, -1] = -INF, INF, float("nan"), float("nan")
    tokens, _ = sample(logits, SEED, numbers(5), 3, top_k=top_k)
    assert (tokens < 0).tolist() == [True, True, True, True, False]


def test_no_rows():
    tokens, scores = sample(torch.randn(0, 5, device=DEVICE), 1, numbers(0), 3)
    assert (tokens.shape, scores.shape) == ((0,), (0, 5))


def test_library():
    logits, samples = torch.randn(3, 7, device=DEVICE), numbers(3)
    ids, step = torch.randint(3, (3, 9), device=DEVICE), torch.tensor(2, device=DEVICE)
    lengths = torch.tensor([9, 4, 1], device=DEVICE)
    operator = torch.ops.nanogpt2.sample.default
    opcheck(operator, (logits, ids, lengths, samples, step, SEED, 0.7, 2, 2, 6))
    opcheck(operator, (logits, None, None, samples, step, 0, 1.0, 0, 0, 7))
    compiled = torch.compile(
        lambda z, s: sample(2 * z, SEED, s, 3)[0], backend="aot_eager", fullgraph=True
    )
    assert torch.equal(compiled(logits, samples), sample(2 * logits, SEED, samples, 3)[0])


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
        r"step must be \(\) int64": {"step": samples},
        "vocab_size must be from 1 to 7, not 8": {"vocab_size": 8},
    }.items():
        options = {"logits": logits, "seed": 1, "samples": samples, "step": 0} | change
        with pytest.raises(ValueError, match=message):
            sample(**options)


def test_needs_a_gpu(monkeypatch):
    monkeypatch.setattr("nanogpt2.kernels.sampling.INTERPRETED", False)
    with pytest.raises(ValueError, match="logits must be on a CUDA device, not on cpu"):
        sample(torch.randn(3, 5), 1, torch.arange(3), 0)


@pytest.mark.gpu
def test_natively():
    R, V = 64, 50257
    logits, samples = 3 * torch.randn(R, V, device=DEVICE), torch.arange(R, device=DEVICE)
    ids = torch.randint(V, (R, 900), device=DEVICE)
    for top_k in (0, 50):
        tokens, scores = sample(
            logits, SEED, samples, 3, 0.7, top_k, ids=ids, no_repeat_ngram_size=2
        )
        tokens_ref, scores_ref = expected(logits, samples, 3, top_k, 0.7, ids, 2)
        assert torch.equal(scores, scores_ref)
        assert torch.equal(tokens, tokens_ref)


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
