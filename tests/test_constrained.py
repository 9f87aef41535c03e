"""Constrained beams: against the definition, one text at a time, its words read anew each time."""

import random

import pytest
import torch
from reference import twins
from search_reference import (
    Kept,
    V,
    beam_options,
    best_continuations,
    best_first,
    check,
    left_padded,
    next_logp,
)

from nanogpt2.config import GenerationConfig
from nanogpt2.generation import generate
from nanogpt2.generation.request import prepare
from nanogpt2.generation.search.constrained import Constraints, constrained_search

# never in a prompt nor in a word
PAD = 60


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return twins(tmp_path_factory.mktemp("twins"))[0]


def holds(text, alternatives):
    return any(
        text[i : i + len(word)] == word for word in alternatives for i in range(len(text) + 1)
    )


def read(text, constraints):
    """Return (constraints not begun nor met, the one begun, what of it is written)."""
    pending, begun, written = list(range(len(constraints))), None, []
    for token in text:
        where = [begun] if begun is not None else pending
        leads_on = [
            c
            for c in where
            if any(word[: len(written) + 1] == [*written, token] for word in constraints[c])
        ]
        if leads_on:
            if begun is None:
                begun = leads_on[0]
                pending = [c for c in pending if c != begun]
            written = [*written, token]
            if written in constraints[begun]:
                begun, written = None, []
        elif begun is not None:
            pending, begun, written = [*pending, begun], None, []
    return pending, begun, written


def is_complete(text, constraints):
    pending, begun, _ = read(text, constraints)
    return not pending and begun is None


def bank(text, constraints):
    longest = max(len(word) for alternatives in constraints for word in alternatives)
    pending, begun, written = read(text, constraints)
    met = len(constraints) - len(pending) - (begun is not None)
    if begun is None:
        return met * longest
    return met * longest + longest - (max(map(len, constraints[begun])) - len(written))


def towards(text, constraints):
    """The tokens that make progress."""
    pending, begun, written = read(text, constraints)
    return {
        word[len(written)]
        for c in (pending if begun is None else [begun])
        for word in constraints[c]
        if word[: len(written)] == written
    }


def by_banks(texts, constraints, count):
    """The best of each run of equal banks, the second best of each, ..."""
    texts = sorted(texts, key=lambda each: -(100 * bank(each[1], constraints) + each[0]))
    ranks, last = [], None
    for _, text in texts:
        now = bank(text, constraints)
        ranks.append(ranks[-1] + 1 if now == last else 0)
        last = now
    return [texts[i] for i in sorted(range(len(texts)), key=lambda i: ranks[i])[:count]]


def reference(model, prompt, constraints, beams, count, options):
    new, eos = options["max_new_tokens"], options["eos_token_id"]
    rules = (options["length_penalty"], options["early_stopping"])
    running, kept = [(0.0, prompt)], Kept(beams, len(prompt), new, eos, *rules)
    for _ in range(new):
        candidates = best_continuations(model, running, beams, eos)
        for score, text in candidates[:beams]:
            if text[-1] in eos and is_complete(text, constraints):
                kept.add(score, text)
        texts = [each for each in candidates if each[1][-1] not in eos][:beams]
        for score, text in running:
            logp = next_logp(model, text)
            for token in towards(text, constraints):
                if [*text, token] not in [other for _, other in texts]:
                    texts.append((score + logp[token], [*text, token]))
        kept.look_ahead(candidates[0][0], len(candidates[0][1]))
        running = by_banks(texts, constraints, beams)
        if kept.over:
            return best_first([kept], count)
    complete = [each for each in running if is_complete(each[1], constraints)]
    for score, text in complete if len(complete) >= count else running:
        kept.add(score, text)
    return best_first([kept], count)


def random_words(rng, eos):
    allowed = [i for i in range(PAD) if i not in eos]
    # few of them, so that words overlap
    allowed = rng.sample(allowed, rng.choice([4, 12]))
    constraints = []
    for _ in range(rng.choice([1, 2, 3])):
        alternatives = []
        for _ in range(rng.choice([1, 1, 2, 3])):
            word = [rng.choice(allowed) for _ in range(rng.choice([1, 2, 3]))]
            if not any(a[: len(word)] == word or word[: len(a)] == a for a in alternatives):
                alternatives.append(word)
        constraints.append(alternatives)
    return constraints


def test_tokens_and_scores_are_the_definitions(model):
    for case in range(60):
        rng = random.Random(case)
        prompts, ids, mask = left_padded(rng, PAD)
        options, beams = beam_options(rng), rng.choice([2, 3, 4])
        constraints, count = random_words(rng, options["eos_token_id"]), rng.randrange(1, beams + 1)
        # a single alternative may be given as it is
        words = [c[0] if len(c) == 1 and rng.random() < 0.5 else c for c in constraints]
        found = generate(
            model,
            ids,
            mask,
            num_beams=beams,
            force_words_ids=words,
            num_return_sequences=count,
            pad_token_id=PAD,
            **options,
        )
        expected = [reference(model, p, constraints, beams, count, options) for p in prompts]
        check(found, expected, prompts, ids, PAD, count)


def test_progress_is_the_definitions():
    """Constraints that begin alike, words begun and lost: texts of four tokens are full of them."""
    for case in range(60):
        rng = random.Random(case)
        texts = [[rng.randrange(4) for _ in range(12)] for _ in range(50)]
        words = []
        for _ in range(rng.choice([2, 3, 4])):
            word = [rng.randrange(4) for _ in range(rng.choice([1, 2, 3]))]
            other = [word[0], (word[-1] + 1) % 4, rng.randrange(4)]
            words.append([word] if len(word) < 3 or other[:2] == word[:2] else [word, other])
        constraints = Constraints(words, torch.device("cpu"))
        progress = constraints.begin(torch.tensor(texts), 2)
        ahead = constraints.ahead(progress)
        for b, text in enumerate(texts):
            assert progress.complete()[b, 1].item() == is_complete(text, words)
            assert constraints.bank(progress)[b, 1].item() == bank(text, words)
            assert {*constraints.token[ahead[b, 1]].tolist()} == towards(text, words)


def test_the_words_are_written(model):
    ids = torch.tensor([[1, 2, 3], [7, 8, 9]])
    constraints = [[[30, 31]], [[40], [41, 42]], [[50]]]
    options = {"num_beams": 6, "max_new_tokens": 12}
    found = generate(model, ids, force_words_ids=constraints, eos_token_id=5, **options)
    for text in found.sequences.tolist():
        assert all(holds(text[3:], alternatives) for alternatives in constraints)
    plain = generate(model, ids, eos_token_id=5, **options)
    # words that a likely text would not hold cost something
    assert (found.sequences_scores < plain.sequences_scores).all()


def test_a_word_of_the_prompt_counts(model):
    ids = torch.tensor([[1, 20, 21, 3]])
    options = {"num_beams": 3, "max_new_tokens": 8, "early_stopping": True, "eos_token_id": None}
    plain = generate(model, ids, **options).sequences
    assert torch.equal(generate(model, ids, force_words_ids=[[20, 21]], **options).sequences, plain)


def test_every_step_is_seen(model):
    config = GenerationConfig(
        num_beams=3, force_words_ids=[[5, 6]], max_new_tokens=7, output_scores=True
    )
    request = prepare(model.config, torch.device("cpu"), config, torch.tensor([[1, 2], [3, 4]]))
    done = []
    for step, state in enumerate(constrained_search(model, request)):
        done.append(state.done)
        assert state.running.ids.shape == (2, 3, 3 + step)
        assert len(state.scores) == step + 1 and state.scores[step].shape == (6, V)
    assert done == [False] * (len(done) - 1) + [True]


@pytest.mark.parametrize(
    "value",
    [[], 5, [5], [[]], [[[]]], [[-1]], [[61]], [[1.5]], [["a"]], [[[1], 2]], "word"],
    ids=str,
)
def test_what_is_no_word_is_said(model, value):
    with pytest.raises(ValueError, match="force_words_ids must be a list of lists of ids"):
        generate(model, torch.tensor([[1]]), num_beams=2, force_words_ids=value)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([[[1, 2], [1, 2, 3]]], "a word that begins with it"),
        ([[[1, 2], [1, 2]]], "a word that begins with it"),
        ([[1, 9]], "an end token"),
    ],
)
def test_what_cannot_be_met_is_said(model, value, message):
    with pytest.raises(ValueError, match=message):
        generate(model, torch.tensor([[1]]), num_beams=2, force_words_ids=value, eos_token_id=9)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({}, "num_beams must be > 1"),
        ({"num_beams": 2, "do_sample": True}, "do_sample must be left out"),
        ({"num_beams": 2, "stop_strings": "."}, "stop_strings must be left out"),
        ({"num_beams": 2, "stochastic_beams": True}, "stochastic_beams must be left out"),
    ],
)
def test_contradictions_are_said(options, named):
    with pytest.raises(ValueError, match=named):
        GenerationConfig(force_words_ids=[[1]], **options)
