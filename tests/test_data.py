"""From a source to training and validation data: splits, labels, the cache and errors."""

import gzip
import json

import numpy as np
import pytest

from nanogpt2.data import files
from nanogpt2.data.corpus import MAX_VALIDATION_TOKENS, MIN_TOKENS, Columns, load_corpus
from nanogpt2.data.shards import write_shard
from nanogpt2.tokenizer import Tokenizer, byte_tokenizer, gpt2_tokenizer

BYTES = byte_tokenizer()


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(path, *records):
    lines = (json.dumps(record, ensure_ascii=False) for record in records)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(line + "\n" for line in lines))
    return str(path)


def texts_of(ids):
    """Return the texts in ids; the last one may be cut."""
    return BYTES.decode(ids.tolist()).split("<|endoftext|>")


# ---- texts


@pytest.mark.parametrize("text", ["", "  \n\n", "\ufeff"])
def test_an_empty_corpus(here, text):
    (here / "book.txt").write_text(text)
    for source in ("book.txt", "."):
        with pytest.raises(ValueError, match="empty"):
            load_corpus(source, BYTES)


def test_a_corpus_too_short(here):
    path = here / "book.txt"
    path.write_text("x" * (MIN_TOKENS - 2))
    with pytest.raises(ValueError, match=f"{MIN_TOKENS - 1} tokens, at least {MIN_TOKENS}"):
        load_corpus("book.txt", BYTES)
    path.write_text("x" * (MIN_TOKENS - 1))
    corpus = load_corpus("book.txt", BYTES)
    assert len(corpus.train) + len(corpus.validation) == MIN_TOKENS


def test_one_text_is_validated_on_its_end(here):
    text = "".join(chr(97 + i % 26) for i in range(999))
    (here / "book.txt").write_text(text)
    corpus = load_corpus("book.txt", BYTES)
    ids = [*text.encode(), 256]
    assert corpus.train.tolist() == ids[:900] and corpus.validation.tolist() == ids[900:]


def test_many_texts_are_validated_on_whole_texts_at_random(here):
    for i in range(40):
        (here / f"{i:02}.txt").write_text(chr(65 + i) * 99)
    (here / "blank.txt").write_text(" \n")
    corpus = load_corpus(".", BYTES)
    assert (corpus.train == 256).sum() + (corpus.validation == 256).sum() == 40
    assert len(corpus.validation) == 400
    held_out = [chr(i) for i in dict.fromkeys(corpus.validation.tolist()) if i != 256]
    assert len(held_out) == 4 and held_out != sorted(held_out)
    assert not set(corpus.train.tolist()) & {ord(c) for c in held_out}


def test_records_are_texts_too(here):
    write(here / "data/a.jsonl", *({"body": f"{i} sheep"} for i in range(30)))
    (here / "data/b.csv").write_text("id,body\n1,one sheep\n2,two sheep\n")
    (here / "data/c.txt").write_text("no sheep")
    columns = Columns(text="body")
    corpus = load_corpus("data", BYTES, columns=columns)
    texts = texts_of(np.concatenate([corpus.train, corpus.validation]))
    expected = [f"{i} sheep" for i in range(30)] + ["one sheep", "two sheep", "no sheep", ""]
    assert sorted(texts) == sorted(expected)
    with pytest.raises(
        ValueError, match=r"a.jsonl' line 1 has no column 'text'; columns found: 'body"
    ):
        load_corpus("data", BYTES)
    (here / "data/b.csv").write_text("id,body\n1,one sheep\n2,\n")
    with pytest.raises(ValueError, match=r"b.csv' line 3: 'body' is empty"):
        load_corpus("data", BYTES, columns=columns)


def test_validation_is_capped(here):
    (here / "book.txt").write_text("word " * 200_000)
    assert len(load_corpus("book.txt", BYTES).validation) == MAX_VALIDATION_TOKENS


def test_a_separate_validation_source(here):
    (here / "book.txt").write_text("to train on " * 20)
    (here / "other.txt").write_text("to validate on ")
    corpus = load_corpus("book.txt", BYTES, validation="other.txt", block_size=15)
    assert texts_of(corpus.train) == ["to train on " * 20, ""]
    assert texts_of(corpus.validation) == ["to validate on ", ""]
    assert corpus.sha256 != load_corpus("book.txt", BYTES).sha256
    with pytest.raises(ValueError, match=r"'other.txt' is too short: 16 tokens .* 16 needs 17"):
        load_corpus("book.txt", BYTES, validation="other.txt", block_size=16)
    with pytest.raises(ValueError, match=r"'missing.txt' is not a file"):
        load_corpus("book.txt", BYTES, validation="missing.txt")


def test_packing_changes_no_token(here):
    text = "naïve 文字, to be or not to be\n" * 30
    (here / "a.txt").write_text(text)
    (here / "b.txt.gz").write_bytes(gzip.compress(text.encode()))
    a, b = load_corpus("a.txt", BYTES), load_corpus("b.txt.gz", BYTES)
    assert a.sha256 == b.sha256 and np.array_equal(a.train, b.train)


@pytest.mark.parametrize("size", [64, 999, 1 << 20])
def test_a_long_text_is_tokenised_in_pieces(here, monkeypatch, size):
    text = "To be, or not to be: that's the question.\n\n  Whether 'tis nobler\t" * 50
    (here / "book.txt").write_text(text)
    monkeypatch.setattr(files, "PIECE_SIZE", size)
    tokenizer = gpt2_tokenizer()
    ids = [*tokenizer.encode(text), tokenizer.end_of_text]
    corpus = load_corpus("book.txt", tokenizer)
    assert [*corpus.train.tolist(), *corpus.validation.tolist()] == ids


# ---- the cache


def test_texts_are_tokenised_once(here, monkeypatch):
    path, cache = here / "book.txt", here / "cache"
    path.write_text("to be or not to be, that is the question\n" * 20)
    first = load_corpus("book.txt", gpt2_tokenizer(), cache=cache)
    assert len(list(cache.iterdir())) == 1

    calls = []
    real = Tokenizer.encode_parts
    monkeypatch.setattr(Tokenizer, "encode_parts", lambda *a: calls.append(1) or real(*a))
    again = load_corpus("book.txt", gpt2_tokenizer(), cache=cache)
    assert not calls and again.sha256 == first.sha256
    assert np.array_equal(again.train, first.train) and again.train.dtype == np.uint16
    assert isinstance(again.train, np.memmap)
    # another tokenizer or text gets another cache entry
    load_corpus("book.txt", BYTES, cache=cache)
    path.write_text("other words\n" * 40)
    assert load_corpus("book.txt", gpt2_tokenizer(), cache=cache).sha256 != first.sha256
    assert calls and len(list(cache.iterdir())) == 3
    # so does a tokenizer of the same name with other merges
    merges = "#version: 0.2\n" + "\n".join(f"{a} {b}" for a, b in ("to", "be", "or", "no"))
    load_corpus("book.txt", Tokenizer("gpt2", merges), cache=cache)
    assert len(list(cache.iterdir())) == 4


def test_another_task_or_column_is_another_entry(here):
    rows = [{"text": f"a text {i}", "body": f"other words {i}", "label": i % 2} for i in range(20)]
    write(here / "a.jsonl", *rows)
    found = {
        load_corpus("a.jsonl", BYTES, task, columns=columns).sha256
        for task in ("lm", "classify")
        for columns in (Columns(), Columns(text="body"))
    }
    assert len(found) == 4


@pytest.mark.parametrize("damage", [b"", b"no token file", None, "a bit"])
@pytest.mark.parametrize("task", ["lm", "classify"])
def test_a_damaged_cache_is_made_again(here, capsys, damage, task):
    write(here / "a.jsonl", *({"text": f"a text {i}", "label": i % 2} for i in range(20)))
    load = lambda: load_corpus("a.jsonl", BYTES, task, cache=here / "cache")  # noqa: E731
    load()
    (entry,) = (here / "cache").iterdir()
    whole = entry.read_bytes()
    damaged = {None: whole[:-7], "a bit": whole[:-7] + b"\x01" + whole[-6:]}.get(damage, damage)
    entry.write_bytes(damaged)
    capsys.readouterr()
    load()
    assert entry.read_bytes() == whole
    assert "damaged: making it again" in capsys.readouterr().err


def test_a_cache_that_cannot_be_written_costs_only_time(here, capsys):
    (here / "book.txt").write_text("to be or not to be, that is the question\n" * 20)
    (here / "file").write_text("")
    assert len(load_corpus("book.txt", BYTES, cache=here / "file").train) > 700
    assert capsys.readouterr().err == ""


# ---- token files


def test_a_token_file_is_used_directly(here):
    write_shard("ids.tokens", [range(200)], np.uint32)
    corpus = load_corpus("ids.tokens", BYTES, vocab_size=200)
    assert corpus.train.tolist() == [*range(180)] and corpus.train.dtype == np.uint32
    assert corpus.validation.tolist() == [*range(180, 200)]
    with pytest.raises(ValueError, match=r"'ids.tokens' holds token id 199, outside the .* of 199"):
        load_corpus("ids.tokens", BYTES, vocab_size=199)
    with pytest.raises(ValueError, match=r"'ids.tokens' holds tokens; chat needs .jsonl, .csv"):
        load_corpus("ids.tokens", BYTES, "chat")
    write_shard("ids.tokens", [[5] * 99, [-1]], np.int32)
    with pytest.raises(ValueError, match="token id -1, outside the vocabulary of 257"):
        load_corpus("ids.tokens", BYTES)
    (here / "ids.tokens").write_bytes(b"not ours")
    with pytest.raises(ValueError, match=r"'ids.tokens' is not a token file"):
        load_corpus("ids.tokens", BYTES)


def test_a_tokenizer_larger_than_the_model_is_refused(here):
    (here / "book.txt").write_text("to be or not to be " * 20)
    with pytest.raises(ValueError, match="257 ids, outside the vocabulary of 256"):
        load_corpus("book.txt", BYTES, vocab_size=256)


# ---- chat


def test_chat(here):
    pairs = [{"prompt": f"{i}?", "completion": f" {i}!"} for i in range(20)]
    write(here / "a.jsonl", *pairs)
    corpus = load_corpus("a.jsonl", BYTES, "chat")
    assert len(corpus.train) == 18 and len(corpus.validation) == 2 and corpus.labels == ()
    inputs, targets = corpus.train.example(0, 99)
    assert inputs.tolist() == [*b"0? 0!"] and targets.tolist() == [-100, *b" 0!", 256]
    seen = {
        BYTES.decode(part.example(i, 99)[0].tolist())
        for part in (corpus.train, corpus.validation)
        for i in range(len(part))
    }
    assert seen == {pair["prompt"] + pair["completion"] for pair in pairs}

    (here / "b.txt").write_text("no conversation")
    with pytest.raises(ValueError, match=r"'b.txt' is text; chat needs .jsonl, .csv"):
        load_corpus("b.txt", BYTES, "chat")
    both = load_corpus("a.jsonl", BYTES, "chat", validation="a.jsonl")
    assert len(both.train) == len(both.validation) == 20


def test_one_record_cannot_be_split(here):
    write(here / "a.jsonl", {"prompt": "a", "completion": "b"})
    with pytest.raises(ValueError, match=r"'a.jsonl' has too few records .* give --validation"):
        load_corpus("a.jsonl", BYTES, "chat")


def test_examples_held_out_are_capped(here, monkeypatch):
    monkeypatch.setattr("nanogpt2.data.corpus.MAX_VALIDATION_TOKENS", 100)
    write(here / "a.jsonl", *({"prompt": "a" * 9, "completion": "b"} for _ in range(500)))
    corpus = load_corpus("a.jsonl", BYTES, "chat")
    assert corpus.validation.tokens <= 100 < corpus.validation.tokens + 20
    assert len(corpus.train) + len(corpus.validation) == 500


# ---- classify


def mails(count, labels="ham spam"):
    names = labels.split()
    return [{"text": f"mail {i}", "label": names[i % len(names)]} for i in range(count)]


def test_classify(here):
    write(here / "a.jsonl", *mails(40))
    corpus = load_corpus("a.jsonl", BYTES, "classify")
    assert corpus.labels == corpus.train.labels == ("ham", "spam")
    assert len(corpus.train) == 36 and len(corpus.validation) == 4
    inputs, targets = corpus.train.example(0, 99)
    assert inputs.tolist() == [*b"mail 0"] and targets.tolist() == [-100] * 5 + [0]


def test_every_class_stays_known(here):
    # one record more than labels
    write(here / "a.jsonl", *mails(5, "a b c d"))
    corpus = load_corpus("a.jsonl", BYTES, "classify")
    assert len(corpus.validation) == 1 and set(corpus.train.classes) == {0, 1, 2, 3}
    write(here / "a.jsonl", *mails(4, "a b c d"))
    with pytest.raises(ValueError, match="give --validation"):
        load_corpus("a.jsonl", BYTES, "classify")


def test_labels_unseen_in_training(here):
    write(here / "a.jsonl", *mails(10))
    write(here / "b.jsonl", *mails(9, "spam 7 eggs"))
    with pytest.raises(ValueError, match=r"'b.jsonl' has labels unseen in training: '7', 'eggs'$"):
        load_corpus("a.jsonl", BYTES, "classify", validation="b.jsonl")
    write(here / "b.jsonl", *mails(3, "spam"))
    corpus = load_corpus("a.jsonl", BYTES, "classify", validation="b.jsonl")
    assert corpus.validation.classes.tolist() == [1, 1, 1]
    # a classifier that is trained further keeps its numbers
    given = ("eggs", "spam", "ham")
    corpus = load_corpus("a.jsonl", BYTES, "classify", labels=given)
    assert corpus.labels == given and set(corpus.train.classes) == {1, 2}
    with pytest.raises(ValueError, match=r"'a.jsonl' has labels unseen in training: 'ham'"):
        load_corpus("a.jsonl", BYTES, "classify", labels=("spam", "eggs"))


def test_labels_in_columns_and_as_numbers(here):
    (here / "a.csv").write_text("stars,review\n" + "10,good\n2,bad\n" * 5)
    corpus = load_corpus("a.csv", BYTES, "classify", columns=Columns("review", "stars"))
    write(here / "a.jsonl", *({"text": "x", "label": i % 2 * 8 + 2} for i in range(10)))
    assert corpus.labels == load_corpus("a.jsonl", BYTES, "classify").labels == ("2", "10")


def test_the_label_of_a_text_file_is_its_folders_name(here):
    for i in range(6):
        for label in ("ham", "spam"):
            (here / f"mails/{label}").mkdir(parents=True, exist_ok=True)
            (here / f"mails/{label}/{i}.txt").write_text(f"{label} {i}")
    corpus = load_corpus("mails", BYTES, "classify")
    assert corpus.labels == ("ham", "spam") and len(corpus.train) == 11
    for i in range(11):
        inputs, targets = corpus.train.example(i, 99)
        text = BYTES.decode(inputs.tolist())
        assert text.startswith(corpus.labels[targets[-1]])
    # the same texts with other labels are different data
    (here / "mails/spam").rename(here / "mails/zebra")
    renamed = load_corpus("mails", BYTES, "classify")
    assert renamed.labels == ("ham", "zebra") and renamed.sha256 != corpus.sha256


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([], "is empty: no record in it"),
        (mails(5, "ham"), "has one label alone, 'ham'; two are needed"),
        ([*mails(5), {"text": "a", "label": " "}], "line 6: 'label' is empty"),
        ([*mails(5), {"text": "", "label": "ham"}], "line 6: 'text' is empty"),
        ([*mails(5), {"text": "a"}], "line 6 has no column 'label'; columns found: 'text'"),
        ([*mails(5), {"text": "a", "label": None}], "must be text or a whole number, not 'None'"),
    ],
)
def test_records_that_cannot_be_classified(here, records, message):
    write(here / "a.jsonl", *records)
    with pytest.raises(ValueError, match=f"'a.jsonl' {message}|{message}"):
        load_corpus("a.jsonl", BYTES, "classify")


def test_an_unknown_task():
    with pytest.raises(ValueError, match="task must be one of lm, chat, classify, not 'sort'"):
        load_corpus("pydocs", BYTES, "sort")
