"""nanoGPT's, llm.c's and modded-nanogpt's files of ids, read as they are."""

import struct

import numpy as np
import pytest
from test_train import SMALL, run

from nanogpt2.data.corpus import load_corpus
from nanogpt2.data.loader import make_batches, validation_batches
from nanogpt2.data.token_files import Joined, open_token_file
from nanogpt2.tokenizer import byte_tokenizer

BYTES = byte_tokenizer()
IDS = np.random.default_rng(0).integers(0, 257, 3000)


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def raw(path, ids=IDS):
    """Write ids as nanoGPT's prepare.py does."""
    path.parent.mkdir(parents=True, exist_ok=True)
    np.asarray(ids).astype(np.uint16).tofile(path)
    return path


def shard(path, ids=IDS, magic=20240520, version=1, dtype="<u2", count=None):
    """Write ids as llm.c's data_common.py does."""
    path.parent.mkdir(parents=True, exist_ok=True)
    header = np.zeros(256, np.int32)
    header[:3] = magic, version, len(ids) if count is None else count
    path.write_bytes(header.tobytes() + np.asarray(ids).astype(dtype).tobytes())
    return path


def test_nanogpts_folder(here):
    raw(here / "data/train.bin"), raw(here / "data/val.bin", IDS[:500])
    (here / "data/meta.pkl").write_bytes(b"cos\nsystem\n(S'touch harmed'\ntR.")
    (here / "data/input.txt").write_text("the text itself " * 20)
    (here / "data/prepare.py").write_text("raise SystemExit")
    corpus = load_corpus("data", BYTES)
    assert corpus.train.tolist() == IDS.tolist()
    assert corpus.validation.tolist() == IDS[:500].tolist()
    assert isinstance(corpus.train, np.memmap) and not corpus.train.flags.writeable
    assert not (here / "harmed").exists()
    said = corpus.describe(8)
    assert "skipped 1 (beside files of tokens): data/input.txt" in said
    assert "meta.pkl, a pickle, is not read" in said and said.count("input.txt") == 1
    # a file by itself: its end validates
    corpus = load_corpus("data/train.bin", BYTES)
    assert len(corpus.train) == 2700 and corpus.validation.tolist() == IDS[2700:].tolist()


@pytest.mark.parametrize(
    ("magic", "version", "dtype"), [(20240520, 1, np.uint16), (20240801, 7, np.uint32)]
)
def test_shards_are_one_stream(here, magic, version, dtype):
    like = {"magic": magic, "version": version, "dtype": dtype}
    for i, start in enumerate(range(0, 3000, 700), 1):
        shard(here / f"data/fineweb_train_{i:06}.bin", IDS[start : start + 700], **like)
    shard(here / "data/fineweb_val_000000.bin", IDS[:90], **like)
    corpus = load_corpus("data", BYTES)
    assert np.asarray(corpus.train).tolist() == IDS.tolist()
    assert all(isinstance(p, np.memmap) and p.dtype == dtype for p in corpus.train.parts)
    assert corpus.validation.tolist() == IDS[:90].tolist()
    joined, whole = (make_batches(ids, 64, 3) for ids in (corpus.train, IDS))
    assert joined.sequences == whole.sequences
    for first in range(0, 100, 7):
        for found, expected in zip(joined.rows(first, 7), whole.rows(first, 7), strict=True):
            assert (found == expected).all()
    # without the validation file the end of the last shard is held out
    corpus = load_corpus("data/*_train_*.bin", BYTES)
    assert np.asarray(corpus.train).tolist() == IDS[:2700].tolist()
    assert np.asarray(corpus.validation).tolist() == IDS[2700:].tolist()
    found = [y[y != -100] for _, y in validation_batches(corpus.validation, 4, 50)]
    assert np.concatenate(found).tolist() == IDS[2701:].tolist()
    # as a validation source, its validation files
    raw(here / "mine_train.bin", IDS[:200])
    corpus = load_corpus("mine_train.bin", BYTES, validation="data", block_size=8)
    assert len(corpus.train) == 200 and len(corpus.validation) == 90
    corpus = load_corpus("data", BYTES, validation="mine_train.bin", block_size=8)
    assert len(corpus.train) == 3000 and len(corpus.validation) == 200
    assert "its validation files: --validation names others" in corpus.describe(8)


def test_any_slice_of_joined_ids():
    joined = Joined([IDS[:10], IDS[10:10], IDS[10:11], IDS[11:40]])
    assert len(joined) == 40
    for start in range(-3, 42):
        for stop in range(start - 2, 44):
            assert np.asarray(joined[start:stop]).tolist() == IDS[:40][start:stop].tolist()
    inner = joined[5:30]
    assert np.asarray(inner[3:20]).tolist() == IDS[8:25].tolist()
    assert np.shares_memory(joined[12:20], IDS)
    with pytest.raises(ValueError, match="step"):
        joined[::2]


def test_arrays_of_numpys(here):
    (here / "data").mkdir()
    np.save("data/edu_train_000001.npy", IDS.astype(np.uint16))
    np.save("data/edu_val_000000.npy", IDS[:100].astype(np.int64))
    np.save("data/vectors.npy", np.zeros((4, 4)))
    corpus = load_corpus("data", BYTES)
    assert corpus.train.tolist() == IDS.tolist() and len(corpus.validation) == 100
    assert isinstance(corpus.train, np.memmap)
    np.save("mine.npy", IDS)
    assert len(load_corpus("mine.npy", BYTES).train) == 2700


def test_arrays_of_signed_and_unsigned_ids_are_joined_as_whole_numbers(here):
    (here / "data").mkdir()
    np.save("data/train_1.npy", IDS.astype(np.uint64))
    np.save("data/val_1.npy", IDS[:20].astype(np.uint64))
    np.save("data/val_2.npy", IDS[20:100].astype(np.int64))
    corpus = load_corpus("data", BYTES)
    assert np.asarray(corpus.validation).tolist() == IDS[:100].tolist()
    assert corpus.prompt(BYTES)
    np.save("huge.npy", np.full(300, 2**64 - 1, np.uint64))
    with pytest.raises(ValueError, match="outside the vocabulary"):
        load_corpus("huge.npy", BYTES)


def test_other_files_called_bin_in_a_folder_are_no_data(here):
    (here / "data").mkdir()
    (here / "data/a.txt").write_text("a text " * 20)
    for name in ("pytorch_model.bin", "training_args.bin", "blob.bin"):
        (here / "data" / name).write_bytes(b"\x80\x02}q\x00." * 50)
    (here / "data/optimizer_train.bin").write_bytes(b"PK\3\4" + bytes(90))
    corpus = load_corpus("data", BYTES)
    assert len(corpus.train) + len(corpus.validation) == 141
    assert corpus.readings[0].skipped["of another kind"].count == 4


def damaged(path, change):
    path.write_bytes(change(path.read_bytes()))
    return path


def header(path, text):
    """An array of numpy's with this header."""
    path.write_bytes(b"\x93NUMPY\x01\0" + struct.pack("<H", len(text)) + text.encode() + bytes(8))


BAD = {
    "odd_train.bin": (lambda p: damaged(raw(p), lambda b: b[:-1]), "5,999 bytes, an odd number"),
    "empty_train.bin": (lambda p: p.write_bytes(b""), "is empty"),
    "outside_train.bin": (lambda p: raw(p, [*IDS, 257]), "token id 257, outside the voc"),
    "any.bin": (raw, "is not known to hold token ids"),
    "text.bin": (lambda p: p.write_text("some words"), "is not known to hold token ids"),
    "short.bin": (lambda p: damaged(shard(p), lambda b: b[:-2]), "has 7,022 bytes, not 7,024"),
    "long.bin": (lambda p: damaged(shard(p), lambda b: b + b"ab"), "has 7,026 bytes, not 7,024"),
    "count.bin": (lambda p: shard(p, count=-5), "the -5 ids that its header states"),
    "huge.bin": (lambda p: shard(p, count=2**31 - 1), "2,147,483,647 ids that its header"),
    "none.bin": (lambda p: shard(p, []), "for the 0 ids"),
    "header.bin": (lambda p: damaged(shard(p), lambda b: b[:500]), "is cut off: 500 bytes"),
    "version.bin": (lambda p: shard(p, version=2), "of version 2; magic 20240520 has 1"),
    "llama.bin": (lambda p: shard(p, magic=20240801, version=1), "of version 1; magic 20240801"),
    "hellaswag_val.bin": (lambda p: shard(p, magic=20240522), "llm.c's magic 20240522"),
    "big.bin": (
        lambda p: shard(p, [128255], magic=20240801, version=7, dtype="<u4"),
        "token id 128255, outside",
    ),
    "float.npy": (lambda p: np.save(p, IDS / 2), "whole numbers in one dimension, not float64"),
    "table.npy": (lambda p: np.save(p, IDS.reshape(2, -1)), "of shape (2, 1500)"),
    "minus.npy": (lambda p: np.save(p, -IDS), "outside the vocabulary"),
    "object.npy": (
        lambda p: np.save(p, np.array([print], object), allow_pickle=True),
        "is no array that numpy saved",
    ),
    "no.npy": (lambda p: p.write_bytes(b"no"), "is no array that numpy saved"),
    "open.npy": (lambda p: header(p, "{'descr': '<i4"), "is no array that numpy saved"),
    "key.npy": (lambda p: header(p, "{[]: 1}"), "is no array that numpy saved"),
    "keys.npy": (lambda p: header(p, "{1: 2, 'a': 3}"), "is no array that numpy saved"),
    "many.npy": (
        lambda p: header(p, f"{{'descr': '<i4', 'fortran_order': False, 'shape': ({10**30},)}}"),
        "is no array that numpy saved",
    ),
    "void.npy": (lambda p: np.save(p, IDS[:0]), "is empty"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_file_that_is_not_as_it_says_is_one_line(here, capsys, name):
    make, message = BAD[name]
    make(here / name)
    assert run(name, *SMALL) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: DATA ") and said.count("\n") == 1 and len(said) <= 201
    assert name in said and message in said, said
    assert not (here / "out").exists()


def test_a_bad_shard_among_good_ones_is_named(here, capsys):
    for i in range(3):
        shard(here / f"data/x_train_{i}.bin")
    damaged(here / "data/x_train_1.bin", lambda b: b[:-2])
    assert run("data", *SMALL) == 2
    assert "x_train_1.bin' has 7,022 bytes" in capsys.readouterr().err


def test_only_validation_and_test_files_are_one_line(here, capsys):
    raw(here / "data/val.bin"), raw(here / "data/test.bin")
    assert run("data", *SMALL) == 2
    said = capsys.readouterr().err
    assert "no files to train on; it holds test, validation" in said
    assert run("data/val.bin", *SMALL, "--task", "chat") == 2
    assert "holds tokens; chat needs" in capsys.readouterr().err


def test_a_run_on_shards_is_the_run_on_their_ids(here, monkeypatch):
    from test_train import numbers

    for i in range(3):
        shard(here / f"data/x_train_{i}.bin", IDS[1000 * i : 1000 * (i + 1)])
    raw(here / "data/x_val.bin", IDS[:100])
    raw(here / "one/train.bin"), raw(here / "one/val.bin", IDS[:100])
    flags = [*SMALL, "--steps", "4", "--save_every", "2"]
    assert run("data", *flags, "--out", "a") == run("one", *flags, "--out", "b") == 0
    assert numbers("a") == numbers("b")
    sha256 = load_corpus("data", BYTES).sha256
    for name in ("x_train_1.bin", "x_val.bin"):
        shard(here / "data" / name, IDS[500:600])
        assert load_corpus("data", BYTES).sha256 != sha256
        sha256 = load_corpus("data", BYTES).sha256


def test_ids_of_a_header_are_not_read_as_ids(here):
    path = shard(here / "x.bin", IDS[:5])
    assert open_token_file(str(path)).tolist() == IDS[:5].tolist()
