"""generate(): transformers' tokens, for the same seed, whatever the options."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from reference import TINY, left_padded, prompts, their_output, twins

from nanogpt2.config import GenerationConfig
from nanogpt2.generation import generate
from nanogpt2.generation.beam import largest
from nanogpt2.generation.engine import Engine, context_start
from nanogpt2.generation.request import prepare
from nanogpt2.model import GPT


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return twins(tmp_path_factory.mktemp("twins"))


def their_tokens(theirs, ids, seed, attention_mask=None, **options):
    return their_output(theirs, ids, attention_mask, seed, **options).sequences


def check(models, ids, seed=0, mask=None, **options):
    ours, theirs = models
    options = {"max_new_tokens": 12} | options
    if mask is None:
        mask = torch.ones_like(ids)
    expected = their_tokens(theirs, ids, seed, attention_mask=mask, **options)
    torch.manual_seed(seed)
    by_global_seed = generate(ours, ids, mask, **options).sequences
    state = torch.get_rng_state()
    by_own_seed = generate(ours, ids, mask, seed=seed, **options).sequences
    assert torch.equal(torch.get_rng_state(), state), "a seed of its own moved the global generator"
    assert torch.equal(by_global_seed, expected), (options, by_global_seed, expected)
    assert torch.equal(by_own_seed, expected)
    return expected


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"repetition_penalty": 1.7},
        {"no_repeat_ngram_size": 1},
        {"no_repeat_ngram_size": 2},
        {"do_sample": True},
        {"do_sample": True, "top_k": 0},
        {"do_sample": True, "top_k": 1},
        {"do_sample": True, "temperature": 0.3},
        {"do_sample": True, "top_k": 0, "top_p": 0.4},
        {"do_sample": True, "num_return_sequences": 3},
        {"do_sample": True, "eos_token_id": tuple(range(10)), "pad_token_id": 3},
        {"eos_token_id": tuple(range(20))},
        {"max_new_tokens": None, "max_length": 11},
    ],
    ids=str,
)
@pytest.mark.parametrize("B", [1, 3])
def test_tokens_are_transformers(models, options, B):
    for seed in range(5):
        ids, mask = left_padded(B, 6, seed)
        check(models, ids, seed=seed, mask=mask, **options)


def test_the_mission_at_the_vocabulary_of_gpt2(tmp_path):
    from nanogpt2.config import GPTConfig

    config = GPTConfig(n_layer=2, n_head=3, n_embd=48, block_size=64)
    models = twins(tmp_path, config)
    ids = torch.randint(50257, (2, 9))
    options = {"do_sample": True, "temperature": 0.7, "top_k": 50, "no_repeat_ngram_size": 2}
    for seed in range(3):
        for beams in (1, 5):
            check(models, ids, seed=seed, num_beams=beams, num_return_sequences=2, **options)
        check(models, ids, seed=seed)


def test_defaults_are_transformers(models):
    ours, theirs = models
    ids = prompts(2, 4)
    expected = their_tokens(theirs, ids, 0)
    assert torch.equal(generate(ours, ids).sequences, expected)
    # 20 new tokens, but not past the context
    long = prompts(1, 30)
    assert torch.equal(generate(ours, long).sequences, their_tokens(theirs, long, 0))


def test_an_empty_prompt_starts_from_bos(models):
    ours, theirs = models
    found = generate(ours, torch.empty(1, 0, dtype=torch.int64), max_new_tokens=5).sequences
    assert found[0, 0] == TINY.bos_token_id
    assert torch.equal(found, their_tokens(theirs, None, 0, max_new_tokens=5))


@pytest.mark.parametrize("pad", [3, 60])
def test_padding_is_inferred_as_transformers_does(models, pad):
    """From the pad token, unless it ends a text: then pads are read as text."""
    ours, theirs = models
    ids, _ = left_padded(3, 6, seed=1, pad=pad)
    expected = their_tokens(theirs, ids, 0, max_new_tokens=8, pad_token_id=pad)
    assert torch.equal(generate(ours, ids, max_new_tokens=8, pad_token_id=pad).sequences, expected)


def test_eos_none_never_stops(models):
    ours, _ = models
    ids = prompts(1, 4)
    greedy = generate(ours, ids, max_new_tokens=10, eos_token_id=None).sequences[0].tolist()
    assert len(greedy) == 14
    stopped = generate(ours, ids, max_new_tokens=10, eos_token_id=greedy[6]).sequences[0].tolist()
    assert stopped == greedy[: 4 + greedy[4:].index(greedy[6]) + 1]


def test_a_row_is_the_same_alone_and_in_a_batch(models):
    ours, _ = models
    ids, mask = left_padded(4, 9, seed=3)
    batch = generate(ours, ids, mask, max_new_tokens=10).sequences
    for row in range(4):
        own = ids[row, mask[row] == 1][None]
        alone = generate(ours, own, max_new_tokens=10).sequences
        assert torch.equal(batch[row, 9:], alone[0, own.size(1) :])


def test_cached_decoding_gives_the_uncached_tokens(models):
    ours, _ = models
    ids = prompts(2, 5)
    expected = ids
    with torch.no_grad():
        for _ in range(20):
            expected = torch.cat([expected, ours(expected)[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(
        generate(ours, ids, max_new_tokens=20, eos_token_id=None).sequences, expected
    )


def test_temperature_0_is_greedy(models):
    ours, _ = models
    ids = prompts(2, 5)
    greedy = generate(ours, ids, max_new_tokens=9).sequences
    assert torch.equal(
        generate(ours, ids, do_sample=True, temperature=0, max_new_tokens=9).sequences, greedy
    )


# RowsDecoder, for float32 on a CPU, knows no dropout; model.py's forward, for float64, does
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("training", [True, False])
def test_eval_mode_is_forced_and_restored(models, training, dtype):
    from dataclasses import replace

    ours, model = GPT(TINY).eval(), GPT(replace(TINY, dropout=0.5))
    for each in (ours, model):
        each.load_state_dict(models[0].state_dict())
        each.to(dtype)
    model.train(training)
    ids = prompts(1, 4)
    for K in (1, 3):
        expected = generate(ours, ids, num_beams=K, max_new_tokens=9).sequences
        found = generate(model, ids, num_beams=K, max_new_tokens=9).sequences
        assert torch.equal(found, expected) and model.training is training
    with pytest.raises(ValueError, match="max_length"):
        generate(model, ids, max_length=4)
    assert model.training is training


def test_the_result_is_an_ordinary_tensor(models):
    found = generate(models[0], prompts(1, 4), max_new_tokens=2).sequences
    found += 1
    assert found.dtype == torch.int64 and found.shape == (1, 6)


@pytest.mark.parametrize(
    ("ids", "mask", "message"),
    [
        (torch.zeros(3, dtype=torch.int64), None, "input_ids"),
        (torch.zeros(0, 3, dtype=torch.int64), None, "input_ids"),
        (torch.zeros(1, 3), None, "input_ids"),
        (torch.tensor([[61]]), None, "token id 61"),
        (torch.tensor([[-1]]), None, "token id -1"),
        (torch.zeros(1, 3, dtype=torch.int64), torch.ones(1, 2), "attention_mask"),
    ],
)
def test_an_unusable_prompt_is_an_error(models, ids, mask, message):
    with pytest.raises(ValueError, match=message):
        generate(models[0], ids, mask)


def test_an_unknown_option_is_an_error(models):
    with pytest.raises(TypeError, match="top_q"):
        generate(models[0], prompts(1, 2), top_q=1)


# ---- past the end of the context


@pytest.mark.parametrize(("T", "new"), [(30, 60), (37, 5), (50, 3), (200, 100)])
def test_the_context_slides(models, T, new):
    """Against the definition: each token is greedy over the context that context_start tells."""
    ours, _ = models
    B = TINY.block_size
    ids = prompts(2, T)
    expected, start = ids, context_start(T, T + new, B)
    with torch.no_grad():
        for _ in range(new):
            if expected.size(1) - start > B:
                start = context_start(expected.size(1), T + new, B)
            token = ours(expected[:, start:])[:, -1:].argmax(-1)
            expected = torch.cat([expected, token], dim=1)
    found = generate(ours, ids, max_new_tokens=new, eos_token_id=None).sequences
    assert torch.equal(found, expected)


def test_the_context_slides_with_padding(models):
    ids, mask = left_padded(3, 35, seed=4)
    found = generate(models[0], ids, mask, max_new_tokens=50, eos_token_id=None, do_sample=True)
    assert found.sequences.shape == (3, 85)


@pytest.mark.parametrize(("T", "new"), [(30, 40), (50, 30)])
def test_beams_slide_together(models, T, new):
    """Each text's score is the sum of its log-probabilities over the contexts it slid through."""
    ours, _ = models
    ids, B = prompts(2, T), TINY.block_size
    found = generate(
        ours, ids, num_beams=4, num_return_sequences=4, max_new_tokens=new, eos_token_id=None
    )
    total, start = torch.zeros(8), context_start(T, T + new, B)
    with torch.no_grad():
        for length in range(T, T + new):
            if length - start > B:
                start = context_start(length, T + new, B)
            logp = ours(found.sequences[:, start:length])[:, -1].log_softmax(-1)
            total += logp.gather(1, found.sequences[:, length, None])[:, 0]
    torch.testing.assert_close(found.sequences_scores, total / new, rtol=1e-4, atol=1e-4)


def test_context_start_leaves_room():
    assert context_start(1024, 1124, 1024) == 0
    assert context_start(1500, 1600, 1024) == 576
    assert context_start(1500, 9000, 1024) == 1500 - 512


def test_sampling_draws_from_the_distribution(models):
    """Chi-square of 20,000 draws of one token against its probabilities."""
    ours, _ = models
    ids = prompts(1, 4)
    count = 20_000
    found = generate(
        ours, ids, do_sample=True, top_k=8, num_return_sequences=count, max_new_tokens=1, seed=3
    ).sequences[:, -1]
    with torch.no_grad():
        scores = ours(ids)[0, -1]
    kept = scores.topk(8)
    p = kept.values.softmax(0) * count
    observed = torch.bincount(found, minlength=TINY.vocab_size)[kept.indices]
    assert observed.sum() == count
    # 7 degrees of freedom: 24.3 is exceeded once in a thousand seeds
    assert ((observed - p) ** 2 / p).sum() < 24.3


def test_generation_config_names_are_transformers():
    from dataclasses import fields

    from transformers import GenerationConfig as Theirs

    known = {*vars(Theirs()), "seed", "noise", "first_sample", "stochastic_beams"}
    assert {f.name for f in fields(GenerationConfig)} <= known


WAYS = [
    {},
    {"do_sample": True},
    {"do_sample": True, "noise": "counter", "seed": 1},
    {"num_beams": 3},
    {"num_beams": 3, "do_sample": True},
    {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 1.0},
    {"num_beams": 3, "force_words_ids": [[5]]},
    {"num_beams": 3, "stochastic_beams": True},
    {"penalty_alpha": 0.5},
]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("options", WAYS, ids=str)
def test_a_model_that_is_no_number_writes_nothing(options, value):
    """One weight is enough, of a token that is not in the text."""
    model = GPT(TINY)
    with torch.no_grad():
        model.wte.weight[7] = value
    with pytest.raises(FloatingPointError, match="not finite"):
        generate(model, prompts(2, 5) % 7, max_new_tokens=4, **options)


def test_one_impossible_token_is_no_broken_model(models):
    config, ids = GenerationConfig(max_new_tokens=2), prompts(1, 4)
    request = prepare(models[0].config, torch.device("cpu"), config, ids)
    scores = torch.zeros(1, TINY.vocab_size)
    scores[0, 3] = float("-inf")
    engine = Engine(models[0], request)
    engine.decoder = SimpleNamespace(
        length=0,
        forked=True,
        read=lambda *a: torch.zeros(1, 4, TINY.n_embd),
        logits=lambda x: scores,
    )
    assert torch.equal(engine.next_scores(ids), scores)


MOST = 2**31 - 1


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"num_beams": MOST}, "num_beams"),
        ({"num_beams": MOST, "stochastic_beams": True}, "num_beams"),
        ({"num_return_sequences": MOST, "do_sample": True}, "num_return_sequences"),
        (
            {"num_return_sequences": 10**5, "max_new_tokens": MOST, "do_sample": True},
            "max_new_tokens",
        ),
    ],
    ids=str,
)
def test_what_no_memory_can_hold_is_said_at_once(models, options, named):
    with pytest.raises(ValueError, match=rf"^{named}\w* must be <= .* GiB of memory, not "):
        generate(models[0], prompts(2, 5), **options)


@pytest.mark.parametrize(
    ("options", "number"), [({"num_beams": 4}, 4), ({"penalty_alpha": 0.5, "top_k": 6}, 6), ({}, 1)]
)
def test_what_memory_is_counted(models, monkeypatch, options, number):
    """By hand: the new keys and values, scores and two copies, 64 bytes for each position."""
    cache = 2 * 2 * 24 * 20 * 4
    needed = number * 2 * (cache + 3 * 4 * 61 + 64 * 25)
    there = {"SC_PHYS_PAGES": needed, "SC_PAGE_SIZE": 1}
    monkeypatch.setattr("nanogpt2.memory.os.sysconf", there.get)
    generate(models[0], prompts(2, 5), max_new_tokens=20, **options)
    there["SC_PHYS_PAGES"] -= 1
    with pytest.raises(ValueError, match="GiB"):
        generate(models[0], prompts(2, 5), max_new_tokens=20, **options)


def test_beams_draw_from_what_multinomial_can(models):
    """2^24 continuations; a generator of our own has no such limit."""
    most = 2**24 // TINY.vocab_size
    options = {"num_beams": most, "do_sample": True, "seed": 1}
    config = GenerationConfig(**options)
    prepared = (TINY, torch.device("cpu"))
    prepare(*prepared, config, prompts(1, 3))
    for other in ({"noise": "counter"}, {"stochastic_beams": True}, {"do_sample": False}):
        prepare(*prepared, replace(config, num_beams=most + 1, **other), prompts(1, 3))
    with pytest.raises(ValueError, match=rf"num_beams must be <= {most} .*2\^24"):
        prepare(*prepared, replace(config, num_beams=most + 1), prompts(1, 3))


@pytest.mark.parametrize("options", WAYS, ids=str)
def test_a_pad_outside_the_vocabulary_is_refused(models, options):
    with pytest.raises(ValueError, match="pad_token_id must be below 61, not 61"):
        generate(models[0], prompts(2, 5), pad_token_id=61, **options)


@pytest.mark.parametrize("levels", [3, 100, None])
@pytest.mark.parametrize(("N", "K", "V"), [(2, 1, 9), (4, 2, 30), (6, 3, 2), (10, 5, 4000)])
def test_the_largest_are_those_of_topk(levels, N, K, V):
    """Which of two equal ones comes first is topk's secret, and decides what is generated."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        if levels is None:
            # only the first that is left out equals another, the last that is not
            total = torch.randperm(K * V, generator=generator).float()[None]
            total.view(K, V)[:-1] -= K * V
            values, places = total.topk(min(N + 1, K * V))
            total[0, places[0, -1]] = values[0, -2]
        else:
            total = -torch.randint(levels, (2, K * V), generator=generator).float()
            total[0, : V // 2] = -torch.inf
        assert torch.equal(largest(total, N, K), total.topk(N)[1])
