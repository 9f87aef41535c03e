"""Stochastic beams: the distribution of draws without replacement, on a model with few texts."""

import itertools
from dataclasses import replace

import pytest
import torch
from reference import TINY, twins

from nanogpt2.config import GenerationConfig
from nanogpt2.generation import generate
from nanogpt2.generation.noise import CounterNoise
from nanogpt2.generation.request import prepare
from nanogpt2.generation.search import stochastic
from nanogpt2.generation.search.stochastic import stochastic_search

# texts of at most three tokens out of four, of which 3 ends: 3 + 9 + 27 longest, 1 + 3 + 9 ended
FEW = replace(TINY, vocab_size=4, bos_token_id=0, eos_token_id=3)
PROMPT, NEW, DRAWS = [1, 2], 3, 20_000


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return twins(tmp_path_factory.mktemp("few"), FEW, seed=5)[0]


@pytest.fixture(scope="module")
def big(tmp_path_factory):
    return twins(tmp_path_factory.mktemp("twins"))[0]


def all_texts(model, temperature=1.0, top_k=4):
    """{text: probability}, by asking the model for every beginning."""
    texts, beginnings = {}, {(): 1.0}
    for _ in range(NEW):
        longer = {}
        for beginning, p in beginnings.items():
            with torch.no_grad():
                logits = model(torch.tensor([[*PROMPT, *beginning]]))[0, -1].double() / temperature
            least = logits.sort(descending=True).values[top_k - 1]
            share = logits.masked_fill(logits < least, float("-inf")).softmax(0).tolist()
            longer |= {(*beginning, i): p * share[i] for i in range(4) if share[i] > 0}
        texts |= {text: p for text, p in longer.items() if text[-1] == 3 or len(text) == NEW}
        beginnings = {text: p for text, p in longer.items() if text[-1] != 3}
    assert sum(texts.values()) == pytest.approx(1)
    return texts


def draw(model, count, monkeypatch, noise, **options):
    """DRAWS times `count` texts, in draw order."""
    if noise == "counter":
        # generate() gives all prompts of a batch the same noise: here each has its own
        numbers = torch.arange(DRAWS)
        monkeypatch.setattr(stochastic, "make_noise", lambda request: CounterNoise(7, numbers))
    options = {"max_new_tokens": NEW, "seed": 11, "noise": noise} | options
    found = generate(
        model,
        torch.tensor([PROMPT]).expand(DRAWS, -1),
        num_beams=count,
        stochastic_beams=True,
        num_return_sequences=count,
        **options,
    )
    new = found.sequences[:, len(PROMPT) :].tolist()
    texts = [tuple(row[: row.index(3) + 1]) if 3 in row else tuple(row) for row in new]
    return list(zip(*[iter(texts)] * count, strict=True)), found


def chi_square(observed, expected):
    """The statistic and its degrees of freedom; cells of less than 5 are put together."""
    cells = {k: v for k, v in expected.items() if v >= 5}
    rest = sum(expected.values()) - sum(cells.values())
    others = sum(n for k, n in observed.items() if k not in cells)
    statistic = sum((observed.get(k, 0) - v) ** 2 / v for k, v in cells.items())
    if rest >= 5:
        statistic += (others - rest) ** 2 / rest
    return statistic, len(cells) - 1 + (rest >= 5)


def too_great(freedom):
    """Exceeded once in about ten thousand seeds (Wilson and Hilferty 1931)."""
    return freedom * (1 - 2 / (9 * freedom) + 3.72 * (2 / (9 * freedom)) ** 0.5) ** 3


@pytest.mark.parametrize("noise", ["hf", "counter"])
@pytest.mark.parametrize(
    "options", [{}, {"do_sample": True, "temperature": 1.7, "top_k": 3}], ids=["plain", "shaped"]
)
def test_pairs_are_drawn_without_replacement(model, monkeypatch, noise, options):
    """P(first a, then b) = p(a) p(b) / (1 - p(a))."""
    shape = {name: options[name] for name in ("temperature", "top_k") if options}
    p = all_texts(model, **shape)
    drawn, _ = draw(model, 2, monkeypatch, noise, **options)
    assert all(a != b and a in p and b in p for a, b in drawn)
    observed = {pair: drawn.count(pair) for pair in {*drawn}}
    expected = {(a, b): DRAWS * p[a] * p[b] / (1 - p[a]) for a, b in itertools.permutations(p, 2)}
    statistic, freedom = chi_square(observed, expected)
    assert freedom > 50 and statistic < too_great(freedom)


@pytest.mark.parametrize("noise", ["hf", "counter"])
def test_inclusion_probabilities_of_three(model, monkeypatch, noise):
    """How often a text is among three, by summing over all orders."""
    p = all_texts(model)
    included = dict.fromkeys(p, 0.0)
    for a, b, c in itertools.permutations(p, 3):
        probability = p[a] * p[b] / (1 - p[a]) * p[c] / (1 - p[a] - p[b])
        for text in (a, b, c):
            included[text] += probability
    drawn, found = draw(model, 3, monkeypatch, noise)
    for text, probability in included.items():
        share = sum(text in triple for triple in drawn) / DRAWS
        deviation = (probability * (1 - probability) / DRAWS) ** 0.5
        assert abs(share - probability) < 4.5 * deviation + 1e-4
    # a text's score is its log-probability
    scores = found.sequences_scores.view(-1, 3).tolist()
    for triple, theirs in zip(drawn[:200], scores, strict=False):
        for text, score in zip(triple, theirs, strict=True):
            assert score == pytest.approx(torch.tensor(p[text]).log().item(), abs=1e-4)


def test_as_many_beams_as_texts_find_them_all(model):
    p = all_texts(model)
    options = {"num_beams": len(p) + 4, "num_return_sequences": len(p) + 4, "seed": 1}
    found = generate(
        model, torch.tensor([PROMPT]), stochastic_beams=True, max_new_tokens=NEW, **options
    )
    new = found.sequences[:, len(PROMPT) :].tolist()
    texts = [tuple(row[: row.index(3) + 1]) if 3 in row else tuple(row) for row in new]
    assert {*texts[: len(p)]} == {*p}
    assert found.sequences_scores[: len(p)].exp().sum().item() == pytest.approx(1, abs=1e-5)
    # there are no others
    assert (found.sequences_scores[len(p) :] == -1e9).all()


def test_sampling_options_shape_the_distribution_to_the_last(big):
    """Plain beams keep more than top_k 1; then there would be other texts."""
    options = {"num_beams": 3, "num_return_sequences": 3, "max_new_tokens": 6, "seed": 1}
    ids = torch.tensor([[1, 2, 3]])
    found = generate(big, ids, stochastic_beams=True, do_sample=True, top_k=1, **options)
    assert torch.equal(found.sequences[:1], generate(big, ids, max_new_tokens=6).sequences)
    assert found.sequences_scores.tolist() == [0, -1e9, -1e9]


def test_a_draw_can_be_made_again_alone_and_in_any_batch(big):
    ids = torch.tensor([[0, 0, 5], [1, 2, 3], [0, 8, 9]])
    mask = torch.tensor([[0, 0, 1], [1, 1, 1], [0, 1, 1]])
    options = {"stochastic_beams": True, "num_beams": 4, "num_return_sequences": 4, "seed": 3}
    options |= {"noise": "counter", "max_new_tokens": 9, "first_sample": 6, "eos_token_id": None}
    batch = generate(big, ids, mask, **options).sequences.view(3, 4, -1)
    for row in range(3):
        alone = generate(big, ids[row, mask[row] == 1][None], **options).sequences
        assert torch.equal(batch[row, :, 3:], alone[:, -9:])
    other = generate(big, ids, mask, **options | {"first_sample": 7}).sequences.view(3, 4, -1)
    assert not torch.equal(batch, other)


def test_a_seed_makes_a_draw_again_and_leaves_the_global_generator(big):
    ids = torch.tensor([[1, 2, 3]])
    options = {"stochastic_beams": True, "num_beams": 4, "max_new_tokens": 9}
    state = torch.get_rng_state()
    a, b, c = (generate(big, ids, seed=seed, **options).sequences for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(a, b) and not torch.equal(a, c)


def test_processors_ban(big):
    options = {"stochastic_beams": True, "num_beams": 5, "num_return_sequences": 5, "seed": 0}
    ids = torch.tensor([[1, 2]])
    banned = [[i] for i in range(50)]
    found = generate(big, ids, bad_words_ids=banned, max_new_tokens=8, **options).sequences
    assert (found[:, 2:] >= 50).all()
    assert len({tuple(row) for row in found.tolist()}) == 5


def test_every_step_is_seen(big):
    config = GenerationConfig(
        stochastic_beams=True,
        num_beams=3,
        max_new_tokens=8,
        seed=4,
        eos_token_id=tuple(range(15)),
        pad_token_id=30,
    )
    request = prepare(big.config, torch.device("cpu"), config, torch.tensor([[20, 21], [22, 23]]))
    states = list(stochastic_search(big, request))
    assert [state.done for state in states] == [False] * (len(states) - 1) + [True]
    for state in states:
        ended = torch.isin(state.running.ids[:, :, 2:], torch.arange(15)).any(dim=2)
        full = state.running.ids.size(2) == 10
        assert torch.equal(state.is_finished, ended | full)
        # a text's last token is the one it ended with
        lengths = (state.finished.beams >= 0).sum(dim=2)
        last = state.finished.ids.gather(2, (lengths + 1)[:, :, None]).squeeze(2)
        assert (last[ended] < 15).all() and (lengths[~ended] == state.running.ids.size(2) - 2).all()


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"num_beams": 1}, "num_beams must be > 1"),
        ({"do_sample": True, "temperature": 0.0}, "temperature must be > 0"),
        ({"length_penalty": 2.0}, "length_penalty must be left out"),
        ({"early_stopping": True}, "early_stopping must be left out"),
        ({"num_return_sequences": 4}, "num_return_sequences"),
    ],
)
def test_contradictions_are_said(options, named):
    with pytest.raises(ValueError, match=named):
        GenerationConfig(**{"stochastic_beams": True, "num_beams": 3} | options)
