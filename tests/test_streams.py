"""The token cache: it never holds other tokens than its name says, and no leftovers for ever."""

import json
import os
import time

import numpy as np
import pytest

from nanogpt2.data import streams
from nanogpt2.data.content import Columns, Content
from nanogpt2.data.shards import open_shard, write_shard
from nanogpt2.data.streams import Streams
from nanogpt2.tokenizer import byte_tokenizer

BYTES = byte_tokenizer()
TEXTS = {
    "lm": "to be or not to be\n",
    "chat": '{"prompt": "a", "completion": "b"}\n',
    "classify": '{"text": "a", "label": "b"}\n',
}


@pytest.fixture
def read(tmp_path, monkeypatch):
    """Read a source with a cache; return its ids and its digest."""
    monkeypatch.chdir(tmp_path)

    def read(source, task="lm"):
        ids, digest, _ = Streams(BYTES, task, Columns(), 257, tmp_path / "cache").read(source)
        return ids.tolist(), digest

    return read


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.json", "a.csv", "a.parquet"])
def test_a_file_that_grows_while_it_is_read_does_not_poison_the_cache(
    tmp_path, monkeypatch, read, name
):
    path = tmp_path / name
    rows = [{"text": f"text {i}"} for i in range(9)]

    def write(count):
        if name == "a.parquet":
            import pyarrow
            from pyarrow import parquet

            parquet.write_table(pyarrow.Table.from_pylist(rows[:count]), path)
        elif name == "a.json":
            path.write_text(json.dumps(rows[:count], indent=1))
        elif name == "a.jsonl":
            path.write_text("".join(json.dumps(row) + "\n" for row in rows[:count]))
        else:
            path.write_text("text\n" + "".join(row["text"] + "\n" for row in rows[:count]))

    write(9)
    grown = read(name)
    for file in (tmp_path / "cache").iterdir():
        file.unlink()
    write(4)
    real = Content.encode
    monkeypatch.setattr(Content, "encode", lambda content: write(9) or real(content))
    assert read(name) == grown
    monkeypatch.setattr(Content, "encode", real)
    write(4)
    ids, digest = read(name)
    assert digest != grown[1] and len(ids) < len(grown[0])
    write(9)
    assert read(name) == grown


@pytest.mark.parametrize(
    ("task", "wrong"), [("lm", 257), ("chat", 257), ("chat", ~257), ("classify", ~300)]
)
def test_ids_outside_the_vocabulary_are_not_taken_from_the_cache(
    tmp_path, capsys, read, task, wrong
):
    (tmp_path / "a.jsonl").write_text(TEXTS[task] if task != "lm" else '{"text": "a"}\n')
    right = read("a.jsonl", task)
    capsys.readouterr()
    assert read("a.jsonl", task) == right and capsys.readouterr().err == ""
    (entry,) = (tmp_path / "cache").glob("*.tokens")
    ids = open_shard(entry)
    write_shard(entry, np.append(ids, ids.dtype.type(wrong)), ids.dtype)
    assert read("a.jsonl", task) == right
    assert "making it again" in capsys.readouterr().err
    assert open_shard(entry).tolist() == right[0]


def test_a_killed_runs_temporary_files_are_deleted_days_later(tmp_path, monkeypatch, read):
    (tmp_path / "a.txt").write_text(TEXTS["lm"])
    cache = tmp_path / "cache"
    cache.mkdir()
    entry = f".{'0a' * 32}-gpt2-12345678"
    ours = [
        f"{entry}.tokens.{'b' * 16}.tmp",
        f"{entry}.json.{'c' * 16}.tmp",
        f"{entry}.tokens.7.tmp",
    ]
    others = [".notes.tmp", f"{entry}.tokens", f"{entry}.tokens.tmp", "a.tmp"]
    for name in (*ours, *others):
        (cache / name).write_text("")
        old = time.time() - streams.LEFT_AFTER - 60
        os.utime(cache / name, (old, old))
    live = cache / ours[0].replace("0a", "0b")
    live.write_text("")
    read("a.txt")
    left = {path.name for path in cache.iterdir()}
    assert left.isdisjoint(ours) and {*others, live.name} <= left
    # a folder that cannot be cleaned costs nothing
    monkeypatch.setattr(streams.Path, "glob", lambda *_: (_ for _ in ()).throw(PermissionError()))
    (tmp_path / "a.txt").write_text("other words\n")
    assert bytes(read("a.txt")[0][:-1]) == b"other words\n"
