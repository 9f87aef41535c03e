"""GPT-2's ids equal tiktoken's and transformers' on a difficult corpus; bytes."""

import hashlib
import random

import pytest
import tiktoken
import tiktoken.load
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
