"""What ends a text, against the definition and against transformers' stopping criteria.

A string stops a row at the token that completes it: the first step at which the string ends within
the last token's bytes.
"""

import random
from types import SimpleNamespace

import pytest
import torch
from reference import (
    GPT,
    TINY,
    assert_parity,
    assert_same_output,
    left_padded,
    our_output,
    prompts,
    their_output,
    twins,
)
from transformers import AutoTokenizer
from transformers.generation.stopping_criteria import StopStringCriteria

from nanogpt2.checkpoints.save import save_model
from nanogpt2.config import GenerationConfig, GPTConfig
from nanogpt2.generation import generate
from nanogpt2.generation.request import prepare
from nanogpt2.generation.stopping import Stopping, StopStrings
from nanogpt2.tokenizer import Tokenizer, byte_tokenizer, gpt2_tokenizer


def merging_tokenizer(*words):
    """Bytes, and these byte strings as tokens of their own, each built byte by byte."""
    alphabet = gpt2_alphabet()
    merges = []
    for word in words:
        shown = [alphabet[byte] for byte in word]
        merges += [f"{''.join(shown[:i])} {shown[i]}" for i in range(1, len(word))]
    return Tokenizer("merging", "\n".join(["#version: 0.2", *dict.fromkeys(merges)]) + "\n")


def gpt2_alphabet():
    # without merges an id is the byte's own value
    return {byte: char for char, byte in byte_tokenizer().vocabulary.items() if byte < 256}


CJK = "你好".encode()
# half characters, whole ones, and tokens that hold a stop string with text on both sides
MERGING = merging_tokenizer(b"ab", b"ba", b"abc", b"xaby", b"aabaa", CJK[1:3], CJK[2:5], CJK)
TOKENIZERS = {"bytes": byte_tokenizer(), "merging": MERGING}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """{name: (our model, their model, our tokenizer, their tokenizer)}, theirs read from files."""
    found = {}
    for name, tokenizer in TOKENIZERS.items():
        folder = tmp_path_factory.mktemp(name)
        size = tokenizer.vocab_size
        config = GPTConfig(
            vocab_size=size, block_size=64, n_layer=1, n_head=2, n_embd=14,
            bos_token_id=size - 1, eos_token_id=size - 1,
        )  # fmt: skip
        ours, theirs = twins(folder, config)
        save_model(ours, folder, tokenizer)
        found[name] = ours, theirs, tokenizer, AutoTokenizer.from_pretrained(folder)
    return found


def stops(check, ids):
    """For each prefix of `ids`, whether it stops."""
    return [bool(check(torch.tensor([ids[:n]]))[0]) for n in range(1, len(ids) + 1)]


def by_definition(strings, tokenizer, ids):
    """A string ends within the last token's bytes."""
    found = []
    for n in range(1, len(ids) + 1):
        text, before = (len(tokenizer.decode_bytes(ids[:i])) for i in (n, n - 1))
        whole = tokenizer.decode_bytes(ids[:n])
        ends = {
            end
            for string in map(str.encode, strings)
            for end in range(len(string), text + 1)
            if whole[end - len(string) : end] == string
        }
        found.append(any(before < end for end in ends))
    return found


def check_stops(saved, name, strings, ids):
    _, _, tokenizer, their_tokenizer = saved[name]
    ours = stops(StopStrings(strings, tokenizer).ended, ids)
    criteria = StopStringCriteria(their_tokenizer, strings)
    assert ours == by_definition(strings, tokenizer, ids), (strings, ids)
    assert ours == stops(lambda x: criteria(x, None), ids), (strings, ids)
    return ours


def bytes_of(text):
    return [*text.encode()]


@pytest.mark.parametrize(
    ("strings", "text", "step"),
    [
        (["end"], "the end.", 6),
        (["."], "the end.", 7),
        (["end", "he"], "the end.", 2),
        (["好"], "你好!", 5),
        # the first bytes of two characters are the same
        (["妽"], "你好", None),
        (["👋🏽"], "hi 👋🏽 there", 10),
        (["👋"], "hi 👋🏽 there", 6),
        (["🙂"], "hi 👋🏽 there", None),
        (["aab"], "aaab", 3),
        (["\n\n"], "one\n\ntwo", 4),
        (["é"], "café", 4),
    ],
)
def test_bytes(saved, strings, text, step):
    ids = bytes_of(text)
    found = check_stops(saved, "bytes", strings, ids)
    assert (found.index(True) if True in found else None) == step


def merged(*tokens):
    vocabulary = {MERGING.decode_bytes([i]): i for i in range(MERGING.vocab_size)}
    return [vocabulary[token if isinstance(token, bytes) else token.encode()] for token in tokens]


@pytest.mark.parametrize(
    ("strings", "tokens", "step"),
    [
        # inside one token, with text after it, before it, or both
        (["ab"], ["x", "abc"], 1),
        (["ba"], ["aabaa", "x"], 0),
        (["ab"], ["xaby"], 0),
        # across tokens, ending in the middle of one
        (["ca"], ["abc", "aabaa"], 1),
        (["bxa"], ["ab", "xaby"], 1),
        # it was complete before: the second token completes nothing
        (["ab"], ["ab", "x", "x"], 0),
        (["yy"], ["xaby", "xaby", "y"], 2),
        # half characters
        (["你"], [CJK[:1], CJK[1:3], "!"], 1),
        (["你"], [CJK[:2], CJK[2:5], "!"], 1),
        (["好"], [CJK[:2], CJK[2:5], CJK[5:]], 2),
        (["你好"], ["!", CJK], 1),
        (["好"], [CJK], 0),
        (["你好"], [CJK[:1], CJK[1:3], CJK[3:4], CJK[4:5], CJK[5:]], 4),
        # a string longer than all that was written
        (["ab" * 9], ["ab", "ab"], None),
    ],
)
def test_tokens_of_several_bytes(saved, strings, tokens, step):
    found = check_stops(saved, "merging", strings, merged(*tokens))
    assert (found.index(True) if True in found else None) == step


@pytest.mark.parametrize("name", TOKENIZERS)
def test_random_texts(saved, name):
    """Few different bytes, so that strings overlap themselves and each other."""
    rng, stopped = random.Random(1), 0
    tokenizer = TOKENIZERS[name]
    letters = "abxy" if name == "bytes" else "ab你好"
    likely = [
        i for i in range(tokenizer.vocab_size)
        if set(tokenizer.decode_bytes([i])) <= {*b"abxy", *CJK}
    ]  # fmt: skip
    for _ in range(60):
        strings = [
            "".join(rng.choices(letters, k=rng.randrange(1, 5))) for _ in range(rng.choice([1, 3]))
        ]
        for _ in range(4):
            stopped += sum(check_stops(saved, name, strings, rng.choices(likely, k=12)))
    assert stopped > 100


def test_gpt2s_own_vocabulary():
    """Emoji are split over tokens there, and words carry their space."""
    tokenizer = gpt2_tokenizer()
    for text, string in (
        ("Hello, my dear. How are you?\n\nFine.", "\n\n"),
        ("Hello, my dear. How are you?", "dear"),
        ("Hello, my dear. How are you?", "r. H"),
        ("Hello 🙂 and 👋🏽 you", "👋🏽"),
        ("漢字とかな", "かな"),
    ):
        ids = tokenizer.encode(text)
        found = stops(StopStrings([string], tokenizer).ended, ids)
        assert found == by_definition([string], tokenizer, ids) and any(found)


def scripted(text, prompt):
    """A prefix_allowed_tokens_fn that writes `text` after `prompt` tokens, then goes on with it."""
    return lambda number, ids: [text[(len(ids) - prompt) % len(text)]]


@pytest.mark.parametrize("K", [1, 3])
@pytest.mark.parametrize(
    ("prompt", "text", "strings", "new"),
    [
        ("say ", "one END two", ["END"], 7),
        ("say ", "one END two", "END", 7),
        ("say ", "one END two", ["two", "E"], 5),
        ("say EN", "Done, END", ["END"], 1),
        # all of it in the prompt: no new token completes it
        ("END ", "one two three", ["END"], 20),
        ("你", "好吗?", ["你好"], 3),
    ],
)
def test_generate_stops_where_transformers_does(saved, prompt, text, strings, new, K):
    ours, theirs, tokenizer, their_tokenizer = saved["bytes"]
    ids = torch.tensor([bytes_of(prompt)])
    options = {
        "max_new_tokens": 20,
        "num_beams": K,
        "stop_strings": strings,
        "prefix_allowed_tokens_fn": scripted(bytes_of(text), ids.size(1)),
    }
    expected = theirs.generate(
        ids, attention_mask=torch.ones_like(ids), tokenizer=their_tokenizer, **options
    )
    found = generate(ours, ids, tokenizer=tokenizer, **options).sequences
    assert torch.equal(found, expected) and found.size(1) == ids.size(1) + new


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("K", [1, 3])
@pytest.mark.parametrize("sample", [False, True])
def test_rows_stop_one_by_one(saved, name, K, sample):
    """Strings that random text meets now and then; the other rows go on."""
    ours, theirs, tokenizer, their_tokenizer = saved[name]
    strings, different = [chr(i) for i in range(32, 72)], 0
    for seed in range(8):
        ids, mask = left_padded(3, 5, seed, vocab_size=tokenizer.vocab_size)
        options = {"num_beams": K, "do_sample": sample, "max_new_tokens": 16, "pad_token_id": 3}
        options |= {"stop_strings": strings, "top_k": 0}
        torch.manual_seed(seed)
        expected = theirs.generate(ids, attention_mask=mask, tokenizer=their_tokenizer, **options)
        found = our_output(ours, ids, mask, seed, tokenizer=tokenizer, **options).sequences
        assert torch.equal(found, expected)
        different += len(set((found[:, 5:] == 3).sum(1).tolist())) > 1
    assert different > 2


@pytest.mark.parametrize("pad", [None, 0, 3])
def test_texts_that_only_a_string_ends_are_filled_with_minus_one(saved, pad):
    """Beams without an end token: transformers' filler there is no token, whatever the pad."""
    ours, theirs, tokenizer, their_tokenizer = saved["bytes"]
    filled = 0
    for seed in range(6):
        ids, mask = left_padded(2, 5, seed, vocab_size=257)
        options = {"num_beams": 3, "num_return_sequences": 3, "max_new_tokens": 12}
        options |= {"stop_strings": [chr(i) for i in range(32, 72)], "eos_token_id": None}
        options |= {"pad_token_id": pad}
        expected = their_output(theirs, ids, mask, seed, tokenizer=their_tokenizer, **options)
        found = our_output(ours, ids, mask, seed, tokenizer=tokenizer, **options)
        assert_same_output(found, expected, beams=True)
        filled += int((found.sequences == -1).sum())
    assert filled > 20


@pytest.mark.parametrize(
    "strings", ["", [""], ["end", ""], [], [3], 3, {"a": 1}, ["end", None], "\ud800"]
)
def test_no_stop_string_is_an_error(strings):
    tokenizer = byte_tokenizer()
    with pytest.raises(ValueError, match="stop_strings"):
        StopStrings(strings, tokenizer)
    model = GPT(GPTConfig(vocab_size=257, block_size=8, n_layer=1, n_head=1, n_embd=4))
    with pytest.raises(ValueError, match="stop_strings"):
        generate(model, torch.ones(1, 1, dtype=torch.int64), stop_strings=strings)
    with pytest.raises(ValueError, match="stop_strings"):
        generate(
            model, torch.ones(1, 1, dtype=torch.int64), stop_strings=strings, tokenizer=tokenizer
        )


# ---- end tokens, length, the clock


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return twins(tmp_path_factory.mktemp("twins"))


@pytest.fixture
def clock(monkeypatch):
    """A clock of our own for both libraries: `clock.now` in seconds."""
    clock = SimpleNamespace(now=100.0)
    fake = SimpleNamespace(monotonic=lambda: clock.now, time=lambda: clock.now)
    monkeypatch.setattr("nanogpt2.generation.stopping.time", fake)
    monkeypatch.setattr("transformers.generation.stopping_criteria.time", fake)
    return clock


@pytest.mark.parametrize("K", [1, 3])
@pytest.mark.parametrize(("seconds", "new"), [(0.5, 1), (3.5, 4), (4.0, 5), (99.0, 9)])
def test_time_runs_out(models, clock, K, seconds, new):
    """Each step takes a second; the one that goes past the limit is the last."""

    def tick(ids, scores):
        clock.now += 1
        return scores

    found = assert_parity(
        models,
        prompts(2, 4),
        max_time=seconds,
        max_new_tokens=9,
        eos_token_id=None,
        num_beams=K,
        logits_processor=[tick],
    )
    assert found.sequences.size(1) == 4 + new


@pytest.mark.parametrize("K", [1, 3])
@pytest.mark.parametrize("sample", [False, True])
def test_several_end_tokens(models, K, sample):
    ended_by = set()
    for seed in range(10):
        ids, mask = left_padded(3, 5, seed)
        options = {"eos_token_id": (4, 9, 17), "sequence_bias": [[[i], 3.0] for i in (4, 9, 17)]}
        found = assert_parity(
            models, ids, mask, seed, num_beams=K, do_sample=sample, pad_token_id=2, **options
        ).sequences
        for row in found[:, 5:].tolist():
            first = next((i for i in row if i in (4, 9, 17)), None)
            ended_by.add(first)
    assert {4, 9, 17} <= ended_by


def test_each_condition_alone():
    request = prepare(
        TINY,
        torch.device("cpu"),
        GenerationConfig(eos_token_id=(4, 9), max_new_tokens=3),
        torch.tensor([[4, 9]]),
    )
    stopping = Stopping(request)
    rows = torch.tensor([[4, 9, 1], [4, 9, 4], [4, 9, 9], [9, 4, 2]])
    assert stopping.ended(rows).tolist() == [False, True, True, False]
    assert stopping.ended(torch.ones(2, 4, dtype=torch.int64)).tolist() == [False, False]
    assert stopping.ended(torch.ones(2, 5, dtype=torch.int64)).tolist() == [True, True]
