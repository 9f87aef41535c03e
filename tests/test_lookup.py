"""Prompt lookup: the same tokens as without, from fewer readings."""

import pytest
import torch
from reference import TINY, prompts, twins

from nanogpt2.config import GenerationConfig
from nanogpt2.cpu.decoder import CPUDecoder
from nanogpt2.cpu.inference_model import pack
from nanogpt2.generation import generate
from nanogpt2.generation.decoder import ModelDecoder
from nanogpt2.generation.lookup import look_up
from nanogpt2.model import GPT

LOOK = {"prompt_lookup_num_tokens": 4}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Says anything: most guesses are wrong."""
    return twins(tmp_path_factory.mktemp("model"))[0]


@pytest.fixture(scope="module")
def parrot():
    """Likes to say the last token again, as GPT-2 does before it has learnt anything."""
    torch.manual_seed(0)
    model = GPT(TINY).eval()
    model.wte.weight.data *= 20
    return model


@pytest.fixture
def seen(monkeypatch):
    """How many tokens each reading took, and how many each drop."""
    reads, drops = [], []
    for kind in (ModelDecoder, CPUDecoder):
        read, drop = kind.read, kind.drop

        def counted(self, ids, positions, mask, read=read):
            reads.append(ids.size(1))
            return read(self, ids, positions, mask)

        def dropped(self, count, drop=drop):
            drops.append(count)
            return drop(self, count)

        monkeypatch.setattr(kind, "read", counted)
        monkeypatch.setattr(kind, "drop", dropped)
    return reads, drops


def repeating(T, period, seed=0):
    """A text of the same few tokens over and over: int64 (1, T)."""
    return prompts(1, period, seed).repeat(1, T // period + 1)[:, :T]


def ids(*tokens):
    return torch.tensor(tokens)


@pytest.mark.parametrize(
    ("text", "most", "expected"),
    [
        ([1, 2, 3, 4, 9, 1, 2, 3], 2, [4, 9]),
        ([1, 2, 3, 4, 9, 1, 2, 3], 9, [4, 9, 1, 2, 3, 4, 9, 1, 2]),
        # the longer match before the later one
        ([7, 1, 2, 5, 8, 1, 2, 6, 7, 1, 2], 1, [5]),
        # of two equally long ones the later
        ([1, 2, 5, 1, 2, 6, 1, 2], 1, [6]),
        # over itself
        ([4, 4, 4, 4], 3, [4, 4, 4]),
        ([1, 2, 3], 9, []),
        ([1, 2, 1, 3], 9, []),
        ([1, 2, 1, 2], 0, []),
        ([1, 2, 1, 2], -3, []),
        ([1], 9, []),
    ],
)
def test_look_up(text, most, expected):
    assert look_up(ids(*text), most).tolist() == expected


WAYS = [
    {},
    {"do_sample": True, "seed": 3},
    {"do_sample": True, "seed": 3, "noise": "counter", "temperature": 0.5},
    {"repetition_penalty": 1.3},
    {"do_sample": True, "seed": 1, "top_k": 3, "no_repeat_ngram_size": 4},
    {"eos_token_id": (5, 17, 23), "min_new_tokens": 4},
]


@pytest.mark.parametrize("new", [1, 2, 20])
@pytest.mark.parametrize("options", WAYS, ids=str)
@pytest.mark.parametrize("which", ["model", "parrot"])
def test_the_same_tokens(request, which, options, new):
    model = request.getfixturevalue(which)
    for seed in range(8):
        ids = repeating(9 + seed % 5, 2 + seed % 4, seed)
        options = options | {"max_new_tokens": new, "output_scores": True}
        expected = generate(model, ids, **options)
        found = generate(model, ids, **options, **LOOK)
        assert torch.equal(found.sequences, expected.sequences)
        for ours, theirs in zip(found.scores, expected.scores, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-4)


def test_fewer_readings_where_a_text_repeats_itself(parrot, seen):
    reads, drops = seen
    for options in ({}, {"do_sample": True, "seed": 1}):
        reads.clear()
        found = generate(parrot, repeating(6, 3), max_new_tokens=30, **options, **LOOK)
        assert found.sequences.size(1) == 36
        # the prompt, then a token and its guess
        assert 6 <= reads[0] <= 10 and len(reads) < 20 and max(reads[1:]) == 5
    # what was read in vain is forgotten
    assert sum(drops) > 0


def test_past_the_context(model, parrot, seen):
    reads, _ = seen
    ids = repeating(30, 4)
    assert TINY.block_size < 30 + 60
    for each in (model, parrot):
        for options in ({}, {"do_sample": True, "seed": 4, "temperature": 0.3}):
            expected = generate(each, ids, max_new_tokens=60, **options)
            reads.clear()
            found = generate(each, ids, max_new_tokens=60, **options, **LOOK)
            assert torch.equal(found.sequences, expected.sequences)
    assert len(reads) < 40


def test_left_padding(parrot):
    ids = repeating(14, 3)
    mask = torch.ones_like(ids)
    ids[0, :4] = mask[0, :4] = 0
    expected = generate(parrot, ids, mask, max_new_tokens=15)
    found = generate(parrot, ids, mask, max_new_tokens=15, **LOOK)
    assert torch.equal(found.sequences, expected.sequences)


def test_several_prompts_are_decoded_as_ever(parrot, seen):
    options = {"max_new_tokens": 12, "do_sample": True, "seed": 2}
    expected = generate(parrot, prompts(3, 6), **options)
    found = generate(parrot, prompts(3, 6), **options, **LOOK)
    assert torch.equal(found.sequences, expected.sequences)
    assert set(seen[0]) == {1, 6}


@pytest.mark.parametrize("scheme", [None, "fp16", "int8"])
def test_packed_models(tmp_path, scheme):
    model = pack(twins(tmp_path)[0], scheme)
    for seed in range(4):
        ids = repeating(11, 3, seed)
        expected = generate(model, ids, max_new_tokens=25)
        assert torch.equal(
            generate(model, ids, max_new_tokens=25, **LOOK).sequences, expected.sequences
        )


def test_no_more_than_asked_for_is_guessed(parrot, seen):
    generate(parrot, repeating(12, 3), max_new_tokens=20, prompt_lookup_num_tokens=1)
    assert max(seen[0][1:]) == 2


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 2},
        {"penalty_alpha": 0.5, "top_k": 4},
        {"do_sample": True, "num_return_sequences": 2},
    ],
    ids=str,
)
def test_one_text_only(options):
    with pytest.raises(ValueError, match="left out with prompt_lookup_num_tokens"):
        GenerationConfig(**options, **LOOK)


def test_a_wrong_number():
    with pytest.raises(ValueError, match="prompt_lookup_num_tokens must be a whole number >= 1"):
        GenerationConfig(prompt_lookup_num_tokens=0)
