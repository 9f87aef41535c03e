"""--mix: shares that are exact, epochs of each corpus, resumed bit for bit."""

import json
import os
import signal
import subprocess
import sys
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from reference import ROOT
from test_train import SMALL, metrics, run

from nanogpt2.config import read_mix
from nanogpt2.data.loader import make_batches, validation_batches
from nanogpt2.data.mix import Mixed, Shares, load_mix
from nanogpt2.tokenizer import byte_tokenizer

BYTES = byte_tokenizer()
WEIGHTS = st.lists(st.fractions(Fraction(1, 1000), 1000), min_size=1, max_size=5).map(tuple)


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("".join(f"{i} sheep jumped the fence. " for i in range(200)))
    (tmp_path / "b.txt").write_text("".join(f"{i} GOATS ATE THE HAY. " for i in range(90)))
    return tmp_path


# ---- the shares


@given(WEIGHTS, st.integers(0, 10**12))
def test_the_shares_are_exact_and_every_sequence_is_dealt_once(weights, start):
    shares, total = Shares(weights), sum(weights)
    counts = [shares.counts(n) for n in range(start, start + 30)]
    for n, found in enumerate(counts, start):
        assert sum(found) == n
        for i, (count, weight) in enumerate(zip(found, weights, strict=True)):
            assert abs(count - n * weight / total) <= (i + 2) / 2
    for n, (before, after) in enumerate(pairwise(counts), start):
        corpus, place = shares.pick(n)
        assert [b - a for a, b in zip(before, after, strict=True)] == [
            int(i == corpus) for i in range(len(weights))
        ]
        assert place == before[corpus]


def test_the_corpora_alternate_as_evenly_as_they_can():
    shares = Shares((Fraction(3), Fraction(1)))
    picked = "".join("ab"[shares.pick(n)[0]] for n in range(16))
    assert picked == "aabaaabaaabaaaba"
    # only the ratio counts
    same = Shares((Fraction(3, 7), Fraction(1, 7)))
    assert [same.pick(n) for n in range(99)] == [shares.pick(n) for n in range(99)]


def test_rows_are_those_of_the_corpora_each_in_its_order():
    a, b = np.arange(500), np.arange(10_000, 10_130)
    mixed = Mixed(("a", "b"), Shares((Fraction("0.7"), Fraction("0.3"))), (a, b))
    batches = make_batches(mixed, 8, 5)
    own = [make_batches(part, 8, 5) for part in (a, b)]
    assert batches.sequences == own[0].sequences + own[1].sequences
    x, y = batches.rows(0, 400)
    assert x.shape == (400, 8) and (y == x + 1).all()
    for part, select in zip(own, (x[:, 0] < 10_000, x[:, 0] >= 10_000), strict=True):
        assert (x[select] == part.rows(0, int(select.sum()))[0]).all()
    # b's text is passed over several times, anew each time
    assert (x[:, 0] >= 10_000).sum() == 120 == 8 * own[1].sequences
    for first, count in ((0, 1), (3, 50), (120, 7), (399, 1)):
        found = batches.rows(first, count)
        assert (found[0] == x[first : first + count]).all()
        assert (found[1] == y[first : first + count]).all()
    assert batches.describe(400) == (
        "mix of 400 sequences: 'a' 70 % (4.59 epochs of 61 sequences), "
        "'b' 30 % (8.00 epochs of 15 sequences)"
    )


def test_chats_are_mixed_and_padded(here):
    for name, words in (("a", "a short one"), ("b", "an answer of many more words than that")):
        rows = [{"prompt": f"{i}", "completion": words} for i in range(20)]
        (here / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    corpus = load_mix(read_mix("a.jsonl=1,b.jsonl=1"), BYTES, "chat")
    x, y = make_batches(corpus.train, 99, 0).rows(0, 4)
    assert sorted({*(y != -100).sum(1).tolist()}) == [12, 39] and (x[y == -100] >= 0).all()


# ---- the flag


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a.txt=3,b.txt=1", {"a.txt": 3, "b.txt": 1}),
        ("a.txt=.5,b.txt=1e-3", {"a.txt": Fraction(1, 2), "b.txt": Fraction(1, 1000)}),
        ("a,b=c.txt=2,d=e=0.1", {"a,b=c.txt": 2, "d=e": Fraction(1, 10)}),
        ("pydocs=1", {"pydocs": 1}),
    ],
)
def test_a_mix_is_read(text, expected):
    assert read_mix(text) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "'' has no weight"),
        ("a.txt", "'a.txt' has no weight"),
        ("a.txt,b.txt=1", "'a.txt' has no weight; write a.txt=1"),
        ("a.txt=1,b.txt", "'b.txt' has no weight"),
        ("a.txt=1,b.txt=1,", "must not end in a comma"),
        ("a.txt=1,,b.txt=1", "',b.txt'"),
        ("=1", "has no weight"),
        *(
            (f"a.txt=1,b.txt={weight}", f"must be a number above 0, not '{weight}'")
            for weight in (*("", "0", "0.0", "-1", "nan", "inf"), *("1e999", "1e-999", "1_0", "٣"))
        ),
        ("a.txt=1,a.txt=2", "names 'a.txt' twice"),
        ("a.txt=1,./a.txt=2", "twice"),
        ("a.txt=1,link=2", "twice"),
        ("a.txt=1,-=2", "standard input"),
        ("a.txt=1,gone.txt=2", "'gone.txt' is not a file"),
        ("a.txt=1,short.txt=2", "'short.txt' is too short: 6 tokens"),
        ("a.txt=1,b\0.txt=2", "is not a file"),
        ("a.txt=1,loop=2", "'loop' is not a file"),
        ("{long},a.txt=1", "File name too long"),
        ("a.txt=1.{long},b.txt=1", "the weight of 'a.txt' must be a number above 0"),
    ],
)  # fmt: skip
def test_a_wrong_mix_is_one_line(here, capsys, text, message):
    (here / "short.txt").write_text("words")
    (here / "link").symlink_to("a.txt")
    (here / "loop").symlink_to("loop")
    assert run("--mix", text.replace("{long}", "0" * 5000), *SMALL) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: --mix") and message in said and said.count("\n") == 1, said
    assert len(said) <= 201 and not (here / "out").exists()


def test_flags_that_clash_with_a_mix(here, capsys):
    for argv, message in (
        (["a.txt", "--mix", "b.txt=1"], "--mix must be left out where DATA is given"),
        (["--mix", "b.txt=1", "--task", "classify"], "--mix must come with --task lm or chat"),
        (["--mix", "a.txt=1,b.txt=1", "--block_size", "2000"], "--block_size must be <="),
    ):
        assert run(*SMALL, *argv) == 2
        assert message in capsys.readouterr().err


# ---- a run

MIX = ["--mix", "a.txt=3,b.txt=1", *SMALL, "--steps", "12", "--save_every", "3"]


def test_a_run_reports_each_corpus(here, capsys):
    assert run(*MIX, "--eval_every", "6") == 0
    said = capsys.readouterr().err
    assert "trained on a mix of 48 sequences: 'a.txt' 75 % (" in said
    last = metrics()[-1]
    mean = (3 * last["val_loss a.txt"] + last["val_loss b.txt"]) / 4
    assert last["val_loss"] == pytest.approx(mean, rel=1e-12)
    record = json.loads(Path("out/run.json").read_text())
    assert [one["source"] for one in record["read"]] == ["a.txt", "b.txt"]
    assert record["config"]["mix"] == "a.txt=3,b.txt=1" and record["config"]["data"] == ""
    # one source to validate on: one loss
    (here / "c.txt").write_text("words to validate on " * 9)
    assert run(*MIX, "--validation", "c.txt", "--out", "held") == 0
    assert [key for key in metrics("held")[-1] if key.startswith("val_loss")] == ["val_loss"]


def test_the_weights_of_the_losses_are_finite_shares(here):
    for weights in (("1e308", "1e308"), ("1e-320", "1e-320"), ("7", "7")):
        corpus = load_mix(dict(zip(("a.txt", "b.txt"), map(Fraction, weights), strict=True)), BYTES)
        assert validation_batches(corpus.validation, 2, 8).weights == [0.5, 0.5]


KILLED = """
import os, signal, sys
from pathlib import Path
import train
from nanogpt2.config import TrainConfig, parse
rate = train.learning_rate

def kill_at_8(step, *rest):
    if step == 8:
        os.kill(os.getpid(), signal.SIGKILL)
    return rate(step, *rest)

train.learning_rate = kill_at_8
train.main(train.RunFolder(Path("out")).check(parse(TrainConfig, sys.argv[1:])))
"""


def test_a_killed_run_ends_as_an_undisturbed_one(here, capsys):
    assert run(*MIX, "--out", "whole") == 0
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    argv = [sys.executable, "-c", KILLED, *MIX]
    assert subprocess.run(argv, env=environment, capture_output=True).returncode == -signal.SIGKILL
    for wrong, message in (
        (["--mix", "a.txt=2,b.txt=1"], "a run on another data than 'a.txt=2,b.txt=1'"),
        (["--mix", "b.txt=1,a.txt=3"], "another data"),
        (["a.txt"], "another data than 'a.txt'"),
    ):
        capsys.readouterr()
        assert run("--resume", *wrong) == 2
        assert message in capsys.readouterr().err
    # the files may move, and only the ratio of the weights counts
    Path("a.txt").rename("moved.txt")
    assert run("--resume", "--mix", "moved.txt=1.5,b.txt=0.5") == 0
    assert "resuming after step " in capsys.readouterr().err
    found = [{k.replace("moved", "a"): v for k, v in row.items()} for row in metrics()]
    clocks = ("tokens_per_second", "mfu", "memory")
    for row, whole in zip(found, metrics("whole"), strict=True):
        assert {k: v for k, v in row.items() if k not in clocks} == {
            k: v for k, v in whole.items() if k not in clocks
        }
    assert (
        Path("out/model.safetensors").read_bytes() == Path("whole/model.safetensors").read_bytes()
    )


def test_any_batch_gives_the_same_run(here):
    """The micro-batch and the accumulation change nothing but the rounding."""
    assert run(*MIX, "--out", "one") == 0
    flags = [*MIX, "--batch_size", "2", "--grad_accum", "2"]
    assert run(*flags, "--out", "two") == 0
    for row, other in zip(metrics("one"), metrics("two"), strict=True):
        assert row["loss"] == pytest.approx(other["loss"], rel=1e-4)


def test_a_long_run_of_an_older_release_is_not_mixed_up(here, monkeypatch, capsys):
    from nanogpt2.data import loader, shuffle

    assert run(*MIX, "--patience", "1", "--lr", "0", "--eval_every", "1", "--steps", "12") == 0
    state = max(Path("out/checkpoints").glob("step-*")) / "state.json"
    assert json.loads(state.read_text())["order"] == shuffle.ORDER
    batches = make_batches(np.arange(5000), 8, 0)
    loader.check_order(batches, None)
    monkeypatch.setattr(loader, "LISTED", 100)
    loader.check_order(batches, shuffle.ORDER)
    for order in (None, 1, "2"):
        with pytest.raises(ValueError, match="another release ordered this run's 624 sequences"):
            loader.check_order(batches, order)
