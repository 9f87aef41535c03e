"""Each processor against its definition, and against transformers' own.

On smooth rows, on rows full of ties, and on rows where other processors have banned tokens already.
"""

import math
from dataclasses import fields

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import TINY, their_output, twins
from transformers import GenerationMixin, LogitsProcessorList
from transformers.generation import logits_process as theirs

from nanogpt2.config import GenerationConfig
from nanogpt2.generation import processors as ours
from nanogpt2.generation.request import prepare

INF = float("inf")
N, T, V = 3, 7, 11
EOS = torch.tensor([2, 5])


@pytest.fixture(params=["smooth", "ties", "banned"])
def scores(request):
    scores = torch.randn(N, V) * 3
    if request.param == "ties":
        scores = scores.round()
    if request.param == "banned":
        scores[torch.rand(N, V) < 0.4] = -INF
        scores[:, 3] = 0.5  # something is left
    return scores


def ids(T=T, high=V):
    return torch.randint(high, (N, T))


def request_of(prompt=None, mask=None, user=(), allow=None, **options):
    """A request over a vocabulary of 61."""
    prompt = torch.tensor([[1, 2, 3]]) if prompt is None else prompt
    config = GenerationConfig(**options)
    return prepare(TINY, torch.device("cpu"), config, prompt, mask, None, user, allow)


def names(**options):
    return [name for name, _ in ours.processors_for(request_of(**options))]


def same(found, expected):
    """The same -inf mask, the same values."""
    assert torch.equal(found.isneginf(), expected.isneginf())
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


# ---- preferences and bans


@pytest.mark.parametrize("penalty", [0.5, 1.3, 2.0])
def test_repetition_penalty(scores, penalty):
    tokens, first = ids(), torch.tensor([0, 2, 6])
    expected = theirs.RepetitionPenaltyLogitsProcessor(penalty, first)(tokens, scores.clone())
    result = ours.penalise_repetition(tokens, scores, penalty, first)
    same(result, expected)
    # by hand: once for each distinct token that is no padding
    for row in range(N):
        for v in range(V):
            s = scores[row, v].item()
            if v in tokens[row, first[row] :]:
                s = s * penalty if s < 0 else s / penalty
            assert result[row, v].item() == pytest.approx(s)


def test_the_penalty_starts_where_the_padding_ends():
    prompt = torch.tensor([[0, 0, 7], [1, 2, 3]])
    mask = torch.tensor([[0, 0, 1], [1, 1, 1]])
    request = request_of(
        prompt, mask, repetition_penalty=2.0, do_sample=True, num_return_sequences=2
    )
    chain = dict(ours.processors_for(request))
    rows = prompt.repeat_interleave(2, dim=0)
    result = chain["repetition_penalty"](rows, torch.ones(4, 61))
    for row, seen in enumerate([{7}, {7}, {1, 2, 3}, {1, 2, 3}]):
        assert set((result[row] != 1).nonzero().flatten().tolist()) == seen


@pytest.mark.parametrize("n", [1, 2, 3, 7, 8])
def test_no_repeated_ngrams(scores, n):
    tokens = ids(high=4)
    result = ours.ban_repeated_ngrams(tokens, scores, n)
    same(result, theirs.NoRepeatNGramLogitsProcessor(n)(tokens, scores.clone()))
    for row in range(N):
        text = tokens[row].tolist()
        grams = {tuple(text[i : i + n]) for i in range(T - n + 1)}
        for v in range(V):
            banned = (*text[T - n + 1 :], v) in grams if n <= T else False
            expected = -INF if banned else scores[row, v].item()
            assert result[row, v].item() == expected


def test_no_ngram_is_banned_before_there_is_one(scores):
    tokens = torch.full((N, T), 4)
    for n, banned in ((T - 1, True), (T, True), (T + 1, False)):
        result = ours.ban_repeated_ngrams(tokens, scores, n)
        same(result, theirs.NoRepeatNGramLogitsProcessor(n)(tokens, scores.clone()))
        found = scores[:, 4].isfinite() & result[:, 4].isneginf()
        assert torch.equal(found, scores[:, 4].isfinite() & banned)


def test_a_row_that_repeats_nothing_is_left_alone(scores):
    tokens = torch.arange(T).expand(N, T)
    assert torch.equal(ours.ban_repeated_ngrams(tokens, scores, 2), scores)


BIASES = {
    (3,): 1.5,
    (4,): -2.0,
    (0, 3): 0.5,
    (1, 3): -4.0,
    (0, 1, 4): 2.0,
    (1, 1, 0): -INF,
    (0, 1, 0, 1, 0, 1, 0, 1, 0, 1): 9.0,
}


def test_sequence_bias(scores):
    bias = ours.SequenceBias(BIASES, request_of())
    # the vocabulary of the request is 61
    scores = torch.nn.functional.pad(scores, (0, 50))
    for seed in range(20):
        torch.manual_seed(seed)
        tokens = ids(high=2)
        result = bias(tokens, scores)
        same(result, theirs.SequenceBiasLogitsProcessor(BIASES)(tokens, scores.clone()))
        for row in range(N):
            text = tokens[row].tolist()
            for v in range(5):
                expected = scores[row, v].item()
                for sequence, value in BIASES.items():
                    n = len(sequence) - 1
                    if sequence[-1] == v and n <= T and tuple(text[T - n :]) == sequence[:-1]:
                        expected += value
                assert result[row, v].item() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("form", [dict, list])
def test_biases_as_transformers_writes_them(form):
    pairs = [[[3], 1.5], [[0, 3], 0.5]]
    value = {tuple(i): b for i, b in pairs} if form is dict else pairs
    request = request_of(torch.tensor([[0]]), sequence_bias=value)
    ((_, process),) = ours.processors_for(request)
    assert process(torch.tensor([[0]]), torch.zeros(1, 61))[0, 3] == 2.0


@pytest.mark.parametrize("words", [[[2], [7], [1, 1], [0, 1, 5]], [[2], [5]]])
def test_bad_words(words):
    """A word that is an end token stays; within a longer word an end token may be banned."""
    scores = torch.randn(N, 61)
    request = request_of(bad_words_ids=words, eos_token_id=(2, 5))
    ((_, process),) = ours.processors_for(request)
    if words == [[2], [5]]:
        # nothing is left to ban: transformers refuses, the sensible reading does nothing
        assert torch.equal(process(ids(), scores), scores)
        return
    for tokens in (ids(high=2) for _ in range(20)):
        result = process(tokens, scores)
        same(result, theirs.NoBadWordsLogitsProcessor(words, EOS)(tokens, scores.clone()))
        assert result[:, 7].isneginf().all() and result[:, 2].isfinite().all()


@pytest.mark.parametrize("length", [0, 6, 7, 8, 20])
def test_no_end_before(scores, length):
    result = ours.ban_before(ids(), scores, length, EOS)
    same(result, theirs.MinLengthLogitsProcessor(length, EOS)(ids(), scores.clone()))
    assert result[:, EOS].isneginf().all() == (length > T)


@pytest.mark.parametrize("new", [0, 1, 3])
def test_min_new_tokens_counts_from_the_prompts_end(new):
    tokens = torch.randint(61, (1, 3 + 2))
    scores = torch.randn(1, 61)
    request = request_of(min_new_tokens=new, min_length=40, eos_token_id=(2, 5))
    ((name, process),) = ours.processors_for(request)
    expected = theirs.MinNewTokensLengthLogitsProcessor(3, new, EOS)(tokens, scores.clone())
    same(process(tokens, scores), expected)
    assert name == "min_new_tokens", "it wins over min_length"
    assert process(tokens, scores)[0, 2].isneginf() == (new > 2)


def test_min_length_counts_the_prompt():
    request = request_of(min_length=4, eos_token_id=(2, 5))
    ((_, process),) = ours.processors_for(request)
    for length in (3, 4):
        tokens = torch.randint(61, (1, length))
        scores = torch.randn(1, 61)
        same(
            process(tokens, scores), theirs.MinLengthLogitsProcessor(4, EOS)(tokens, scores.clone())
        )


@pytest.mark.parametrize("groups", [1, 3])
def test_prefix_allowed_tokens(groups):
    """Rows in groups of beams; where all beams of a group have nothing left, what is allowed is."""
    scores = torch.randn(6, V)
    scores[3:, :4] = -INF
    tokens = torch.randint(V, (6, T))

    def fn(number, text):
        assert text.shape == (T,)
        return [number, 2] if text[-1] < 9 else [1, 8]

    result = ours.allow_only(tokens, scores, fn, groups)
    same(result, theirs.PrefixConstrainedLogitsProcessor(fn, groups)(tokens, scores.clone()))
    with pytest.raises(ValueError, match="prefix_allowed_tokens_fn"):
        ours.allow_only(tokens, scores, lambda number, text: [], groups)


def test_a_forced_first_token_comes_after_a_lone_one(scores):
    token = torch.tensor([4])
    for length in (1, 2):
        tokens = ids(length)
        result = ours.force_at(tokens, scores, 1, token)
        same(result, theirs.ForcedBOSTokenLogitsProcessor(4)(tokens, scores.clone()))
    assert ours.force_at(ids(1), scores, 1, token).isfinite().sum() == N


@pytest.mark.parametrize("token", [4, (4, 8)])
def test_a_forced_end_comes_last(token):
    request = request_of(forced_eos_token_id=token, max_new_tokens=4)
    ((_, process),) = ours.processors_for(request)
    their_token = token if isinstance(token, int) else list(token)
    expected = theirs.ForcedEOSTokenLogitsProcessor(7, their_token)
    for length in (5, 6, 7):
        tokens, scores = torch.randint(61, (1, length)), torch.randn(1, 61)
        result = process(tokens, scores)
        same(result, expected(tokens, scores.clone()))
        # six tokens are there: the seventh is the last
        assert result.isneginf().any() == (length == 6)


@pytest.mark.parametrize("start", [0, 2, 6])
def test_exponential_decay(scores, start):
    result = ours.raise_end(ids(), scores, 3 + start, 1.5, EOS)
    expected = theirs.ExponentialDecayLengthPenalty((start, 1.5), EOS, 3)(ids(), scores.clone())
    same(result, expected)
    over = T - 3 - start
    for row in range(N):
        for v in range(V):
            s = scores[row, v].item()
            if v in (2, 5) and over > 0 and math.isfinite(s):
                s += abs(s) * (1.5**over - 1)
            assert result[row, v].item() == pytest.approx(s)


def test_exponential_decay_stays_finite(scores):
    """999^200 is no float, and 999^50 no float32."""
    for past in (50, 200):
        result = ours.raise_end(torch.ones(2, past, dtype=torch.int64), scores, 0, 999.0, EOS)
        assert not result.isnan().any() and not result.isposinf().any()
        assert torch.equal(result.isneginf(), scores.isneginf())


def test_a_forced_token_beside_a_lone_suppressed_one():
    for forced, suppressed in ((5, 5), (5, [5]), ((5, 6), [6, 5])):
        with pytest.raises(ValueError, match="forced_eos_token_id"):
            names(forced_eos_token_id=forced, suppress_tokens=suppressed)
    expected = ["forced_eos_token_id", "suppress_tokens"]
    assert names(forced_eos_token_id=6, suppress_tokens=5) == expected


def test_exponential_decay_starts_after_the_prompt():
    request = request_of(exponential_decay_length_penalty=[2, 1.5], eos_token_id=(2, 5))
    ((_, process),) = ours.processors_for(request)
    for length in (3, 5, 6):
        tokens, scores = torch.randint(61, (1, length)), torch.randn(1, 61)
        expected = theirs.ExponentialDecayLengthPenalty((2, 1.5), EOS, 3)(tokens, scores.clone())
        same(process(tokens, scores), expected)
        assert torch.equal(process(tokens, scores), scores) == (length < 6)
    assert names(exponential_decay_length_penalty=[2, 1.5], eos_token_id=None) == []


def test_suppressed_tokens(scores):
    tokens = torch.tensor([1, 7])
    result = ours.ban(ids(), scores, tokens)
    same(result, theirs.SuppressTokensLogitsProcessor([1, 7])(ids(), scores.clone()))
    for length in (6, 7):
        found = ours.ban_at(ids(), scores, length, tokens)
        expected = theirs.SuppressTokensAtBeginLogitsProcessor([1, 7], length)
        same(found, expected(ids(), scores.clone()))


@pytest.mark.parametrize(("T", "forced", "begin"), [(1, None, 1), (1, 4, 2), (3, 4, 3)])
def test_where_a_text_begins(T, forced, begin):
    """A forced first token is not what the text begins with."""
    request = request_of(
        torch.ones(1, T, dtype=torch.int64), begin_suppress_tokens=[7], forced_bos_token_id=forced
    )
    process = dict(ours.processors_for(request))["begin_suppress_tokens"]
    for length in range(1, 6):
        result = process(torch.ones(1, length, dtype=torch.int64), torch.zeros(1, 61))
        assert result[0, 7].isneginf() == (length == begin)


def test_renormalised_scores_are_log_probabilities(scores):
    result = ours.renormalise(ids(), scores)
    same(result, theirs.LogitNormalization()(ids(), scores.clone()))
    torch.testing.assert_close(result.exp().sum(1), torch.ones(N))


# ---- the shape of the distribution


@pytest.mark.parametrize("temperature", [0.1, 0.7, 3.0])
def test_temperature(scores, temperature):
    expected = theirs.TemperatureLogitsWarper(temperature)(ids(), scores.clone())
    same(ours.scale_temperature(ids(), scores, temperature), expected)


@pytest.mark.parametrize("h", [0.01, 0.3, 0.7, 1.0])
def test_top_h(scores, h):
    result = ours.keep_top_h(ids(), scores, h)
    same(result, theirs.TopHLogitsWarper(h)(ids(), scores.clone()))
    assert result.isfinite().any(1).all()


def test_top_h_looks_at_100_tokens():
    scores = torch.randn(N, 300)
    result = ours.keep_top_h(ids(), scores, 1.0)
    same(result, theirs.TopHLogitsWarper(1.0)(ids(), scores.clone()))
    assert (result.isfinite().sum(1) <= 100).all()


@pytest.mark.parametrize("k", [1, 3, 11, 500])
def test_top_k(scores, k):
    result = ours.keep_top_k(ids(), scores, k)
    same(result, theirs.TopKLogitsWarper(k)(ids(), scores.clone()))
    for row in range(N):
        kth = sorted(scores[row].tolist())[-min(k, V)]
        expected = [s if s >= kth else -INF for s in scores[row].tolist()]
        assert result[row].tolist() == expected


def test_the_likeliest_is_that_of_argmax():
    """The first of equal ones; NaN before all."""
    scores = torch.randint(5, (7, 60)).float()
    scores[1], scores[2] = -torch.inf, torch.nan
    scores[3, 9], scores[4, 5:7] = torch.nan, torch.inf
    for each in (scores, scores[:, ::2], scores.double()):
        assert torch.equal(ours.likeliest(each), each.argmax(dim=1))


@pytest.mark.parametrize(("shape", "k"), [((3, 50_257), 50), ((2, 3, 4_000), 11), ((1, 64 * 8), 2)])
@pytest.mark.parametrize("levels", [3, 1000, None])
def test_the_best_are_those_of_topk(shape, k, levels):
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(shape, generator=generator)
    if levels is not None:
        scores = torch.randint(levels, shape, generator=generator).float()
    # none left but a few, the last one among them
    scores[0, ..., : -k // 2] = -torch.inf
    values, places = ours.best(scores, k)
    assert torch.equal(values, scores.topk(k).values)
    assert torch.equal(scores.gather(-1, places), values)
    assert (places.sort().values.diff() > 0).all()
    if levels is None:
        assert torch.equal(places[1:], scores.topk(k).indices[1:])
    # NaN counts as the largest
    scores[0, ..., 5] = torch.nan
    assert ours.best(scores, k)[0][0].isnan().sum() == torch.Size(shape[1:-1]).numel()


def test_top_k_keeps_ties():
    scores = torch.tensor([[3.0, 1.0, 1.0, 1.0, 0.0]])
    assert ours.keep_top_k(ids(), scores, 2).isfinite().tolist() == [[True] * 4 + [False]]


@pytest.mark.parametrize("keep", [1, 2, 4, 50])
@pytest.mark.parametrize("p", [0.0, 0.3, 0.9, 0.999])
def test_top_p(scores, p, keep):
    result = ours.keep_top_p(ids(), scores, p, keep)
    same(result, theirs.TopPLogitsWarper(p, min_tokens_to_keep=keep)(ids(), scores.clone()))
    for row in range(N):
        # what is kept holds p at least; without its least likely token it would not
        mass = scores[row].softmax(0)
        kept = mass[result[row].isfinite()]
        assert kept.sum() >= p - 1e-5
        assert len(kept) <= keep or kept.sum() - kept.min() < p + 1e-5


def wide(seed, spread):
    torch.manual_seed(seed)
    return torch.randn(3, 5003) * spread


@pytest.mark.parametrize("keep", [1, 3])
@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("spread", [2.0, 4.0])
def test_top_p_without_sorting_all(p, spread, keep):
    at_once = 0
    for seed in range(5):
        scores = wide(seed, spread)
        expected = theirs.TopPLogitsWarper(p, min_tokens_to_keep=keep)(None, scores)
        assert torch.equal(ours.keep_top_p(None, scores, p, keep), expected)
        at_once += ours._outside_top_p(scores, p, keep) is not None
    # what is flat, or hangs on rounding, is sorted after all
    assert at_once >= 3 or p in (0.0, 0.99) or (p, spread) == (0.9, 2.0)


def test_top_p_sorts_where_two_are_alike():
    scores = torch.full((1, 5003), -30.0)
    scores[0, [7, 4, 2000]] = 0.0
    assert ours._outside_top_p(scores, 0.5, 1) is None
    assert ours._outside_top_p(scores, 0.9, 1) is not None
    for p in (0.2, 0.5, 0.9):
        expected = theirs.TopPLogitsWarper(p)(None, scores)
        assert torch.equal(ours.keep_top_p(None, scores, p), expected)


def test_top_p_at_a_tie_of_masses():
    """Exactly p is held by two of four: no third is kept."""
    scores = torch.zeros(1, 4)
    result = ours.keep_top_p(ids(), scores, 0.5)
    same(result, theirs.TopPLogitsWarper(0.5)(ids(), scores.clone()))
    assert result.isfinite().sum() == 2


@pytest.mark.parametrize("keep", [1, 2, 4, 50])
@pytest.mark.parametrize("p", [0.0, 0.05, 0.3, 1.0])
def test_min_p(scores, p, keep):
    result = ours.keep_min_p(ids(), scores, p, keep)
    same(result, theirs.MinPLogitsWarper(p, min_tokens_to_keep=keep)(ids(), scores.clone()))
    if keep == 1:
        mass = scores.softmax(1)
        kept = mass >= p * mass.amax(1, keepdim=True)
        assert torch.equal(result, scores.masked_fill(~kept, -INF))


@pytest.mark.parametrize("keep", [1, 2, 4, 50])
@pytest.mark.parametrize("p", [0.05, 0.3, 0.9, 0.999])
def test_typical_p(scores, p, keep):
    result = ours.keep_typical(ids(), scores, p, keep)
    same(result, theirs.TypicalLogitsWarper(p, min_tokens_to_keep=keep)(ids(), scores.clone()))
    mass = scores.softmax(1)
    assert ((mass * result.isfinite()).sum(1) >= p - 1e-5).all()


@pytest.mark.parametrize("keep", [1, 2, 4, 50])
@pytest.mark.parametrize("epsilon", [0.01, 0.1, 0.5, 0.99])
def test_cutoffs(scores, epsilon, keep):
    for cut, warper in (
        (ours.cut_epsilon, theirs.EpsilonLogitsWarper),
        (ours.cut_eta, theirs.EtaLogitsWarper),
    ):
        result = cut(ids(), scores, epsilon, keep)
        same(result, warper(epsilon, min_tokens_to_keep=keep)(ids(), scores.clone()))
        kept = scores.topk(min(keep, V)).values.isfinite().sum(1)
        assert (result.isfinite().sum(1) >= kept).all()


def test_eta_is_lower_where_all_is_uncertain():
    sure, unsure = torch.tensor([[9.0, 0, 0, 0]]), torch.zeros(1, 4)
    assert ours.cut_eta(ids(), sure, 0.3).isfinite().sum() == 1
    # entropy log 4: sqrt(0.3) / 4 = 0.14 < 0.25
    assert ours.cut_eta(ids(), unsure, 0.3).isfinite().sum() == 4


WARPERS = [
    (ours.keep_top_h, theirs.TopHLogitsWarper, "h"),
    (ours.keep_top_p, theirs.TopPLogitsWarper, "p"),
    (ours.keep_min_p, theirs.MinPLogitsWarper, "p"),
    (ours.keep_typical, theirs.TypicalLogitsWarper, "p"),
    (ours.cut_epsilon, theirs.EpsilonLogitsWarper, "epsilon"),
    (ours.cut_eta, theirs.EtaLogitsWarper, "epsilon"),
]


@pytest.mark.parametrize(
    ("mine", "warper", "name"), WARPERS, ids=lambda x: getattr(x, "__name__", "")
)
@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    row=st.lists(
        st.one_of(st.floats(-20, 20, width=32), st.integers(-3, 3), st.just(-INF)),
        min_size=1,
        max_size=14,
    ).filter(lambda row: max(row) > -INF),
    share=st.floats(0.01, 0.99),
)
def test_any_row(mine, warper, name, row, share):
    scores = torch.tensor([row], dtype=torch.float32)
    expected = warper(share)(None, scores.clone())
    result = mine(None, scores, **{name: share})
    same(result, expected)
    assert result.isfinite().any()


def test_a_processor_leaves_its_input_alone(scores):
    before = scores.clone()
    tokens, first = ids(), torch.zeros(N, dtype=torch.int64)
    wide = torch.nn.functional.pad(scores, (0, 50))
    for process in (
        lambda i, s: ours.penalise_repetition(i, s, 2.0, first),
        lambda i, s: ours.ban_repeated_ngrams(i, s, 1),
        lambda i, s: ours.ban(i, s, EOS),
        lambda i, s: ours.ban_before(i, s, 20, EOS),
        lambda i, s: ours.ban_at(i, s, T, EOS),
        lambda i, s: ours.force_at(i, s, T, EOS),
        lambda i, s: ours.allow_only(i, s, lambda number, text: [1], 1),
        lambda i, s: ours.raise_end(i, s, 1, 2.0, EOS),
        ours.renormalise,
        lambda i, s: ours.scale_temperature(i, s, 2.0),
        lambda i, s: ours.keep_top_h(i, s, 0.5),
        lambda i, s: ours.keep_top_k(i, s, 2),
        lambda i, s: ours.keep_top_p(i, s, 0.5),
        lambda i, s: ours.keep_min_p(i, s, 0.5),
        lambda i, s: ours.keep_typical(i, s, 0.5),
        lambda i, s: ours.cut_epsilon(i, s, 0.5),
        lambda i, s: ours.cut_eta(i, s, 0.5),
    ):
        process(tokens, scores)
        assert torch.equal(scores, before)
    ours.SequenceBias(BIASES, request_of())(tokens, wide)
    assert torch.equal(wide[:, :V], before)


# ---- the chain


ALL = {
    "sequence_bias": [[[3], 1.0]],
    "repetition_penalty": 2.0,
    "no_repeat_ngram_size": 2,
    "bad_words_ids": [[4]],
    "min_new_tokens": 2,
    "forced_bos_token_id": 3,
    "forced_eos_token_id": 4,
    "exponential_decay_length_penalty": [1, 1.1],
    "suppress_tokens": [9],
    "begin_suppress_tokens": [8],
    "temperature": 0.5,
    "top_h": 0.9,
    "top_k": 30,
    "top_p": 0.9,
    "min_p": 0.01,
    "typical_p": 0.9,
    "epsilon_cutoff": 0.001,
    "eta_cutoff": 0.001,
    "renormalize_logits": True,
}


def user(tokens, scores):
    return scores


def allow(number, tokens):
    return [1, 2]


def test_the_order_is_transformers(tmp_path):
    """The list that transformers builds of the same options, class by class."""
    seen = []

    class Spy(LogitsProcessorList):
        def __call__(self, tokens, scores, **rest):
            seen.append([type(p).__name__ for p in self])
            return super().__call__(tokens, scores, **rest)

    merge_as_they_do = GenerationMixin._merge_criteria_processor_list

    def merge(built, own):
        merged = merge_as_they_do(hf, built, own)
        return Spy(merged) if type(built) is LogitsProcessorList else merged

    _, hf = twins(tmp_path)
    hf._merge_criteria_processor_list = merge
    options = ALL | {"do_sample": True, "max_new_tokens": 1}
    prompt = torch.tensor([[1, 2, 3]])
    their_output(
        hf,
        prompt,
        torch.ones_like(prompt),
        0,
        logits_processor=LogitsProcessorList([user]),
        prefix_allowed_tokens_fn=allow,
        **options,
    )
    request = request_of(user=(user,), allow=allow, **options)
    chain = ours.processors_for(request)
    expected = {
        "SequenceBiasLogitsProcessor": "sequence_bias",
        "RepetitionPenaltyLogitsProcessor": "repetition_penalty",
        "NoRepeatNGramLogitsProcessor": "no_repeat_ngram_size",
        "NoBadWordsLogitsProcessor": "bad_words_ids",
        "MinNewTokensLengthLogitsProcessor": "min_new_tokens",
        "PrefixConstrainedLogitsProcessor": "prefix_allowed_tokens_fn",
        "ForcedBOSTokenLogitsProcessor": "forced_bos_token_id",
        "ForcedEOSTokenLogitsProcessor": "forced_eos_token_id",
        "ExponentialDecayLengthPenalty": "exponential_decay_length_penalty",
        "SuppressTokensLogitsProcessor": "suppress_tokens",
        "SuppressTokensAtBeginLogitsProcessor": "begin_suppress_tokens",
        "function": "logits_processor",
        "TemperatureLogitsWarper": "temperature",
        "TopHLogitsWarper": "top_h",
        "TopKLogitsWarper": "top_k",
        "TopPLogitsWarper": "top_p",
        "MinPLogitsWarper": "min_p",
        "TypicalLogitsWarper": "typical_p",
        "EpsilonLogitsWarper": "epsilon_cutoff",
        "EtaLogitsWarper": "eta_cutoff",
        "LogitNormalization": "renormalize_logits",
    }
    # transformers makes a min_length of min_new_tokens, which says the same
    built = [name for name in seen[0] if name != "MinLengthLogitsProcessor"]
    assert [name for name, _ in chain] == [expected[name] for name in built]
    assert len(chain) == len(expected)


def test_greedy_decoding_shapes_nothing():
    shaping = ("temperature", "top_h", "top_k", "top_p", "min_p", "typical_p")
    assert names(**{name: ALL[name] for name in shaping}) == []
    assert names() == []
    # transformers' default
    assert names(do_sample=True) == ["top_k"]


@pytest.mark.parametrize(("eos", "keep"), [(None, 2), (3, 2), ((3, 4), 3), ((3, 4, 5), 4)])
@pytest.mark.parametrize("beams", [1, 2])
def test_beams_keep_a_token_beside_the_ends(eos, keep, beams):
    """min_tokens_to_keep: 1, or with beams one more than the end tokens."""
    options = {"top_k": 1, "top_p": 0.0, "min_p": 1.0, "epsilon_cutoff": 0.99, "eta_cutoff": 0.99}
    options |= {"typical_p": 0.01}
    scores = torch.linspace(0, 300, 61)[None]
    for name, value in options.items():
        settings = {"top_k": 0} | {name: value}
        request = request_of(eos_token_id=eos, do_sample=True, num_beams=beams, **settings)
        ((found, process),) = ours.processors_for(request)
        kept = process(torch.ones(1, 3, dtype=torch.int64), scores).isfinite().sum()
        assert (found, int(kept)) == (name, keep if beams > 1 else 1)


# ---- wrong values


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("sequence_bias", []),
        ("sequence_bias", {}),
        ("sequence_bias", 3),
        ("sequence_bias", [[3, 1.0]]),
        ("sequence_bias", [[[3], "much"]]),
        ("sequence_bias", [[[3], "1.5"]]),
        ("sequence_bias", [[[3], True]]),
        ("sequence_bias", [[[3], -(10**400)]]),
        ("sequence_bias", [[["3"], 1.0]]),
        ("sequence_bias", [["3", 1.0]]),
        ("sequence_bias", ["ab"]),
        ("sequence_bias", [[[3.0], 1.0]]),
        ("sequence_bias", [[[True], 1.0]]),
        ("sequence_bias", [[[61], 1.0]]),
        ("sequence_bias", [[[-1], 1.0]]),
        ("sequence_bias", [[[], 1.0]]),
        ("bad_words_ids", []),
        ("bad_words_ids", 3),
        ("bad_words_ids", [3]),
        ("bad_words_ids", [[]]),
        ("bad_words_ids", [[61]]),
        ("bad_words_ids", [[-1]]),
        ("bad_words_ids", [[1.5]]),
        ("suppress_tokens", "all"),
        ("suppress_tokens", [61]),
        ("suppress_tokens", [-1]),
        ("suppress_tokens", [True]),
        ("begin_suppress_tokens", [61]),
        ("forced_bos_token_id", 61),
        ("forced_bos_token_id", -1),
        ("forced_eos_token_id", 61),
        ("forced_eos_token_id", (1, 61)),
        ("exponential_decay_length_penalty", 3),
        ("exponential_decay_length_penalty", [3]),
        ("exponential_decay_length_penalty", "12"),
        ("exponential_decay_length_penalty", ["1", 2]),
        ("exponential_decay_length_penalty", [1, True]),
        ("exponential_decay_length_penalty", [1.0, 2.0]),
        ("exponential_decay_length_penalty", ["late", 1.1]),
        ("repetition_penalty", 0),
        ("repetition_penalty", -1.0),
        ("no_repeat_ngram_size", -1),
        ("min_length", -1),
        ("min_new_tokens", -1),
        ("temperature", -1.0),
        ("top_h", 0.0),
        ("top_h", 1.1),
        ("top_k", -1),
        ("top_p", -0.1),
        ("top_p", 1.1),
        ("min_p", 1.1),
        ("typical_p", 0.0),
        ("epsilon_cutoff", 1.0),
        ("eta_cutoff", -0.1),
        ("temperature", float("nan")),
        ("renormalize_logits", 1),
    ],
)
def test_a_wrong_value_is_an_error_that_names_its_option(name, value):
    assert name in {f.name for f in fields(GenerationConfig)}
    with pytest.raises(ValueError, match=name):
        ours.processors_for(request_of(do_sample=True, **{name: value}))


@pytest.mark.parametrize("name", ["forced_bos_token_id", "forced_eos_token_id"])
def test_a_forced_token_must_not_be_suppressed(name):
    with pytest.raises(ValueError, match=name):
        ours.processors_for(request_of(suppress_tokens=[4], **{name: 4}))
    assert names(suppress_tokens=[4], **{name: 5}) == [name, "suppress_tokens"]
