"""GPT-2's ids equal tiktoken's and transformers' on a difficult corpus; bytes."""

import hashlib
import random
from itertools import pairwise

import pytest
import tiktoken
import tiktoken.load
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GPT2Tokenizer

from nanogpt2 import tokenizer as module
from nanogpt2.tokenizer import (
    ENCODER_JSON_SHA256,
    VOCAB_BPE_SHA256,
    byte_tokenizer,
    gpt2_tokenizer,
)


def difficult_corpus():
    rng = random.Random(0)
    planes = [chr(c) for c in range(0, 0x110000, 89) if not 0xD800 <= c < 0xE000]
    alphabet = ["\n", " ", "  ", "\t", "\r\n", "\x00", "\x1b[0m", "\u00a0", "\u3000", "\u200d"]
    alphabet += [
        "e\u0301",
        "🙂",
        "👩‍👩‍👧‍👦",
        "🏳️‍🌈",
        "'s",
        "'LL",
        "don't",
        "日本語",
        "ǅ",
        "½",
        "Ⅷ",
        "٣",
    ]
    alphabet += ["<|endoftext|>", "<|", "|>", "hello", " World", "!!!", "...", "—", "x" * 40]
    texts = ["", "".join(planes), "\ufeffbom", " \n \n ", "a" * 1000, " " * 1000, "\n" * 100]
    texts += ["".join(rng.choices(alphabet, k=rng.randrange(1, 40))) for _ in range(300)]
    texts += ["".join(rng.choices(planes, k=30)) for _ in range(300)]
    return texts


@pytest.fixture(scope="module")
def tiktokens(tmp_path_factory):
    """tiktoken's gpt2, loaded by its own loader from our two files instead of the network."""
    folder = tmp_path_factory.mktemp("tiktoken")
    (folder / "vocab.bpe").write_text(gpt2_tokenizer().merges, encoding="utf-8")
    (folder / "encoder.json").write_text(gpt2_tokenizer().encoder_json(), encoding="utf-8")
    from tiktoken_ext import openai_public

    real = tiktoken.load.data_gym_to_mergeable_bpe_ranks

    def local(vocab_bpe_file, encoder_json_file, **hashes):
        # the hashes are tiktoken's, so its loader checks our files
        files = (str(folder / "vocab.bpe"), str(folder / "encoder.json"))
        return real(*files, **hashes)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(openai_public, "data_gym_to_mergeable_bpe_ranks", local)
        patch.setenv("TIKTOKEN_CACHE_DIR", "")
        return tiktoken.Encoding(**openai_public.gpt2())


@pytest.fixture(scope="module")
def transformers_tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hf")
    (folder / "vocab.json").write_text(gpt2_tokenizer().encoder_json(), encoding="utf-8")
    (folder / "merges.txt").write_text(gpt2_tokenizer().merges, encoding="utf-8")
    return GPT2Tokenizer.from_pretrained(folder)


def test_the_ranks_are_openais():
    ours = gpt2_tokenizer()
    assert hashlib.sha256(ours.merges.encode()).hexdigest() == VOCAB_BPE_SHA256
    assert hashlib.sha256(ours.encoder_json().encode()).hexdigest() == ENCODER_JSON_SHA256
    assert (ours.vocab_size, ours.end_of_text) == (50257, 50256)


def test_damaged_ranks_are_refused(monkeypatch):
    monkeypatch.setattr(module, "VOCAB_BPE_SHA256", "0" * 64)
    with pytest.raises(ValueError, match="damaged"):
        gpt2_tokenizer.__wrapped__()


def test_ids_are_tiktokens(tiktokens):
    ours = gpt2_tokenizer()
    for text in difficult_corpus():
        assert ours.encode(text) == tiktokens.encode_ordinary(text)
        special = ours.encode(text, allow_special=True)
        assert special == tiktokens.encode(text, allowed_special="all")
        assert ours.decode(special) == tiktokens.decode(special)
        assert ours.decode(ours.encode(text)) == text


def test_ids_are_transformers(transformers_tokenizer):
    ours, theirs = gpt2_tokenizer(), transformers_tokenizer
    for text in difficult_corpus():
        assert ours.encode(text, allow_special=True) == theirs(text)["input_ids"]
        if "<|endoftext|>" not in text:
            assert ours.encode(text) == theirs(text)["input_ids"]
        ids = ours.encode(text)
        decoded = theirs.decode(ids, clean_up_tokenization_spaces=False)
        assert ours.decode(ids) == decoded


def test_the_special_token_in_text():
    ours = gpt2_tokenizer()
    assert ours.encode("a<|endoftext|>b", allow_special=True) == [64, 50256, 65]
    assert 50256 not in ours.encode("a<|endoftext|>b")
    assert ours.decode([64, 50256, 65]) == "a<|endoftext|>b"


@pytest.mark.parametrize("tokenizer", [gpt2_tokenizer(), byte_tokenizer()], ids=lambda t: t.name)
def test_an_id_outside_the_vocabulary_is_an_error(tokenizer):
    for i in (-1, tokenizer.vocab_size, 10**30):
        with pytest.raises(ValueError, match="outside the vocabulary"):
            tokenizer.decode([0, i])
    assert tokenizer.decode([]) == "" and tokenizer.encode("") == []


def test_bytes():
    ours = byte_tokenizer()
    assert (ours.vocab_size, ours.end_of_text) == (257, 256)
    for text in difficult_corpus():
        assert ours.encode(text) == list(text.encode())
        assert ours.decode(ours.encode(text)) == text
    assert ours.encode("a<|endoftext|>", allow_special=True) == [97, 256]


@pytest.mark.parametrize("tokenizer", [gpt2_tokenizer(), byte_tokenizer()], ids=lambda t: t.name)
@given(st.text())
@settings(deadline=None)
def test_any_text_comes_back(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


# ---- long texts

# what a window's end may part: words, blanks, contractions, characters, surrogate pairs
ALPHABETS = [
    "abcdefghijklmnopqrstuvwxyz",
    "ab",
    "a",
    " ",
    "\0",
    " \n\t\r",
    "0123456789",
    "!'#",
    "\n",
]
ALPHABETS += [
    "'",
    "=",
    "-=_*",
    "\u00c3\u00c2",
    "\u65e5\u672c\u8a9e",
    "\u00e9e\u0301\u0660\u2028\x1c",
    "\ud83d\ude00a",
]
ALPHABETS += [["'s", "'ll", "'", "x"], ["the", " of", "ing", " "], ["<|endoftext|>", "<|"]]
ALPHABETS += [["\U0001f600", "\U0001f469\u200d\U0001f469", "\u2764\ufe0f"]]


def long_text(rng):
    parts = []
    for _ in range(rng.randrange(1, 6)):
        alphabet = [*rng.choice(ALPHABETS), *rng.choice(["", *ALPHABETS])]
        parts += rng.choices(alphabet, k=rng.choice([1, 3, 30, 300, 3000]))
    return "".join(parts)


def test_a_long_text_has_the_ids_of_the_whole(monkeypatch, tiktokens):
    monkeypatch.setattr(module, "WINDOW", 1000)
    rng, ours = random.Random(1), gpt2_tokenizer()
    for _ in range(150):
        text = long_text(rng)
        assert ours.encode(text) == tiktokens.encode_ordinary(text), ascii(text)
        special = tiktokens.encode(text, allowed_special="all")
        assert ours.encode(text, allow_special=True) == special, ascii(text)


def test_a_seam_that_does_not_hold_moves_back(monkeypatch):
    # pairs of the other merge order appear wherever a window ends
    monkeypatch.setattr(module, "WINDOW", 100)
    monkeypatch.setattr(module, "OVERLAPS", (1, 2, 5, 10, 20, 40))
    rng, ours = random.Random(2), gpt2_tokenizer()
    for _ in range(300):
        text = "".join(rng.choices("etaoinshrdlu", k=500))
        assert ours.encode(text) == ours._encoding.encode_ordinary(text)


def test_a_contraction_at_a_seam_with_other_merges(monkeypatch):
    # without a token for 's, a window may start inside it, and "s" then joins the word behind
    monkeypatch.setattr(module, "WINDOW", 100)
    monkeypatch.setattr(module, "OVERLAPS", (5, 6, 7, 8, 12, 20))
    rng, ours = random.Random(3), module.Tokenizer("own", "#version: 0.2\ns o\nso n\nl l\nl s\n")
    for _ in range(300):
        text = "".join(rng.choices(["'s", "'ll", "'", "so", "son", "l", "!", " "], k=200))
        assert ours.encode(text) == ours._encoding.encode_ordinary(text)


class Engine:
    """tiktoken's encoding; keeps the length of the longest text that it was given."""

    def __init__(self, encoding):
        self.encoding, self.longest = encoding, 0

    def encode_ordinary(self, text):
        self.longest = max(self.longest, len(text))
        return self.encoding.encode_ordinary(text)

    def __getattr__(self, name):
        return getattr(self.encoding, name)


@pytest.mark.parametrize("part", ["a", " ", "\0", "\n", "'", "1", "\u65e5", "word ", "\U0001f600"])
def test_the_engine_sees_short_texts_whatever_the_text(monkeypatch, part):
    """A long word costs tiktoken 50 times its size, and a million blanks make it panic."""
    ours = gpt2_tokenizer()
    engine = Engine(ours._encoding)
    monkeypatch.setattr(ours, "_encoding", engine)
    text = part * (10 * module.WINDOW)
    assert ours.decode(ours.encode(text)) == text
    assert engine.longest < 2 * module.WINDOW
    # without a seam that holds, the text is cut at the window's end
    monkeypatch.setattr(module, "OVERLAPS", ())
    assert ours.decode(ours.encode(text)) == text
    assert engine.longest < 2 * module.WINDOW


def test_a_million_blanks():
    blanks = " " * 1_100_000
    assert gpt2_tokenizer().encode(blanks + "x") == [220] * 1_099_999 + [2124]


def test_a_row_of_a_tensor_is_decoded():
    ids = gpt2_tokenizer().encode("a sheep jumped")
    assert gpt2_tokenizer().decode(torch.tensor(ids)) == "a sheep jumped"


# ---- other merges


def are_merged(token, ranks):
    """Whether the merges lead from a token's bytes to the token, one after the other."""
    parts = list(token)
    while len(parts) > 1:
        found = [ranks.get(pair, len(ranks)) for pair in pairwise(parts)]
        at = found.index(min(found))
        if found[at] == len(ranks):
            return False
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return True


def test_which_merges_tiktoken_reproduces():
    """The border between two parts tells what all steps tell."""
    rng, counts = random.Random(1), [0, 0]
    for _ in range(2000):
        pool, pairs = list("abc"), []
        for _ in range(rng.randrange(1, 9)):
            pair = (rng.choice(pool), rng.choice(pool))
            if "".join(pair) not in pool:
                pairs.append(pair)
                pool.append("".join(pair))
        vocabulary = dict.fromkeys([*module.printable_bytes().values(), *pool], 0)
        ranks = {pair: rank for rank, pair in enumerate(pairs)}
        expected = all(are_merged("".join(pair), ranks) for pair in pairs)
        assert module.reproduces(pairs, vocabulary) == expected, pairs
        counts[expected] += 1
    assert min(counts) > 100
    lines = [tuple(line.split(" ")) for line in gpt2_tokenizer().merges.splitlines()[1:]]
    assert module.reproduces(lines, gpt2_tokenizer().vocabulary)
    assert not module.reproduces(lines[::-1], gpt2_tokenizer().vocabulary)
    assert not module.reproduces([*lines, lines[5]], gpt2_tokenizer().vocabulary)
    assert not module.reproduces(lines, {"a": 0})


def test_tokens_are_added_without_spelling_the_others_again():
    base, before = gpt2_tokenizer(), module._bytes.cache_info().misses
    base.with_added([f"<one of {i}>" for i in range(5)])
    assert module._bytes.cache_info().misses == before + 5


def test_tokens_added_to_a_tokenizer():
    for base in (gpt2_tokenizer(), byte_tokenizer()):
        grown = base.with_added(["<user>", "<user>s"])
        assert (
            grown.vocab_size == base.vocab_size + 2
            and base.encode("<user>")[-1] == base.encode(">")[0]
        )
        first = base.vocab_size
        assert grown.encode("a<user>s<user>") == [*base.encode("a"), first + 1, first]
        assert grown.decode([first, first + 1]) == "<user><user>s"
        assert grown != base and grown.key != base.key and grown.end_of_text == base.end_of_text
        assert grown == base.with_added(["<user>"]).with_added(["<user>s"])
        assert grown.encode("<|endoftext|>") == base.encode("<|endoftext|>")
        for text in ("", "a", "<user>", "<|endoftext|>", "\ud800<", "<\u00e9>"):
            with pytest.raises(ValueError, match="token"):
                grown.with_added([text])
