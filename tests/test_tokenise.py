"""Long texts: the same ids by any number of processes, after any kill, in bounded memory."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from reference import ROOT

from nanogpt2 import terminal
from nanogpt2.added_tokens import AddedToken
from nanogpt2.data import parallel, tokenise
from nanogpt2.data.content import Columns
from nanogpt2.data.encode import encode_texts, split_texts
from nanogpt2.data.parallel import Encoder, batches, last_cut
from nanogpt2.data.streams import Streams
from nanogpt2.data.unfinished import Unfinished
from nanogpt2.tokenizer import Tokenizer, byte_tokenizer, gpt2_tokenizer

GPT2 = gpt2_tokenizer()
BYTES = byte_tokenizer()
END = "<|endoftext|>"
# all that the pattern tells apart, and blanks that Python and the pattern do not agree on
ALPHABET = [
    "a",
    "I'll",
    "'s",
    "7",
    "-",
    " ",
    "\n",
    "\t",
    "\x1c",
    "\x85",
    "\xa0",
    "\u3000",
    "é",
    "文",
]
TEXTS = st.lists(st.sampled_from([*ALPHABET, END, " the", "  "]), max_size=60).map("".join)


def ids_of(text, tokenizer=GPT2):
    return [i for ids in encode_texts([text], tokenizer) for i in ids.tolist()]


@pytest.fixture
def small(monkeypatch):
    """Blocks of some hundred characters, so that a short text has many."""
    monkeypatch.setattr(parallel, "BATCH", 100)
    monkeypatch.setattr(tokenise, "BLOCK", 3)
    monkeypatch.setattr(tokenise, "LONGEST_BLOCK", 30)


@settings(max_examples=300)
@given(TEXTS)
@example("'ll " * 9 + "x")
@example("a" * 99 + "\n\n\n" + END)
def test_the_ids_of_two_sides_of_a_cut_are_those_of_the_whole(text):
    cut = last_cut(text, END)
    assert ids_of(text[:cut]) + ids_of(text[cut:]) == GPT2.encode(text, allow_special=True)


@given(TEXTS, st.lists(st.integers(0, 400), max_size=6))
def test_the_batches_depend_on_the_text_alone(text, places):
    edges = sorted({0, len(text), *(p for p in places if p < len(text))})
    parts = [text[a:b] for a, b in pairwise(edges)]
    held = parallel.BATCH
    parallel.BATCH = 20
    try:
        found = [*batches(parts, gpt2_tokenizer())]
        assert (
            found == [*batches([text], gpt2_tokenizer())]
            and "".join(part for part, _ in found) == text
        )
        assert all(len(part) <= 20 for part, _ in found)
        with Encoder(GPT2, 1) as encoder:
            pairs = [*encoder.encode(found)]
        assert sum(count for count, _ in pairs) == len(found)
        ids = [i for _, piece in pairs for i in piece.tolist()]
        assert ids == GPT2.encode(text, allow_special=True)
    finally:
        parallel.BATCH = held


def test_the_cuts_take_linear_time(monkeypatch):
    tabs = "1\t\n" * 200_000
    started = time.process_time()
    assert last_cut(tabs, END) == 0
    # a record comes as one part
    monkeypatch.setattr(parallel, "BATCH", 100)
    text = "word " * 2**20
    assert sum(len(part) for part, _ in batches([text], GPT2)) == len(text)
    # in quadratic time they took 20 s
    assert time.process_time() - started < 5


def book(folder, texts=200):
    """Texts of all lengths, a blank one and one without a blank in it among them."""
    some = [f"Text {i}: " + "to be, or not to be — that's it. \n" * (i % 13) for i in range(texts)]
    some[5], some[9] = "  \n", "x" * 999 + "文" * 500
    path = folder / "book.txt"
    path.write_text(END.join(some), encoding="utf-8")
    return path


def read(source, cache, tokenizer=GPT2, processes=1, **more):
    streams = Streams(tokenizer, "lm", Columns(), tokenizer.vocab_size, cache, **more)
    ids, digest, reading = Streams(**vars(streams) | {"processes": processes}).read(str(source))
    return ids.tolist(), digest, reading.records


@pytest.mark.parametrize("tokenizer", [BYTES, GPT2], ids=["bytes", "gpt2"])
def test_any_number_of_processes_gives_the_same_ids(tmp_path, small, tokenizer):
    path = book(tmp_path)
    found = [read(path, tmp_path / f"{n}", tokenizer, n) for n in (1, 2, 3)]
    assert found[0] == found[1] == found[2] and found[0][2] == 199
    files = [sorted(tmp_path.glob(f"{n}/*.tokens")) for n in (1, 2, 3)]
    assert len({one.read_bytes() for (one,) in files}) == 1
    assert not [p for p in tmp_path.rglob("*") if p.name.startswith(".")], "a part is left"
    # the order is the one that this data has always had
    text = path.read_text(encoding="utf-8")
    texts = [t for t in ("".join(parts) for parts in split_texts([text], END)) if t.strip()]
    order = np.random.default_rng(1558).permutation(len(texts))
    expected = [i for n in order for i in (*tokenizer.encode(texts[n]), tokenizer.end_of_text)]
    assert found[0][0] == expected


@pytest.mark.parametrize("added", [["<user>"], ["<user>", "be, or"], ["to be "]])
def test_added_tokens_are_found_by_every_process(tmp_path, small, added):
    """Where a token has a blank in it, a text is cut behind its end alone."""
    grown = GPT2.with_added(added)
    assert Tokenizer.of(json.loads(json.dumps(grown.arguments()))) == grown
    path = book(tmp_path)
    path.write_text(path.read_text("utf-8").replace("Text", "<user>"), encoding="utf-8")
    one, two = (read(path, tmp_path / f"{n}", grown, n) for n in (1, 2))
    assert one == two and {grown.encode(text)[0] for text in added} <= {*one[0]}
    texts = [t for t in path.read_text("utf-8").split(END) if t.strip()]
    order = np.random.default_rng(1558).permutation(len(texts))
    expected = [i for n in order for i in (*grown.encode(texts[n]), grown.end_of_text)]
    assert one[0] == expected


def test_another_end_token_parts_the_texts(tmp_path, small):
    vocabulary = {"</s>" if token == END else token: i for token, i in BYTES.vocabulary.items()}
    eos = AddedToken("</s>", 256, special=True)
    own = Tokenizer("own", "", vocabulary, [eos], {"eos_token": "</s>"})
    path = book(tmp_path)
    path.write_text(path.read_text("utf-8").replace(END, "</s>"), encoding="utf-8")
    one, two = (read(path, tmp_path / f"{n}", own, n) for n in (1, 2))
    assert one == two and one[2] == 199 and one[0].count(256) == 199


def test_records_of_every_kind_are_shared_out_too(tmp_path, small):
    texts = [f"record {i}: " + "words of it. " * (i % 30) for i in range(150)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    (tmp_path / "b.csv").write_text("text\n" + "".join(f'"{t}"\n' for t in texts))
    one, two = (read(tmp_path / "*.*", tmp_path / f"c{n}", processes=n) for n in (1, 2))
    assert one == two and one[2] == 300


def test_a_worker_that_dies_costs_nothing_but_time(tmp_path, small, monkeypatch):
    path, real = book(tmp_path), parallel.receive
    expected = read(path, tmp_path / "a")
    calls = []

    def dying(stream):
        calls.append(1)
        if len(calls) in (4, 9):
            raise EOFError
        return real(stream)

    monkeypatch.setattr(parallel, "receive", dying)
    assert (read(path, tmp_path / "b", processes=2) == expected) is True and len(calls) > 9
    # where no process can be started
    monkeypatch.setattr(parallel.sys, "executable", str(tmp_path / "missing"))
    assert (read(path, tmp_path / "c", processes=2) == expected) is True


def test_a_worker_loads_no_torch_and_ends_with_its_input():
    code = (
        "import sys; from nanogpt2.data import worker; worker.main();"
        "sys.exit('torch' in sys.modules)"
    )
    parts = json.dumps(BYTES.arguments()).encode(), b"ab"
    message = b"".join(len(part).to_bytes(8, "little") + part for part in parts)
    for cut in (len(message), len(message) - 1, 3):
        ran = subprocess.run(
            [sys.executable, "-W", "error", "-c", code],
            input=message[:cut],
            capture_output=True,
            cwd=ROOT,
        )
        assert ran.returncode == 0 and not ran.stderr
        whole = (4).to_bytes(8, "little") + np.array([97, 98], np.uint16).tobytes()
        assert ran.stdout == (whole if cut == len(message) else b"")


# ---- a kill

# a process of its own, which loads no torch
ALONE = """
import os, resource, signal, sys, time
from pathlib import Path
from nanogpt2 import terminal
from nanogpt2.data import parallel, tokenise
from nanogpt2.data.content import Columns
from nanogpt2.data.streams import Streams
from nanogpt2.data.unfinished import Unfinished
from nanogpt2.tokenizer import byte_tokenizer, gpt2_tokenizer

def read(source, tokenizer, processes):
    size = tokenizer.vocab_size
    Streams(tokenizer, "lm", Columns(), size, Path("cache"), processes=processes).read(source)
"""
KILLED = """
parallel.BATCH, tokenise.BLOCK, tokenise.LONGEST_BLOCK = 100, 3, 30
left, real = int(sys.argv[1]), Unfinished._write

def write(made):
    global left
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    left -= 1
    real(made)

Unfinished._write = write
read("book.txt", gpt2_tokenizer(), int(sys.argv[2]))
"""


def alone(code, folder, *arguments):
    argv = [sys.executable, "-c", ALONE + code, *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(argv, cwd=folder, env=environment, capture_output=True, text=True)


def encoded(monkeypatch):
    """Collect the texts that are encoded in this process."""
    texts, real = [], parallel.encode_texts

    def counting(parts, tokenizer):
        return real((texts.append(part) or part for part in parts), tokenizer)

    monkeypatch.setattr(parallel, "encode_texts", counting)
    return texts


@pytest.mark.parametrize(("blocks", "processes"), [(0, 1), (1, 2), (25, 1), (40, 2)])
def test_a_killed_process_is_taken_up_where_it_was(
    tmp_path, small, monkeypatch, capsys, blocks, processes
):
    path = book(tmp_path)
    expected = read(path, tmp_path / "whole")
    ran = alone(KILLED, tmp_path, blocks, processes)
    assert ran.returncode == -signal.SIGKILL, ran.stderr
    left = sorted(p.name.rpartition(".")[2] for p in tmp_path.glob("cache/*"))
    assert left == (["ids", "journal"] if blocks else [])
    pieces = [*tokenise._blocks(batches([path.read_text(encoding="utf-8")], gpt2_tokenizer()))]
    texts = encoded(monkeypatch)
    capsys.readouterr()
    assert (read(path, tmp_path / "cache") == expected) is True
    said = capsys.readouterr().err
    assert ("MB of it were tokenised before a stop" in said) == (blocks > 0)
    # the last <|endoftext|> may make a batch of its own
    left = sum(len(block) for _, block in pieces[blocks:])
    assert len(texts) - left in (0, 1)
    assert len([*(tmp_path / "cache").iterdir()]) == 2


def test_a_text_without_a_place_to_cut_is_made_again_from_there(tmp_path, small, monkeypatch):
    monkeypatch.setattr(tokenise, "LONGEST_BLOCK", 6)
    path = book(tmp_path)
    digests = [
        digest
        for digest, _ in tokenise._blocks(batches([path.read_text("utf-8")], gpt2_tokenizer()))
    ]
    assert 0 < digests.index("") < 10 and digests.count("") > 2 and digests[-1]
    expected = read(path, tmp_path / "whole")
    leave(tmp_path, monkeypatch)
    texts = encoded(monkeypatch)
    assert (read(path, tmp_path / "cache") == expected) is True
    size = len(path.read_text("utf-8"))
    assert size - 4000 < sum(map(len, texts)) < size


def leave(tmp_path, monkeypatch, blocks=20):
    """Stop after some blocks, as Ctrl-C does; return the files of the parts."""
    left, real = [blocks], Unfinished._write

    def write(made):
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        real(made)

    with monkeypatch.context() as patch:
        patch.setattr(Unfinished, "_write", write)
        with pytest.raises(KeyboardInterrupt):
            read(tmp_path / "book.txt", tmp_path / "cache", processes=2)
    ids, journal = sorted((tmp_path / "cache").iterdir())
    assert len(journal.read_text().splitlines()) == blocks
    return ids, journal


def flip(path, place):
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "kept"),
    [
        (lambda ids, journal: flip(ids, 0), 0),
        (lambda ids, journal: flip(ids, ids.stat().st_size - 1), 19),
        (lambda ids, journal: os.truncate(ids, ids.stat().st_size - 1), 19),
        (lambda ids, journal: ids.unlink(), 0),
        (lambda ids, journal: journal.unlink(), 0),
        (lambda ids, journal: journal.write_bytes(b""), 0),
        (lambda ids, journal: os.truncate(journal, journal.stat().st_size - 5), 19),
        (lambda ids, journal: journal.write_text("[1]\n" + journal.read_text()), 0),
        (lambda ids, journal: journal.write_text('{"text": 5, "ids": -3, "sha256": 1}\n'), 0),
        (lambda ids, journal: ids.write_bytes(ids.read_bytes() + b"more"), 20),
    ],
)
def test_damaged_parts_are_made_again(tmp_path, small, monkeypatch, damage, kept):
    path = book(tmp_path)
    expected = read(path, tmp_path / "whole")
    ids, journal = leave(tmp_path, monkeypatch)
    lines = journal.read_text().splitlines()
    damage(ids, journal)
    made = Unfinished(ids.with_suffix(""), np.dtype(np.uint16))
    assert len(made.known) == kept and made.known == [json.loads(n)["text"] for n in lines][:kept]
    made.close()
    assert (read(path, tmp_path / "cache") == expected) is True
    assert len([*(tmp_path / "cache").iterdir()]) == 2


def test_parts_of_another_text_are_not_used(tmp_path, small, monkeypatch):
    """The name says what was read first; the bytes may have changed between the readings."""
    path = book(tmp_path)
    ids, journal = leave(tmp_path, monkeypatch)
    kept = ids.read_bytes(), journal.read_bytes()
    text = path.read_text(encoding="utf-8")
    path.write_text(text.replace("Text 12:", "TEXT 12:"), encoding="utf-8")
    expected = read(path, tmp_path / "whole")
    streams = Streams(GPT2, "lm", Columns(), GPT2.vocab_size, tmp_path / "cache")
    wanted = next((tmp_path / "whole").glob("*.tokens")).name
    for file, data in zip((ids, journal), kept, strict=True):
        file.with_name(f".{wanted}{file.suffix}").write_bytes(data)
    found, _, _ = streams.read(str(path))
    assert found.tolist() == expected[0]


def test_two_processes_do_not_share_the_parts(tmp_path, small, monkeypatch):
    path = book(tmp_path)
    expected = read(path, tmp_path / "whole")
    ids, journal = leave(tmp_path, monkeypatch)
    holder = Unfinished(ids.with_suffix(""), np.dtype(np.uint16))
    kept = ids.read_bytes(), journal.read_bytes()
    try:
        assert (read(path, tmp_path / "cache") == expected) is True
        assert (ids.read_bytes(), journal.read_bytes()) == kept
        assert sorted((tmp_path / "cache").glob(".*")) == [ids, journal]
    finally:
        holder.close()


@pytest.mark.parametrize("after", [0, 7])
def test_a_full_disk_costs_the_parts_only(tmp_path, small, monkeypatch, after):
    path = book(tmp_path)
    expected, real, calls = read(path, tmp_path / "whole"), Unfinished._write, []

    def write(made):
        calls.append(1)
        if len(calls) > after:
            raise OSError(28, "No space left on device")
        real(made)

    monkeypatch.setattr(Unfinished, "_write", write)
    assert (read(path, tmp_path / "cache", processes=2) == expected) is True
    assert len(calls) == after + 1 and not [*(tmp_path / "cache").glob(".*")]


def test_old_parts_are_deleted_after_a_month(tmp_path, small, monkeypatch):
    book(tmp_path)
    files = leave(tmp_path, monkeypatch)
    (tmp_path / "other.txt").write_text("other words")
    for days, are_there in ((29, True), (31, False)):
        then = time.time() - days * 24 * 3600
        for file in files:
            os.utime(file, (then, then))
        read(tmp_path / "other.txt", tmp_path / "cache")
        for entry in (tmp_path / "cache").glob("*.tokens"):
            entry.unlink()
        assert all(file.exists() == are_there for file in files)


def test_an_error_found_late_stops_the_work_at_once(tmp_path, small, monkeypatch):
    """Nothing is tokenised after the first bad record: an hour's work would be for nothing."""
    rows = [json.dumps({"text": "some words " * 20})] * 60
    (tmp_path / "a.jsonl").write_text("\n".join([*rows[:10], '{"text": ""}', *rows, '{"text": 1}']))
    texts = encoded(monkeypatch)
    with pytest.raises(ValueError, match=r"2 of 72 records are bad .* line 11, line 72"):
        read(tmp_path / "a.jsonl", tmp_path / "cache")
    assert 0 < sum(map(len, texts)) < 15 * 220


# ---- memory and progress

MEASURED = """
parallel.BATCH = 1 << 17
read(sys.argv[1], byte_tokenizer(), int(sys.argv[2]))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_the_memory_does_not_grow_with_the_text(tmp_path, processes):
    peaks = []
    for megabytes in (16, 64):
        path = tmp_path / f"{megabytes}.txt"
        with path.open("w") as file:
            for i in range(megabytes * 10):
                file.write(f"{i} " + "some words of a text\n" * 4990 + END)
        ran = alone(MEASURED, tmp_path, path, processes)
        assert ran.returncode == 0, ran.stderr
        peaks.append(int(ran.stdout) / 1024)  # MiB
    # the ids of the larger text take 96 MB more
    assert peaks[1] - peaks[0] < 24, peaks


def test_the_progress_has_a_speed_and_the_time_left(tmp_path, small, monkeypatch, capsys):
    path = book(tmp_path)
    drawn = []

    class Bar(terminal.Progress):
        def advance(self, count, said=""):
            drawn.append((count, said))
            super().advance(count, said)

    monkeypatch.setattr(tokenise.terminal, "Progress", Bar)
    monkeypatch.setattr(tokenise, "_megabytes", lambda size: size)
    read(path, tmp_path / "cache")
    assert sum(count for count, _ in drawn) == path.stat().st_size
    assert all(re.fullmatch(r"[\d.]+ MB/s", said) for _, said in drawn)
    assert "tokenising" in capsys.readouterr().err
    assert "{remaining}" in terminal.BAR_FORMAT
    # a short text says nothing
    (tmp_path / "short.txt").write_text("some words")
    read(tmp_path / "short.txt", tmp_path / "cache")
    assert capsys.readouterr().err == ""


INTERRUPTED = """
terminal.prepare()
parallel.BATCH, tokenise.BLOCK, tokenise.LONGEST_BLOCK = 100, 3, 30
real = Unfinished._write

def write(made):
    real(made)
    print("written", flush=True)
    time.sleep(0.05)

Unfinished._write = write
read("book.txt", gpt2_tokenizer(), 2)
"""


def test_ctrl_c_ends_at_once_and_leaves_what_was_made(tmp_path, small):
    path = book(tmp_path)
    expected = read(path, tmp_path / "whole")
    argv = [sys.executable, "-c", ALONE + INTERRUPTED]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    pipes["env"] = os.environ | {"PYTHONPATH": str(ROOT)}
    # as a terminal does: the signal goes to the whole group
    with subprocess.Popen(argv, cwd=tmp_path, start_new_session=True, **pipes) as running:
        for _ in range(3):
            assert running.stdout.readline() == "written\n"
        os.killpg(running.pid, signal.SIGINT)
        _, said = running.communicate()
    assert running.returncode == 130 and "Traceback" not in said and "Exception" not in said
    journal = next((tmp_path / "cache").glob(".*.journal"))
    assert len(journal.read_text().splitlines()) >= 3
    assert (read(path, tmp_path / "cache") == expected) is True
    assert Path(tmp_path / "cache").exists()
