"""The counter's draws: each by itself, in any company, and distributed as they claim.

Chi-square limits are exceeded by one seed in a thousand; the seeds are fixed.
"""

import itertools
import math

import pytest
import torch
from reference import TINY, left_padded, prompts, twins

from nanogpt2.config import GenerationConfig, GPTConfig
from nanogpt2.generation import generate
from nanogpt2.generation.noise import (
    CounterNoise,
    StreamNoise,
    _possible,
    _stream_is_uniform,
)

# degrees of freedom -> what chi-square exceeds once in a thousand
LIMIT = {3: 16.27, 11: 31.26, 48: 84.04}
SAMPLING = {"do_sample": True, "top_k": 0, "max_new_tokens": 10, "noise": "counter", "seed": 5}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return twins(tmp_path_factory.mktemp("twins"))


@pytest.fixture(scope="module")
def model(models):
    return models[0]


def new_tokens(model, ids, mask=None, **options):
    """int64 (N, new)."""
    return generate(model, ids, mask, **options).sequences[:, ids.size(1) :]


def same_texts(found, expected):
    """Equal but for the filling of a batch whose other rows are longer."""
    width = min(found.size(1), expected.size(1))
    assert torch.equal(found[:, :width], expected[:, :width])
    # what is past the shorter one's end is filling
    for rest in (found[:, width:], expected[:, width:]):
        assert (rest == TINY.eos_token_id).all()


# ---- a draw by itself


def test_sample_7_of_64_made_again_alone(model):
    ids = prompts(1, 6)
    all_of_them = new_tokens(model, ids, num_return_sequences=64, **SAMPLING)
    assert len({tuple(row) for row in all_of_them.tolist()}) > 32
    for number in (0, 7, 63):
        alone = new_tokens(model, ids, first_sample=number, num_return_sequences=1, **SAMPLING)
        same_texts(alone, all_of_them[number : number + 1])
    some = new_tokens(model, ids, first_sample=20, num_return_sequences=9, **SAMPLING)
    same_texts(some, all_of_them[20:29])


@pytest.mark.parametrize("place", [0, 1, 2])
def test_the_batch_does_not_matter(model, place):
    """The same prompt first, in the middle, last, among others that are longer, padded or not."""
    ids = prompts(1, 6, seed=4)
    alone = new_tokens(model, ids, num_return_sequences=4, **SAMPLING)
    batch, mask = left_padded(3, 11, seed=9)
    batch[place], mask[place] = 0, 0
    batch[place, -6:], mask[place, -6:] = ids[0], 1
    found = new_tokens(model, batch, mask, num_return_sequences=4, **SAMPLING)
    same_texts(found[4 * place : 4 * place + 4], alone)


def test_rows_that_ended_do_not_matter(model):
    options = SAMPLING | {"eos_token_id": tuple(range(20)), "pad_token_id": TINY.eos_token_id}
    ids = prompts(1, 6)
    all_of_them = new_tokens(model, ids, num_return_sequences=16, **options)
    for number in range(16):
        alone = new_tokens(model, ids, first_sample=number, **options)
        same_texts(alone, all_of_them[number : number + 1])


def test_beams_in_any_batch(model):
    options = SAMPLING | {"num_beams": 3, "num_return_sequences": 3, "eos_token_id": None}
    ids = prompts(3, 6)
    batch = new_tokens(model, ids, first_sample=2, **options)
    for row in range(3):
        alone = new_tokens(model, ids[row : row + 1], first_sample=2, **options)
        assert torch.equal(batch[3 * row : 3 * row + 3], alone)
    assert not torch.equal(new_tokens(model, ids, first_sample=3, **options), batch)
    # left padding does not matter either
    padded, mask = left_padded(2, 9, seed=2)
    padded[1], mask[1] = 0, 0
    padded[1, -6:], mask[1, -6:] = ids[2], 1
    found = new_tokens(model, padded, mask, first_sample=2, **options)
    assert torch.equal(found[3:], batch[6:])


def test_seeds_and_samples_make_a_difference(model):
    ids = prompts(1, 6)
    texts = {
        tuple(
            new_tokens(model, ids, first_sample=number, **(SAMPLING | {"seed": seed}))[0].tolist()
        )
        for seed in (0, 1, 5, 2**63 - 1)
        for number in (0, 1, 64)
    }
    assert len(texts) == 12


@pytest.mark.parametrize("K", [1, 3])
def test_the_global_generator_is_left_alone(model, K):
    state = torch.get_rng_state()
    new_tokens(model, prompts(2, 4), num_beams=K, **SAMPLING)
    assert torch.equal(torch.get_rng_state(), state)
    # and nothing is drawn from it
    first = new_tokens(model, prompts(2, 4), num_beams=K, **SAMPLING)
    torch.manual_seed(99)
    assert torch.equal(new_tokens(model, prompts(2, 4), num_beams=K, **SAMPLING), first)


@pytest.mark.parametrize("K", [1, 3])
def test_greedy_decoding_needs_no_noise(model, K):
    ids, mask = left_padded(3, 6)
    plain = new_tokens(model, ids, mask, num_beams=K)
    for options in ({"do_sample": False}, {"do_sample": True, "temperature": 0}):
        noisy = new_tokens(model, ids, mask, num_beams=K, noise="counter", seed=5, **options)
        assert torch.equal(noisy, plain)


def test_wrong_values():
    with pytest.raises(ValueError, match="noise"):
        GenerationConfig(noise="counter")
    with pytest.raises(ValueError, match="noise"):
        GenerationConfig(noise="white", seed=1)
    with pytest.raises(ValueError, match="first_sample"):
        GenerationConfig(noise="counter", seed=1, first_sample=-1)


# ---- what a draw is


def mix(x):
    """SplitMix64's finaliser, on Python's whole numbers."""
    word = 2**64 - 1
    x = x * 0x9E3779B97F4A7C15 & word
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & word
    x = (x ^ x >> 27) * 0x94D049BB133111EB & word
    return x ^ x >> 31


def test_the_hash_by_hand():
    seed, step = 2**63 - 5, 3
    p = torch.rand(4, 9).softmax(1)
    samples = torch.tensor([0, 1, 7, 10**12])
    found = CounterNoise(seed, samples).draw(p, 3, step)
    for row, sample in enumerate(samples.tolist()):
        key = mix(mix(sample + mix(seed)) + step)
        q = [-math.log(((mix(key + i) >> 11) + 0.5) / 2**53) for i in range(9)]
        order = sorted(range(9), key=lambda i: -p[row, i].item() / q[i])
        assert found[row].tolist() == order[:3]


def chi_square(observed, p):
    expected = p * observed.sum()
    return ((observed - expected) ** 2 / expected).sum().item()


P = torch.tensor([0.4, 0.3, 0.2, 0.1])
COUNT = 40_000


def counter_draws(count, seed=1, step=0):
    return CounterNoise(seed, torch.arange(COUNT)).draw(P.expand(COUNT, 4), count, step)


def stream_draws(count, seed=1, step=0):
    return StreamNoise(seed + step, torch.device("cpu")).draw(P.expand(COUNT, 4), count, step)


@pytest.mark.parametrize("draws", [counter_draws, stream_draws])
@pytest.mark.parametrize("step", [0, 1, 900])
def test_one_draw(draws, step):
    observed = torch.bincount(draws(1, step=step)[:, 0], minlength=4)
    assert chi_square(observed, P) < LIMIT[3]


@pytest.mark.parametrize("draws", [counter_draws, stream_draws])
def test_draws_without_replacement(draws):
    """Ordered pairs against enumeration: P(i, j) = p_i p_j / (1 - p_i)."""
    found = draws(2)
    assert (found[:, 0] != found[:, 1]).all()
    pairs = P[:, None] * P / (1 - P[:, None])  # (4, 4)
    off = ~torch.eye(4, dtype=torch.bool)
    observed = torch.bincount(found[:, 0] * 4 + found[:, 1], minlength=16).view(4, 4)
    assert chi_square(observed[off], pairs[off]) < LIMIT[11]
    # the first draw's marginal, and how often each is among the two
    assert chi_square(observed.sum(1), P) < LIMIT[3]
    inclusion = (pairs * off).sum(0) + (pairs * off).sum(1)
    rate = (observed.sum(0) + observed.sum(1)) / COUNT
    deviation = (inclusion * (1 - inclusion) / COUNT).sqrt()
    assert ((rate - inclusion).abs() < 4 * deviation).all()
    assert inclusion.sum().item() == pytest.approx(2)


def test_all_drawn_is_a_permutation():
    found = counter_draws(4)
    assert torch.equal(found.sort(1).values, torch.arange(4).expand(COUNT, 4))


def test_the_impossible_is_drawn_last():
    p = torch.tensor([0.0, 0.5, 0.0, 0.5, 1e-30]).expand(1000, 5)
    noise = CounterNoise(3, torch.arange(1000))
    assert set(noise.draw(p, 1, 0).flatten().tolist()) == {1, 3}
    assert set(noise.draw(p, 3, 0)[:, 2].tolist()) == {4}
    assert {tuple(sorted(row)) for row in noise.draw(p, 5, 0)[:, 3:].tolist()} == {(0, 2)}


def test_draws_are_independent():
    """Coins by seed, sample and step: no axis correlates with its neighbours."""
    R, S, D = 200, 24, 8
    half = torch.full((R, 2), 0.5)
    coins = torch.stack(
        [
            torch.stack(
                [CounterNoise(seed, torch.arange(R)).draw(half, 1, step)[:, 0] for step in range(S)]
            )
            for seed in range(D)
        ]
    )
    signs = coins.double() * 2 - 1  # (D, S, R)
    assert abs(signs.mean()) < 4 / math.sqrt(signs.numel())
    for axis in range(3):
        for lag in (1, 2, 5):
            n = signs.size(axis) - lag
            product = signs.narrow(axis, 0, n) * signs.narrow(axis, lag, n)
            assert abs(product.mean()) < 4 / math.sqrt(product.numel()), (axis, lag)
    # sample s at step t + 1 is not sample s + 1 at step t, nor seed d + 1 sample d
    for a, b in ((0, 1), (0, 2), (1, 2)):
        x = signs.narrow(a, 1, signs.size(a) - 1).narrow(b, 0, signs.size(b) - 1)
        y = signs.narrow(a, 0, signs.size(a) - 1).narrow(b, 1, signs.size(b) - 1)
        assert abs((x * y).mean()) < 4 / math.sqrt(x.numel()), (a, b)
    # columns of a wide row, by twos
    wide = CounterNoise(1, torch.arange(R)).draw(torch.full((R, 50), 0.02), 50, 0)
    place = wide.argsort(1).double()  # rank of each column
    centred = place - 24.5
    neighbours = (centred[:, 1:] * centred[:, :-1]).mean() / (centred**2).mean()
    assert abs(neighbours) < 4 / math.sqrt(R * 49) + 1 / 49


# ---- whole texts


@pytest.fixture(scope="module")
def enumerable(tmp_path_factory):
    """Seven tokens, so that all texts of two tokens can be told apart."""
    config = GPTConfig(
        vocab_size=7, block_size=16, n_layer=1, n_head=2, n_embd=10, bos_token_id=6, eos_token_id=6
    )
    model, _ = twins(tmp_path_factory.mktemp("enumerable"), config, seed=2)
    return model


@pytest.mark.parametrize("noise", ["counter", "hf"])
def test_texts_of_two_tokens_have_the_models_probabilities(enumerable, noise):
    ids = torch.tensor([[1, 2, 3]])
    options = {"do_sample": True, "top_k": 0, "temperature": 2.0, "eos_token_id": None}
    found = new_tokens(
        enumerable,
        ids,
        num_return_sequences=COUNT,
        max_new_tokens=2,
        noise=noise,
        seed=11,
        **options,
    )
    pairs = torch.cartesian_prod(torch.arange(7), torch.arange(7))
    with torch.no_grad():
        text = torch.cat([ids.expand(49, 3), pairs], dim=1)
        logp = (enumerable(text) / 2.0).log_softmax(-1)[:, 2:4]  # (49, 2, V)
    p = logp.gather(2, pairs[:, :, None]).sum((1, 2)).exp()
    assert p.sum().item() == pytest.approx(1, abs=1e-4)
    observed = torch.bincount(found[:, 0] * 7 + found[:, 1], minlength=49)
    # rare texts are counted together
    common = p * COUNT >= 5
    observed = torch.cat([observed[common], observed[~common].sum()[None]])
    p = torch.cat([p[common], p[~common].sum()[None]])
    if p[-1] * COUNT < 5:
        observed, p = observed[:-1], p[:-1]
    # the limit of 48 degrees holds for fewer
    assert chi_square(observed, p / p.sum()) < LIMIT[48]
    assert len(p) > 20


@pytest.mark.parametrize("noise", ["counter", "hf"])
def test_two_beams_end_with_the_best_two_of_four_draws(enumerable, noise):
    """A search of one step draws 4 of 7 without replacement: who is in, by enumeration."""
    ids = torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        p = enumerable(ids)[0, -1].div(3.0).softmax(0)
    options = {"do_sample": True, "top_k": 0, "temperature": 3.0, "eos_token_id": None}
    options |= {"num_beams": 2, "num_return_sequences": 2, "max_new_tokens": 1, "noise": noise}
    if noise == "hf":
        found = new_tokens(enumerable, ids.expand(4000, 3), seed=1, **options)
    else:
        # prompts of a batch share their samples' noise, so each search is made alone
        found = torch.cat(
            [new_tokens(enumerable, ids, seed=1, first_sample=i, **options) for i in range(500)]
        )
    searches = len(found) // 2
    inclusion = torch.zeros(7)
    for drawn in itertools.permutations(range(7), 4):
        # each draw is from what the draws before it left
        chance, left = 1.0, 1.0
        for i in drawn:
            chance, left = chance * p[i] / left, left - p[i]
        inclusion[sorted(drawn, key=lambda i: -p[i])[:2]] += chance
    rate = torch.bincount(found[:, 0], minlength=7) / searches
    deviation = (inclusion * (1 - inclusion) / searches).sqrt()
    # the least likely tokens are never among the best two: no deviation is allowed there
    assert ((rate - inclusion).abs() <= 4 * deviation).all() and (inclusion == 0).any()


def test_samples_share_nothing_but_the_prompt(model):
    """Neighbouring samples agree on a token as often as two independent draws would."""
    ids = prompts(1, 6)
    count = 4000
    found = new_tokens(
        model, ids, num_return_sequences=count, **(SAMPLING | {"max_new_tokens": 1})
    )[:, 0]
    with torch.no_grad():
        p = model(ids)[0, -1].softmax(0)
    agree = (p**2).sum().item()
    observed = (found[1:] == found[:-1]).double().mean().item()
    # neighbours share a sample, which adds covariance; five deviations leave room
    assert abs(observed - agree) < 5 * math.sqrt(agree * (1 - agree) / count)


# ---- few that can be drawn


def sparse(R, N, possible, seed):
    """Probabilities (R, N), about `possible` of each row above 0."""
    torch.manual_seed(seed)
    p = torch.rand(R, N) * (torch.rand(R, N) < possible / N)
    return p / p.sum(dim=1, keepdim=True)


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize(("R", "N", "count"), [(1, 5 * 997, 10), (4, 997, 1), (3, 997, 2)])
def test_torchs_stream_is_drawn_from_as_torch_draws(R, N, count, seed):
    p = sparse(R, N, 40, seed)
    generator = torch.Generator().manual_seed(seed)
    noise = StreamNoise(seed, torch.device("cpu"))
    for step in range(3):
        expected = torch.multinomial(p, count, generator=generator)
        assert torch.equal(noise.draw(p, count, step), expected)
    assert torch.equal(noise._generator.get_state(), generator.get_state())


def test_torchs_exponential_variables_are_made_of_uniform_ones():
    """If this fails nothing breaks: draws are torch.multinomial's again, and slower."""
    assert _stream_is_uniform()


@pytest.mark.parametrize("seed", range(5))
def test_a_few_are_drawn_as_all_are(seed):
    p = sparse(3, 997, 40, seed)
    noise = CounterNoise(seed, torch.tensor([4, 0, 9]))
    q = noise.exponential((3, 997), step=2)
    assert torch.equal(noise.draw(p, 5, 2), (p.double() / q).topk(5, dim=1).indices)


@pytest.mark.parametrize("count", [1, 3])
def test_the_few_are_picked_out(count):
    p = sparse(2, 997, 40, 0)
    assert _possible(p, count) is not None
    # most are possible; too few are; one is no probability
    assert _possible(torch.full((2, 997), 1 / 997), count) is None
    assert _possible(p * (p == p.amax(dim=1, keepdim=True)), count + 1) is None
    for bad in (-1.0, float("nan"), float("inf")):
        broken = p.clone()
        broken[1, 5] = bad
        assert _possible(broken, count) is None
        with pytest.raises(ValueError, match="do_sample"):
            StreamNoise(0, torch.device("cpu")).draw(broken, count, 0)
