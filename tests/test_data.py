"""Texts to ids to batches: what is read, what is held out, in which order."""

from itertools import pairwise

import numpy as np
import pytest
import torch

from nanogpt2.data.corpus import SHORTEST, VALIDATION_MOST, load_corpus, read_text, read_texts
from nanogpt2.data.loader import BatchLoader, validation_batches
from nanogpt2.tokenizer import byte_tokenizer, gpt2_tokenizer

BYTES = byte_tokenizer()


def test_a_file_and_a_folder(tmp_path):
    (tmp_path / "b.txt").write_text("second")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub/c.txt").write_bytes(b"\xef\xbb\xbfthird")
    (tmp_path / "a.txt").write_text("first")
    (tmp_path / "blank.txt").write_text(" \n")
    (tmp_path / "ignored.md").write_text("no")
    assert read_texts(str(tmp_path)) == ["first", "second", "third"]
    assert read_texts(str(tmp_path / "b.txt")) == ["second"]


def test_pydocs_is_the_language_reference():
    texts = read_texts("pydocs")
    assert len(texts) > 50 and any("lambda" in text for text in texts)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"good \xff bad", "byte 0xff at offset 5"),
        ("UTF-16 is not UTF-8".encode("utf-16"), "byte 0xff at offset 0"),
        (b"cut \xe2\x82", "byte 0xe2 at offset 4"),
    ],
)
def test_a_text_that_is_not_utf8_names_the_byte(tmp_path, data, message):
    path = tmp_path / "book.txt"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=message) as raised:
        read_text(path)
    assert str(path) in str(raised.value)


@pytest.mark.parametrize("text", ["", "  \n\n", "\ufeff"])
def test_an_empty_corpus(tmp_path, text):
    (tmp_path / "book.txt").write_text(text)
    with pytest.raises(ValueError, match="empty"):
        load_corpus(str(tmp_path / "book.txt"), BYTES)
    with pytest.raises(ValueError, match="empty"):
        load_corpus(str(tmp_path), BYTES)


def test_a_corpus_too_short(tmp_path):
    path = tmp_path / "book.txt"
    path.write_text("x" * (SHORTEST - 2))
    with pytest.raises(ValueError, match=f"63 tokens, at least {SHORTEST}"):
        load_corpus(str(path), BYTES)
    path.write_text("x" * (SHORTEST - 1))
    corpus = load_corpus(str(path), BYTES)
    assert len(corpus.train) + len(corpus.validation) == SHORTEST


def test_one_text_is_validated_on_its_end(tmp_path):
    text = "".join(chr(97 + i % 26) for i in range(999))
    (tmp_path / "book.txt").write_text(text)
    corpus = load_corpus(str(tmp_path / "book.txt"), BYTES)
    ids = [*text.encode(), 256]
    assert corpus.train.tolist() == ids[:900] and corpus.validation.tolist() == ids[900:]


def test_many_texts_are_validated_on_whole_ones_at_random(tmp_path):
    for i in range(40):
        (tmp_path / f"{i:02}.txt").write_text(chr(65 + i) * 99)
    corpus = load_corpus(str(tmp_path), BYTES)
    assert (corpus.train == 256).sum() + (corpus.validation == 256).sum() == 40
    assert len(corpus.validation) == 400
    held_out = [chr(i) for i in dict.fromkeys(corpus.validation.tolist()) if i != 256]
    assert len(held_out) == 4 and held_out != sorted(held_out)
    assert not set(corpus.train.tolist()) & {ord(c) for c in held_out}


def test_validation_is_capped(tmp_path):
    (tmp_path / "book.txt").write_text("word " * 200_000)
    assert len(load_corpus(str(tmp_path / "book.txt"), BYTES).validation) == VALIDATION_MOST


def test_texts_are_tokenised_once(tmp_path, monkeypatch):
    path, cache = tmp_path / "book.txt", tmp_path / "cache"
    path.write_text("to be or not to be, that is the question\n" * 20)
    first = load_corpus(str(path), gpt2_tokenizer(), cache)
    assert len(list(cache.iterdir())) == 1

    calls = []
    real = type(BYTES).encode
    monkeypatch.setattr(type(BYTES), "encode", lambda *a, **k: calls.append(1) or real(*a, **k))
    again = load_corpus(str(path), gpt2_tokenizer(), cache)
    assert not calls and again.sha256 == first.sha256
    assert np.array_equal(again.train, first.train) and again.train.dtype == np.uint16
    # another tokenizer, another text: another entry
    load_corpus(str(path), BYTES, cache)
    path.write_text("other words\n" * 40)
    assert load_corpus(str(path), gpt2_tokenizer(), cache).sha256 != first.sha256
    assert len(calls) == 2 and len(list(cache.iterdir())) == 3


@pytest.mark.parametrize("damage", [b"", b"not numpy", None])
def test_a_damaged_cache_is_made_again(tmp_path, damage):
    path, cache = tmp_path / "book.txt", tmp_path / "cache"
    path.write_text("to be or not to be, that is the question\n" * 20)
    first = load_corpus(str(path), BYTES, cache)
    (entry,) = cache.iterdir()
    entry.write_bytes(entry.read_bytes()[:-7] if damage is None else damage)
    assert np.array_equal(load_corpus(str(path), BYTES, cache).train, first.train)
    assert np.load(entry).size == len(first.train) + len(first.validation)


def test_a_cache_that_cannot_be_written_costs_only_time(tmp_path):
    path = tmp_path / "book.txt"
    path.write_text("to be or not to be, that is the question\n" * 20)
    (tmp_path / "file").write_text("")
    assert len(load_corpus(str(path), BYTES, tmp_path / "file").train) > 700


# ---- batches


def test_a_batch_is_a_function_of_seed_and_index():
    ids = np.arange(1000, dtype=np.uint16)
    in_order = BatchLoader(ids, batch_size=3, block_size=7, seed=5)
    batches = [in_order.batch(i) for i in range(200)]
    seeking = BatchLoader(ids, batch_size=3, block_size=7, seed=5)
    for i in (199, 0, 57, 58, 120, 3):
        for a, b in zip(seeking.batch(i), batches[i], strict=True):
            assert torch.equal(a, b)
    other = BatchLoader(ids, batch_size=3, block_size=7, seed=6)
    assert not torch.equal(other.batch(0)[0], batches[0][0])


def test_targets_are_the_next_tokens():
    loader = BatchLoader(np.arange(500, dtype=np.uint16), batch_size=2, block_size=5, seed=0)
    x, y = loader.batch(11)
    assert x.shape == y.shape == (2, 5) and x.dtype == y.dtype == torch.int64
    assert torch.equal(y, x + 1)


def test_an_epoch_sees_every_window_once_and_the_next_is_shuffled_anew():
    loader = BatchLoader(np.arange(107, dtype=np.uint16), batch_size=1, block_size=10, seed=0)
    assert loader.windows == 9
    epochs = [[loader.batch(e * 9 + i)[0][0, 0].item() for i in range(9)] for e in range(20)]
    for starts in epochs:
        ordered = sorted(starts)
        assert [b - a for a, b in pairwise(ordered)] == [10] * 8
        assert starts != ordered
    assert len({min(starts) for starts in epochs}) > 3, "the cuts never move"
    assert len({tuple(starts) for starts in epochs}) == 20


def test_the_shortest_text_has_one_window():
    loader = BatchLoader(np.arange(9, dtype=np.uint16), batch_size=2, block_size=8, seed=0)
    assert loader.batch(3)[0].tolist() == [list(range(8))] * 2
    with pytest.raises(ValueError, match="needs 10"):
        BatchLoader(np.arange(9, dtype=np.uint16), batch_size=2, block_size=9, seed=0)


@pytest.mark.parametrize("count", [2, 7, 8, 9, 40, 41, 57])
def test_validation_counts_every_token_once(count):
    ids = np.arange(100, 100 + count, dtype=np.uint16)
    found = []
    for x, y in validation_batches(ids, batch_size=3, block_size=8):
        assert x.shape == y.shape and x.size(0) <= 3 and x.size(1) == 8
        counted = y != -100
        assert torch.equal(y[counted], x[counted] + 1)
        found += y[counted].tolist()
    assert found == list(range(101, 100 + count))
