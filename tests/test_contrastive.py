"""Contrastive search: against the definition, one candidate at a time, nothing kept."""

import math
import random

import pytest
import torch
from reference import TINY, twins
from search_reference import V, left_padded

from nanogpt2.config import GenerationConfig, SampleConfig, parse
from nanogpt2.generation import generate

PAD = 3


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return twins(tmp_path_factory.mktemp("twins"))[0]


def cosine(a, b):
    dot = sum(x * y for x, y in zip(a, b, strict=True))
    return dot / math.sqrt(sum(x * x for x in a) * sum(y * y for y in b))


def hidden_states(model, ids):
    with torch.no_grad():
        return model.hidden_states(torch.tensor([ids]))[0].double().tolist()


def reference(model, prompt, alpha, k, new, eos):
    text = list(prompt)
    while len(text) < len(prompt) + new and not (len(text) > len(prompt) and text[-1] in eos):
        with torch.no_grad():
            p = model(torch.tensor([text]))[0, -1].double().softmax(0).tolist()
        value = {}
        for token in sorted(range(V), key=lambda token: -p[token])[:k]:
            *past, own = hidden_states(model, [*text, token])
            value[token] = (1 - alpha) * p[token] - alpha * max(cosine(own, h) for h in past)
        text.append(max(value, key=value.get))
    return text[len(prompt) :]


def test_tokens_are_the_definitions(model):
    for case in range(40):
        rng = random.Random(case)
        prompts, ids, mask = left_padded(rng, PAD)
        alpha, k, new = rng.choice([0.1, 0.5, 0.9]), rng.choice([2, 5, 11]), rng.randrange(1, 12)
        eos = tuple(rng.sample(range(V), rng.choice([1, 3])))
        options = {"max_new_tokens": new, "eos_token_id": eos, "pad_token_id": PAD}
        found = generate(model, ids, mask, penalty_alpha=alpha, top_k=k, **options).sequences
        for row, prompt in zip(found[:, ids.size(1) :].tolist(), prompts, strict=True):
            expected = reference(model, prompt, alpha, k, new, eos)
            assert row == expected + [PAD] * (len(row) - len(expected))


def test_alpha_0_is_greedy_and_1_is_not(model):
    ids = torch.tensor([[1, 2, 3], [4, 5, 6]])
    options = {"max_new_tokens": 20, "eos_token_id": None}
    greedy = generate(model, ids, **options).sequences
    assert torch.equal(generate(model, ids, penalty_alpha=0.0, **options).sequences, greedy)
    unlike = generate(model, ids, penalty_alpha=1.0, top_k=4, **options).sequences
    assert not torch.equal(unlike, greedy)


def test_processors_come_before_the_candidates(model):
    ids = torch.tensor([[1, 2, 3]])
    options = {"max_new_tokens": 25, "eos_token_id": None, "penalty_alpha": 0.3, "top_k": 5}
    text = generate(model, ids, no_repeat_ngram_size=1, **options).sequences[0].tolist()
    assert len(set(text)) == len(text)
    found = generate(model, ids, bad_words_ids=[[i] for i in range(50)], **options)
    assert (found.sequences[0, 3:] >= 50).all()


def test_a_top_k_beyond_the_vocabulary_is_all_of_it(model):
    ids = torch.tensor([[1, 2, 3]])
    every, more = (
        generate(model, ids, penalty_alpha=0.6, top_k=k, max_new_tokens=6).sequences
        for k in (V, 5 * V)
    )
    assert torch.equal(every, more)


def test_the_context_slides(model):
    """Past the context a token is chosen among the candidates that the shortened context has."""
    new = 2 * TINY.block_size
    options = {"penalty_alpha": 0.2, "top_k": 3, "max_new_tokens": new, "eos_token_id": None}
    found = generate(model, torch.tensor([[1, 2], [3, 4]]), output_scores=True, **options)
    assert found.sequences.shape == (2, 2 + new)
    for step, scores in enumerate(found.scores):
        best = scores.topk(3, dim=1).indices
        assert (best == found.sequences[:, 2 + step, None]).any(dim=1).all()


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"penalty_alpha": 0.5, "do_sample": True}, "do_sample must be left out"),
        ({"penalty_alpha": 0.5, "num_beams": 2}, "num_beams must be left out"),
        ({"penalty_alpha": 0.5, "top_k": 1}, "top_k must be > 1"),
        ({"penalty_alpha": 0.5, "top_k": 0}, "top_k must be > 1"),
        ({"penalty_alpha": 1.5}, "penalty_alpha must be a finite number >= 0 and <= 1"),
        ({"penalty_alpha": 0.5, "num_return_sequences": 2}, "num_return_sequences"),
    ],
)
def test_contradictions_are_said(options, named):
    with pytest.raises(ValueError, match=named):
        GenerationConfig(**options)


def test_top_k_needs_no_sampling_on_the_command_line(capsys):
    argv = ["--model", "demo", "--top_k", "4", "--penalty_alpha", "0.6"]
    generation = parse(SampleConfig, argv).generation
    assert (generation.top_k, generation.penalty_alpha, generation.do_sample) == (4, 0.6, False)
    with pytest.raises(SystemExit):
        parse(SampleConfig, [*argv, "--top_p", "0.9"])
    assert "--top_p" in capsys.readouterr().err
