"""Inputs on which a reader fell short: each file, how it is read, and the right value.

The files are made up; each stands for a kind. A row that must be read names what of it is right, a
row that must be refused names the parts of the error.
"""

import json
from pathlib import Path

import numpy as np
import pytest

import train
from nanogpt2.config import TrainConfig, parse
from nanogpt2.data.corpus import Columns, load_corpus
from nanogpt2.tokenizer import byte_tokenizer, gpt2_tokenizer

CASES = Path(__file__).parent / "data/cases"
BYTES = byte_tokenizer()
KAGGLE = {"columns": Columns("v2", "v1"), "encoding": "cp1252"}
MAILS = {"columns": Columns("subject_text", "klass")}
RATINGS = {"columns": Columns("Bewertungstext", "Urteil")}

# file, task, options of load_corpus, records read, labels or a text that is read
READ = [
    ("eot.txt", "lm", {}, 200, "Joke 199: Doctor morning of stone while river bridge"),
    ("lines.json", "lm", {}, 60, "Bridge over and keeper letters bridge and letters over bread"),
    ("wiki.jsonl", "lm", {"skip_bad": True}, 53, " = Section 1 = \n"),
    ("sms_merge.tsv", "classify", {}, 60, ("ham", "spam")),
    ("spam_kaggle.csv", "classify", KAGGLE, 80, ("ham", "spam")),
    ("mails.csv", "classify", MAILS, 80, ("not spam", "spam")),
    ("bool.jsonl", "classify", {}, 60, ("false", "true")),
    ("urteile.tsv", "classify", RATINGS, 200, ("schlecht", "sehr gut", "weder noch")),
    ("alpaca.jsonl", "chat", {}, 60, "You: Tell me about light\nBridge walked doctor salt"),
    ("alpaca.jsonl", "chat", {}, 60, "You: Tell me about carried\nFriend: Stone winter quiet"),
    ("sharegpt.jsonl", "chat", {}, 60, "\nFriend: And letters a old old walked doctor old old."),
    ("openai_null.jsonl", "chat", {}, 60, "You are kind.\nYou: Of spoke keeper river children"),
    ("emptyprompt.jsonl", "chat", {}, 60, "<|endoftext|> Under morning walked the morning over"),
    ("longchat.jsonl", "chat", {}, 40, "Answer in one short sentence. Children carried a under"),
]

# file, task, options, parts of the error
REFUSED = [
    ("wiki.jsonl", "lm", {}, ["27 of 80", "line 1, line 4, line 7", "is empty", "--skip_bad"]),
    ("spam_kaggle.csv", "classify", {}, ["UTF-8", "0xa3", "--encoding cp1252"]),
]


def text_of(corpus):
    parts = (corpus.train, corpus.validation)
    if isinstance(corpus.train, np.ndarray):
        return BYTES.decode(np.concatenate(parts).tolist())
    rows = [part.example(i, 10**6)[0] for part in parts for i in range(len(part))]
    return "\n".join(BYTES.decode(row.tolist()) for row in rows)


@pytest.mark.parametrize(("name", "task", "options", "records", "right"), READ)
def test_a_case_that_is_read(name, task, options, records, right):
    corpus = load_corpus(str(CASES / name), BYTES, task, **options)
    (reading,) = corpus.readings
    assert (reading.files, reading.records) == (1, records)
    if task == "classify":
        assert corpus.labels == right
    else:
        assert right in text_of(corpus)


@pytest.mark.parametrize(("name", "task", "options", "parts"), REFUSED)
def test_a_case_that_is_refused(name, task, options, parts):
    with pytest.raises(ValueError) as raised:
        load_corpus(str(CASES / name), BYTES, task, **options)
    assert not [part for part in parts if part not in str(raised.value)], raised.value


@pytest.mark.parametrize("tokenizer", [BYTES, gpt2_tokenizer()], ids=["bytes", "gpt2"])
def test_a_written_end_of_text_is_the_token(tokenizer):
    corpus = load_corpus(str(CASES / "eot.txt"), tokenizer)
    ids = np.concatenate([corpus.train, corpus.validation])
    assert (ids == tokenizer.end_of_text).sum() == 200
    assert tokenizer.decode(ids[ids != tokenizer.end_of_text].tolist()).count("endoftext") == 0
    # whole texts validate, from anywhere in the file
    held_out = tokenizer.decode(corpus.validation.tolist()).split("<|endoftext|>")[1:-1]
    assert all(text.startswith("Joke ") for text in held_out)
    assert not held_out[0].startswith("Joke 18")


def test_cut_questions_and_texts_are_counted():
    corpus = load_corpus(str(CASES / "longchat.jsonl"), BYTES, "chat")
    assert "40 of 40 questions are cut to their end: longer than block_size 256" in (
        corpus.describe(256)
    )
    assert corpus.readings[0].cut == 40
    corpus = load_corpus(str(CASES / "bool.jsonl"), BYTES, "classify")
    assert "27 of 60 texts are cut to their start" in corpus.describe(64)
    assert "cut" not in corpus.describe(1000) and corpus.readings[0].cut == 0


def test_what_was_skipped_is_said():
    corpus = load_corpus(str(CASES / "wiki.jsonl"), BYTES, skip_bad=True)
    said = corpus.describe(64)
    assert "1 file, 53 records, 6,807 tokens" in said
    assert "skipped 27 (bad records): " in said and "line 7: 'text' is empty, ..." in said
    # the second time the tokens come from the cache
    assert load_corpus(str(CASES / "wiki.jsonl"), BYTES, skip_bad=True).describe(64) == said


SMALL = ["--init", "scratch", "--tokenizer", "bytes", "--n_layer", "1", "--n_head", "1"]
SMALL += ["--n_embd", "8", "--block_size", "16", "--steps", "1"]


@pytest.mark.parametrize("flags", [["--dry_run"], []], ids=["dry run", "run"])
def test_a_run_says_what_it_read_and_keeps_it(tmp_path, monkeypatch, capsys, flags):
    monkeypatch.chdir(tmp_path)
    argv = [str(CASES / "wiki.jsonl"), *SMALL, "--skip_bad", *flags]
    train.main(parse(TrainConfig, argv))
    assert "1 file, 53 records, 6,807 tokens\nskipped 27 (bad records): " in capsys.readouterr().err
    if not flags:
        (read,) = json.loads(Path("out/run.json").read_text())["read"]
        assert (read["files"], read["records"], read["tokens"]) == (1, 53, 6807)
        assert read["skipped"]["bad records"]["count"] == 27


def test_a_cut_question_is_said_and_kept(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    train.main(parse(TrainConfig, [str(CASES / "longchat.jsonl"), *SMALL, "--task", "chat"]))
    assert "40 of 40 questions are cut to their end: longer than block_size 16" in (
        capsys.readouterr().err
    )
    assert json.loads(Path("out/run.json").read_text())["read"][0]["cut"] == 40
