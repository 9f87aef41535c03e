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
        ValueError, match=r"32 of 33 records are bad .* has no column 'text'; columns found: 'body"
    ):
        load_corpus("data", BYTES)
    # no flag helps where no record is good
    with pytest.raises(ValueError, match=r"line 1 has no column .*\(so are all 30 records\)$"):
        load_corpus("data/a.jsonl", BYTES, skip_bad=True)
    (here / "data/b.csv").write_text("id,body\n1,one sheep\n2,\n")
    with pytest.raises(ValueError, match=r"b.csv' line 3: 'body' is empty \(--skip_bad skips it"):
        load_corpus("data", BYTES, columns=columns)


@pytest.mark.parametrize(
    ("task", "good", "bad"),
    [
        ("lm", {"text": "a text " * 9}, [{"text": " "}, {"text": None}, {"body": "x"}]),
        ("classify", {"text": "a"}, [{"text": "a"}, {"text": "", "label": "x"}, {"label": "x"}]),
        (
            "chat",
            {"prompt": "a", "completion": "b"},
            [
                {"messages": [{"role": "user", "content": "last"}]},
                {"messages": [{"role": "assistant", "content": None}]},
                {"prompt": "a"},
            ],
        ),
    ],
)
def test_bad_records_are_one_error_or_are_skipped_and_counted(here, task, good, bad):
    goods = [good | ({"label": "xy"[i % 2]} if task == "classify" else {}) for i in range(8)]
    lines = [json.dumps(row) for i in range(8) for row in (goods[i], bad[i % 3])]
    # a comma too many; an array
    lines += [json.dumps(goods[0])[:-1] + ",}", "[1]"]
    (here / "a.jsonl").write_text("\n".join(lines))
    with pytest.raises(ValueError) as raised:
        load_corpus("a.jsonl", BYTES, task)
    said = str(raised.value)
    assert "10 of 18 records are bad (--skip_bad skips them): " in said
    assert "'a.jsonl' line 2, line 4, line 6; the first" in said.replace(", message 1", "")
    corpus = load_corpus("a.jsonl", BYTES, task, skip_bad=True)
    (reading,) = corpus.readings
    assert reading.records == 8 and reading.skipped["bad records"].count == 10
    assert len(reading.skipped["bad records"].first) == 3
    write(here / "b.jsonl", *goods)
    same = load_corpus("b.jsonl", BYTES, task)
    for part, other in ((corpus.train, same.train), (corpus.validation, same.validation)):
        assert np.array_equal(getattr(part, "stream", part), getattr(other, "stream", other))


def test_bad_records_of_several_long_names_fit_a_line(here):
    for name in "abc":
        write(here / f"data/{name * 60}.jsonl", {"text": "a text " * 20}, {"text": ""})
    with pytest.raises(ValueError) as raised:
        load_corpus("data", BYTES)
    said = f"error: DATA {raised.value}"[:200]
    assert said.count(".jsonl' line 2") == 3 and "3 of 6" in said and "--skip_bad" in said


def test_a_bad_record_of_the_validation_source_counts_too(here):
    write(here / "a.jsonl", {"text": "a text " * 20})
    write(here / "b.jsonl", {"text": "other words " * 20}, {"text": ""})
    with pytest.raises(ValueError, match=r"'b.jsonl' line 2: 'text' is empty"):
        load_corpus("a.jsonl", BYTES, validation="b.jsonl")
    corpus = load_corpus("a.jsonl", BYTES, validation="b.jsonl", skip_bad=True)
    first, second = corpus.readings
    assert not first.skipped and second.skipped["bad records"].count == 1
    assert (first.tokens, second.tokens) == (len(corpus.train), len(corpus.validation))
    assert "read 'a.jsonl': 1 file, 1 record, 141 tokens\nread 'b.jsonl'" in corpus.describe(8)


def test_texts_in_another_encoding_are_one_error(here):
    words = "caf\xe9 " * 20
    (here / "data").mkdir()
    for name in "abcde":
        (here / f"data/{name}.txt").write_bytes(words.encode("latin-1"))
    (here / "data/f.txt").write_text("plain ASCII")
    with pytest.raises(ValueError) as raised:
        load_corpus("data", BYTES)
    said = str(raised.value)
    assert "5 of 6 files are not UTF-8 (--encoding cp1252 would read them): " in said
    assert "'data/a.txt' (byte 0xe9 at offset 3)" in said and said.endswith(", ...")
    corpus = load_corpus("data", BYTES, encoding="cp1252")
    assert texts_of(corpus.train)[0] in (words, "plain ASCII")
    corpus = load_corpus("data", BYTES, "classify", encoding="cp1252", labels=("data", "x"))
    assert len(corpus.train) == 5
    # one encoding cannot read both
    (here / "data/f.txt").write_text(words)
    with pytest.raises(ValueError, match=r"\(other files are: convert from cp1252\)"):
        load_corpus("data", BYTES)
    assert load_corpus("data", BYTES, skip_bad=True).readings[0].skipped["not UTF-8"].count == 5
    # a damaged UTF-8 file is not in another encoding
    (here / "a.txt").write_bytes(words.encode() + b"\xff")
    with pytest.raises(ValueError, match=r"'a.txt' is not UTF-8: byte 0xff at offset 120$"):
        load_corpus("a.txt", BYTES)


@pytest.mark.parametrize("size", [1, 7, 20, 1 << 20])
@pytest.mark.parametrize("tokenizer", [BYTES, gpt2_tokenizer()], ids=["bytes", "gpt2"])
def test_a_written_end_of_text_separates_texts(here, monkeypatch, size, tokenizer):
    monkeypatch.setattr(files, "PIECE_SIZE", size)
    texts = [f"text number {i}, to be" for i in range(30)]
    joined = "<|endoftext|>".join(texts)
    (here / "a.txt").write_text(f"<|endoftext|>{joined}<|endoftext|>\n<|endoftext|>\n")
    write(here / "b.jsonl", {"text": joined[:205]}, {"text": joined[205:]})
    for source, count in (("a.txt", 30), ("b.jsonl", 31)):
        corpus = load_corpus(source, tokenizer)
        ids = np.concatenate([corpus.train, corpus.validation])
        assert (ids == tokenizer.end_of_text).sum() == corpus.readings[0].records == count
    (here / "a.txt").write_text(joined)
    found = tokenizer.decode(load_corpus("a.txt", tokenizer).train.tolist()).split("<|endoftext|>")
    assert {*found[:-1]} < {*texts} and found[:-1] != sorted(found[:-1])


def test_line_ends_are_line_feeds(here):
    (here / "a.txt").write_bytes(b"one line\rtwo lines\r\nthree\n" * 9)
    corpus = load_corpus("a.txt", BYTES)
    assert texts_of(np.concatenate([corpus.train, corpus.validation]))[0] == (
        "one line\ntwo lines\nthree\n" * 9
    )


def test_settings_beside_texts_are_skipped_and_said(here):
    (here / "data").mkdir()
    (here / "data/a.txt").write_text("a text " * 20)
    (here / "data/settings.json").write_text('{\n  "name": "a"\n}')
    (here / "data/one.json").write_text('{"text": "a text too"}')
    (reading,) = load_corpus("data", BYTES).readings
    assert reading.records == 2
    assert [*reading.skipped] == ["one JSON object that is no record"]
    with pytest.raises(ValueError, match="has no column 'text'; columns found: 'name'"):
        load_corpus("data/settings.json", BYTES)


def test_empty_files_of_every_kind_are_said(here):
    (here / "data").mkdir()
    (here / "data/a.txt").write_text("a text " * 20)
    kinds = ("txt", "jsonl", "json", "csv", "tsv", "parquet")
    for kind in kinds:
        (here / f"data/empty.{kind}").touch()
    (reading,) = load_corpus("data", BYTES).readings
    assert reading.records == 1 and reading.skipped["empty"].count == len(kinds)


def test_a_written_end_of_text_in_a_conversation_is_the_token(here):
    turn = {"prompt": "<|endoftext|>a", "completion": "b<|endoftext|>c<|endoftext|>"}
    write(here / "a.jsonl", turn, turn)
    inputs, targets = load_corpus("a.jsonl", BYTES, "chat").train.example(0, 99)
    assert inputs.tolist() == [256, *b"ab", 256, *b"c"]
    assert targets.tolist() == [-100, *b"b", 256, *b"c", 256]


def test_the_runs_own_folder_is_no_data(here):
    (here / "data/out").mkdir(parents=True)
    (here / "data/a.txt").write_text("a text " * 20)
    (here / "data/out/b.txt").write_text("the run's own words " * 20)
    assert len(load_corpus("data", BYTES, out="data/out").train) == 127
    assert len(load_corpus("data", BYTES).train) > 127


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
    assert len(list(cache.glob("*.tokens"))) == 1

    calls = []
    real = Tokenizer.encode_parts
    monkeypatch.setattr(Tokenizer, "encode_parts", lambda *a, **k: calls.append(1) or real(*a, **k))
    again = load_corpus("book.txt", gpt2_tokenizer(), cache=cache)
    assert not calls and again.sha256 == first.sha256
    assert np.array_equal(again.train, first.train) and again.train.dtype == np.uint16
    assert isinstance(again.train, np.memmap)
    # another tokenizer or text gets another cache entry
    load_corpus("book.txt", BYTES, cache=cache)
    path.write_text("other words\n" * 40)
    assert load_corpus("book.txt", gpt2_tokenizer(), cache=cache).sha256 != first.sha256
    assert calls and len(list(cache.glob("*.tokens"))) == 3
    # so does a tokenizer of the same name with other merges
    merges = "#version: 0.2\n" + "\n".join(f"{a} {b}" for a, b in ("to", "be", "or", "no"))
    load_corpus("book.txt", Tokenizer("gpt2", merges), cache=cache)
    assert len(list(cache.glob("*.tokens"))) == 4


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
    (entry,) = (here / "cache").glob("*.tokens")
    whole = entry.read_bytes()
    damaged = {None: whole[:-7], "a bit": whole[:-7] + b"\x01" + whole[-6:]}.get(damage, damage)
    entry.write_bytes(damaged)
    capsys.readouterr()
    load()
    assert entry.read_bytes() == whole
    assert "damaged: making it again" in capsys.readouterr().err


@pytest.mark.parametrize("damage", ["", "[]", '{"skipped": 5}', '{"skipped": {}, "more": 5}', None])
def test_what_was_read_is_read_again_if_its_record_is_damaged(here, damage):
    (here / "a.jsonl").write_text('{"text": "' + "a text" * 20 + '"}\n\n5\n')
    load = lambda: load_corpus("a.jsonl", BYTES, skip_bad=True, cache=here / "cache")  # noqa: E731
    first = load().readings
    (entry,) = (here / "cache").glob("*.json")
    whole = entry.read_text()
    if damage is None:
        entry.unlink()
    else:
        entry.write_text(damage)
    assert load().readings == first and first[0].skipped["bad records"].count == 1
    assert entry.read_text() == whole


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
    with pytest.raises(ValueError, match=r"'ids.tokens' holds tokens; chat needs .jsonl"):
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
    with pytest.raises(ValueError, match=r"'b.txt' is text; chat needs .jsonl, .json, .csv"):
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


def test_many_labels_are_said(here):
    said = "note: 51 distinct labels: is --label_column right?"
    for count in (51, 50):
        write(here / "a.jsonl", *({"text": "x", "label": i % count} for i in range(200)))
        described = load_corpus("a.jsonl", BYTES, "classify").describe(8)
        assert (said in described) == (count == 51)


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([], "is empty: no record in it"),
        (mails(5, "ham"), "has one label alone, 'ham'; two are needed"),
        ([*mails(5), {"text": "a", "label": " "}], "line 6: 'label' is empty"),
        ([*mails(5), {"text": "", "label": "ham"}], "line 6: 'text' is empty"),
        ([*mails(5), {"text": "a"}], "line 6 has no column 'label'; columns found: 'text'"),
        ([*mails(5), {"text": "a", "label": None}], "must be text, a number, .* not 'None'"),
    ],
)
def test_records_that_cannot_be_classified(here, records, message):
    write(here / "a.jsonl", *records)
    with pytest.raises(ValueError, match=f"'a.jsonl' {message}|{message}"):
        load_corpus("a.jsonl", BYTES, "classify")


def test_an_unknown_task():
    with pytest.raises(ValueError, match="task must be one of lm, chat, classify, not 'sort'"):
        load_corpus("pydocs", BYTES, "sort")
