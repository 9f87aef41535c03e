"""Each processor against its definition, and against transformers' on rows full of ties."""

import pytest
import torch
from transformers.generation import logits_process as theirs

from nanogpt2.config import GenerationConfig
from nanogpt2.generation import processors as ours

N, T, V = 3, 7, 11


@pytest.fixture(params=["smooth", "ties"])
def scores(request):
    scores = torch.randn(N, V) * 3
    return scores.round() if request.param == "ties" else scores


def ids(T=T, V=4):
    return torch.randint(V, (N, T))


@pytest.mark.parametrize("penalty", [0.5, 1.3, 2.0])
def test_repetition_penalty(scores, penalty):
    tokens, first = ids(), torch.tensor([0, 2, 6])
    expected = theirs.RepetitionPenaltyLogitsProcessor(penalty, first)(tokens, scores.clone())
    result = ours.penalise_repetition(tokens, scores, penalty, first)
    torch.testing.assert_close(result, expected)
    # by hand: once for each distinct token that is no padding
    for row in range(N):
        for v in range(V):
            s = scores[row, v].item()
            if v in tokens[row, first[row] :]:
                s = s * penalty if s < 0 else s / penalty
            assert result[row, v].item() == pytest.approx(s)


@pytest.mark.parametrize("n", [1, 2, 3, 7, 8])
def test_no_repeated_ngrams(scores, n):
    tokens = ids()
    result = ours.ban_repeated_ngrams(tokens, scores, n)
    expected = theirs.NoRepeatNGramLogitsProcessor(n)(tokens, scores.clone())
    torch.testing.assert_close(result, expected)
    if n < 3:
        assert result.isinf().any()


def test_a_row_that_repeats_nothing_is_left_alone(scores):
    tokens = torch.arange(T).expand(N, T)
    assert torch.equal(ours.ban_repeated_ngrams(tokens, scores, 2), scores)


@pytest.mark.parametrize("temperature", [0.1, 0.7, 3.0])
def test_temperature(scores, temperature):
    expected = theirs.TemperatureLogitsWarper(temperature)(ids(), scores.clone())
    torch.testing.assert_close(ours.scale_temperature(ids(), scores, temperature), expected)


@pytest.mark.parametrize("k", [1, 3, 11, 500])
def test_top_k(scores, k):
    result = ours.keep_top_k(ids(), scores, k)
    torch.testing.assert_close(result, theirs.TopKLogitsWarper(k)(ids(), scores.clone()))
    assert (result.isfinite().sum(1) >= min(k, V)).all()


@pytest.mark.parametrize("p", [0.0, 0.3, 0.9, 0.999])
def test_top_p(scores, p):
    result = ours.keep_top_p(ids(), scores, p)
    torch.testing.assert_close(result, theirs.TopPLogitsWarper(p)(ids(), scores.clone()))
    kept = result.isfinite()
    assert kept.any(1).all()
    # what is kept holds p at least; without its smallest it would not
    mass = scores.softmax(1)
    held = (mass * kept).sum(1)
    assert (held >= p - 1e-5).all()


def test_a_processor_leaves_its_input_alone(scores):
    before = scores.clone()
    ours.penalise_repetition(ids(), scores, 2.0, torch.zeros(N, dtype=torch.int64))
    ours.ban_repeated_ngrams(ids(), scores, 1)
    ours.scale_temperature(ids(), scores, 2.0)
    ours.keep_top_k(ids(), scores, 2)
    ours.keep_top_p(ids(), scores, 0.5)
    assert torch.equal(scores, before)


def test_the_order_is_transformers():
    config = GenerationConfig(
        do_sample=True,
        temperature=0.5,
        top_k=3,
        top_p=0.5,
        repetition_penalty=2.0,
        no_repeat_ngram_size=2,
    )
    chain = ours.processors_for(config, torch.ones(1, 1, dtype=torch.bool))
    assert [p.func for p in chain] == [
        ours.penalise_repetition,
        ours.ban_repeated_ngrams,
        ours.scale_temperature,
        ours.keep_top_k,
        ours.keep_top_p,
    ]
    plain = GenerationConfig(temperature=0.5, top_k=3, top_p=0.5)
    assert ours.processors_for(plain, torch.ones(1, 1, dtype=torch.bool)) == []
