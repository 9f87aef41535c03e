"""Diverse beams: against the definition, one group, one text, one token at a time."""

import itertools
import random
from dataclasses import replace

import pytest
import torch
from reference import TINY, twins
from search_reference import (
    Kept,
    V,
    beam_options,
    best_continuations,
    best_first,
    check,
    left_padded,
)

from nanogpt2.config import GenerationConfig
from nanogpt2.generation import generate
from nanogpt2.generation.request import prepare
from nanogpt2.generation.search.diverse import diverse_search
from nanogpt2.tokenizer import byte_tokenizer

PAD = 3


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return twins(tmp_path_factory.mktemp("twins"))[0]


def reference(model, prompt, groups, size, penalty, count, options):
    new, eos = options["max_new_tokens"], options["eos_token_id"]
    rules = (options["length_penalty"], options["early_stopping"])
    running = [[(0.0, prompt)] for _ in range(groups)]
    kept = [Kept(size, len(prompt), new, eos, *rules) for _ in range(groups)]
    for _ in range(new):
        if all(one.over for one in kept):
            break
        chosen = []
        for g in range(groups):
            if kept[g].over:
                chosen += [PAD] * size
                continue
            penalties = [penalty * chosen.count(token) for token in range(V)]
            candidates = best_continuations(model, running[g], size, eos, penalties)
            for score, text in candidates[:size]:
                if text[-1] in eos:
                    kept[g].add(score, text)
            running[g] = [each for each in candidates if each[1][-1] not in eos][:size]
            chosen += [text[-1] for _, text in running[g]]
            kept[g].look_ahead(candidates[0][0], len(candidates[0][1]))
    for g in range(groups):
        if not kept[g].over:
            for score, text in running[g]:
                kept[g].add(score, text)
    return best_first(kept, count)


def test_tokens_and_scores_are_the_definitions(model):
    for case in range(40):
        rng = random.Random(case)
        prompts, ids, mask = left_padded(rng, PAD)
        groups, size = rng.choice([(2, 1), (2, 2), (3, 1), (3, 2)])
        penalty = rng.choice([0.1, 0.7, 2.5])
        options, count = beam_options(rng), rng.randrange(1, groups * size + 1)
        found = generate(
            model,
            ids,
            mask,
            num_beams=groups * size,
            num_beam_groups=groups,
            diversity_penalty=penalty,
            num_return_sequences=count,
            pad_token_id=PAD,
            **options,
        )
        expected = [reference(model, p, groups, size, penalty, count, options) for p in prompts]
        check(found, expected, prompts, ids, PAD, count)


def test_a_great_penalty_keeps_first_tokens_apart(model):
    options = {"num_beams": 6, "num_return_sequences": 6, "eos_token_id": None}
    options |= {"max_new_tokens": 1, "num_beam_groups": 6, "diversity_penalty": 1000.0}
    texts = generate(model, torch.tensor([[5, 6, 7]]), **options).sequences[:, -1]
    assert len(set(texts.tolist())) == 6
    options["diversity_penalty"] = 1e-6
    texts = generate(model, torch.tensor([[5, 6, 7]]), **options).sequences[:, -1]
    assert len(set(texts.tolist())) == 1


def test_the_penalty_comes_after_the_bias_and_before_the_others(model):
    """The second group pays for the token that the bias made the first one choose."""
    options = {"num_beams": 2, "num_beam_groups": 2, "max_new_tokens": 1, "output_scores": True}
    options |= {"eos_token_id": None, "num_return_sequences": 2, "diversity_penalty": 4.0}
    ids = torch.tensor([[9, 9]])
    plain = generate(model, ids, **options).scores[0]
    options |= {"sequence_bias": [[[9], 50.0]], "repetition_penalty": 2.0}
    first, second = generate(model, ids, **options).scores[0]
    logp = plain[0, 9].item()
    assert first[9].item() == pytest.approx((logp + 50) / 2, abs=1e-4)
    assert second[9].item() == pytest.approx((logp + 50 - 4) / 2, abs=1e-4)


def test_a_stop_string_ends_a_text(tmp_path):
    """As an end token of the same bytes does, but that it is written as it is."""
    tokenizer = byte_tokenizer()
    model = twins(tmp_path, replace(TINY, vocab_size=tokenizer.vocab_size))[0]
    options = {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.3, "pad_token_id": PAD}
    options |= {"num_return_sequences": 4, "max_new_tokens": 12, "early_stopping": True}
    ids = torch.tensor([tokenizer.encode("a b"), tokenizer.encode("c d")])
    strings = [chr(i) for i in range(1, 25)]
    ends = tuple(tokenizer.encode(string)[0] for string in strings)
    found = generate(
        model, ids, stop_strings=strings, tokenizer=tokenizer, eos_token_id=None, **options
    )
    # the first of the end ids, so that one text's token is what it is written as
    expected = generate(model, ids, eos_token_id=ends, **options)
    assert torch.equal(found.sequences_scores, expected.sequences_scores)
    assert found.sequences.shape == expected.sequences.shape
    ended = torch.isin(found.sequences, torch.tensor(ends))
    assert ended[:, 3:].any()
    assert torch.equal(found.sequences[~ended], expected.sequences[~ended])
    # where nearly all that is likely ends, nothing runs on past an end all the same
    strings = [chr(i) for i in range(1, 128)]
    ends = torch.tensor([tokenizer.encode(string)[0] for string in strings])
    options |= {"early_stopping": "never", "num_beams": 6, "num_beam_groups": 3}
    found = generate(
        model, ids, stop_strings=strings, tokenizer=tokenizer, eos_token_id=None, **options
    )
    for text, score in zip(found.sequences[:, 3:], found.sequences_scores, strict=True):
        new = text[: int((text != PAD).nonzero().max()) + 1]
        assert score < -1e30 or not torch.isin(new[:-1], ends).any()


def test_every_step_is_seen(model):
    config = GenerationConfig(
        num_beams=4, num_beam_groups=2, diversity_penalty=0.5, max_new_tokens=7, output_scores=True
    )
    request = prepare(model.config, torch.device("cpu"), config, torch.tensor([[1, 2], [3, 4]]))
    states = list(diverse_search(model, request))
    assert [state.running.ids.shape for state in states] == [
        (2, 4, 3 + step) for step in range(len(states))
    ]
    assert [state.done for state in states] == [False] * (len(states) - 1) + [True]
    assert all(scores.shape == (8, V) for scores in states[-1].scores)
    # a token's row holds the text it was added to
    for before, after in itertools.pairwise(states):
        rows = after.running.beams[:, :, -1].flatten().long()
        texts = before.running.ids.flatten(0, 1)[rows]
        assert torch.equal(texts, after.running.ids.flatten(0, 1)[:, :-1])
        assert (rows.view(2, 2, 2) // 2 == torch.tensor([[[0], [1]], [[2], [3]]])).all()


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"num_beams": 4, "num_beam_groups": 3}, "num_beam_groups must divide"),
        ({"num_beam_groups": 2}, "num_beam_groups must divide"),
        ({"num_beams": 4, "diversity_penalty": 0.5}, "diversity_penalty must come with"),
        ({"num_beams": 4, "num_beam_groups": 2}, "diversity_penalty must be > 0"),
        ({"num_beams": 4, "diversity_penalty": -0.5}, "diversity_penalty"),
    ]
    + [
        (
            {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.5} | other,
            next(iter(other)),
        )
        for other in ({"do_sample": True}, {"force_words_ids": [[1]]}, {"stochastic_beams": True})
    ],
)
def test_contradictions_are_said(options, named):
    with pytest.raises(ValueError, match=named):
        GenerationConfig(**options)
