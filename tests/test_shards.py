"""Token files: the ids come back, and damage is detected."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanogpt2.data import shards
from nanogpt2.data.shards import HEADER, open_shard, write_shard


@pytest.mark.parametrize("dtype", [np.uint16, np.uint32, np.int32])
def test_ids_come_back_mapped(tmp_path, dtype):
    path = tmp_path / "new/folder/ids.tokens"
    write_shard(path, [[1, 2], np.array([3], np.int64), [], np.array([500, 4], np.uint16)], dtype)
    ids = open_shard(path)
    assert ids.tolist() == [1, 2, 3, 500, 4] and ids.dtype == dtype
    assert isinstance(ids, np.memmap) and not ids.flags.writeable
    assert path.stat().st_size == HEADER.size + 5 * ids.itemsize
    assert [file.name for file in path.parent.iterdir()] == ["ids.tokens"]


@given(st.lists(st.lists(st.integers(0, 2**16 - 1)), min_size=1))
def test_one_array_or_several_give_one_file(tmp_path_factory, pieces):
    path = tmp_path_factory.mktemp("shard") / "ids.tokens"
    whole = np.array([i for piece in pieces for i in piece], np.uint16)
    if not len(whole):
        with pytest.raises(ValueError, match="no id"):
            write_shard(path, pieces)
        return
    write_shard(path, pieces)
    in_pieces = path.read_bytes()
    write_shard(path, whole)
    assert path.read_bytes() == in_pieces and np.array_equal(open_shard(path), whole)


@pytest.mark.parametrize(
    ("ids", "dtype", "message"),
    [
        ([[1], [70_000]], np.uint16, "70000 does not fit uint16"),
        ([[-1]], np.uint32, "-1 does not fit"),
        ([[0.5]], np.uint16, "whole numbers, not float64"),
        ([[1]], np.int64, "dtype must be uint16, uint32 or int32, not int64"),
        ([], np.uint16, "no id"),
    ],
)
def test_a_refused_input_leaves_the_file_unchanged(tmp_path, ids, dtype, message):
    path = tmp_path / "ids.tokens"
    write_shard(path, [[1, 2, 3]])
    with pytest.raises(ValueError, match=message):
        write_shard(path, ids, dtype)
    assert open_shard(path).tolist() == [1, 2, 3]
    assert [*tmp_path.iterdir()] == [path]


def test_a_writer_that_fails_leaves_the_file_unchanged(tmp_path):
    path = tmp_path / "ids.tokens"
    write_shard(path, [[1, 2, 3]])

    def dying():
        yield [4]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_shard(path, dying())
    assert open_shard(path).tolist() == [1, 2, 3] and [*tmp_path.iterdir()] == [path]


def test_file_and_folder_are_synced_around_the_rename(tmp_path, monkeypatch):
    done = []
    sync, rename = shards.os.fsync, shards.Path.replace
    monkeypatch.setattr(shards.os, "fsync", lambda fd: (done.append("sync"), sync(fd)))
    monkeypatch.setattr(shards.Path, "replace", lambda a, b: (done.append("rename"), rename(a, b)))
    write_shard(tmp_path / "ids.tokens", [[1]])
    assert done == ["sync", "rename", "sync"]


@pytest.mark.parametrize("dtype", [np.uint16, np.uint32, np.int32])
def test_every_flipped_bit_is_found(tmp_path, dtype):
    path = tmp_path / "ids.tokens"
    write_shard(path, [range(40)], dtype)
    whole = path.read_bytes()
    for place in range(8 * len(whole)):
        damaged = bytearray(whole)
        damaged[place // 8] ^= 1 << place % 8
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"ids.tokens"):
            open_shard(path)
    path.write_bytes(whole)
    assert open_shard(path).tolist() == [*range(40)]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda b: b"", "is not a token file"),
        (lambda b: b"x" * 99, "is not a token file"),
        (lambda b: b[:8] + b"\2" + b[9:], "of version 2, not 1"),
        (lambda b: b[:12] + b"<f4\0" + b[16:], "unknown type"),
        (lambda b: b[:-1], "has 61 bytes, not 62 for 3 ids"),
        (lambda b: b + b"\0", "has 63 bytes, not 62 for 3 ids"),
        (lambda b: b[:16] + bytes(8) + b[24:56], "for 0 ids"),
        (lambda b: b[:-1] + b"x", "SHA-256"),
    ],
)
def test_damage_is_named(tmp_path, damage, message):
    path = tmp_path / "ids.tokens"
    write_shard(path, [[1, 2, 3]])
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=message):
        open_shard(path)
