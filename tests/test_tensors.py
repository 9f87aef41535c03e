"""Safetensors by hand: the library reads what is written, and every byte counts."""

import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save

from nanogpt2.checkpoints import header as tensor_header
from nanogpt2.checkpoints import tensors as tensor_file
from nanogpt2.checkpoints.header import DIGEST, Digest

TENSORS = {
    "a": torch.arange(6, dtype=torch.float32).view(2, 3),
    "b": torch.tensor(2.5, dtype=torch.bfloat16),
    "c": torch.zeros(0, 3, dtype=torch.float16),
    "d": torch.arange(4).view(2, 2).t(),
}


def read(path, mapped=False, **options):
    with tensor_file.opened(path) as file:
        return dict((file.mapped if mapped else file.read)(TENSORS, **options))


def test_a_round_trip_and_the_library(tmp_path):
    path = tmp_path / "x.safetensors"
    tensor_file.write(path, TENSORS)
    (tmp_path / "y.safetensors").write_bytes(save({n: t.contiguous() for n, t in TENSORS.items()}))
    mapped = read(path, mapped=True)
    for found in (read(path), mapped, load_file(path), read(tmp_path / "y.safetensors")):
        assert found.keys() == TENSORS.keys()
        for name, tensor in TENSORS.items():
            assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor)
    with pytest.raises(ValueError, match="complex"):
        tensor_file.write(path, {"a": torch.zeros(1, dtype=torch.complex64)})


def test_the_digest_is_that_of_the_file_with_zeros_in_its_place(tmp_path):
    path = tmp_path / "x.safetensors"
    tensor_file.write(path, TENSORS)
    data = path.read_bytes()
    with tensor_file.opened(path) as file:
        stated = file.sha256
    assert hashlib.sha256(data.replace(stated.encode(), b"0" * 64)).hexdigest() == stated
    assert read(path, sha256=hashlib.sha256(data).hexdigest())
    with pytest.raises(ValueError, match="damaged"):
        read(path, sha256=stated)


def test_every_byte_counts(tmp_path):
    path = tmp_path / "x.safetensors"
    tensor_file.write(path, TENSORS)
    data = path.read_bytes()
    key = data.index(DIGEST.encode())
    for place in range(len(data)):
        changed = bytearray(data)
        changed[place] ^= 1
        path.write_bytes(changed)
        if key <= place < key + len(DIGEST):
            # it states nothing any more; a manifest beside it would
            assert all(torch.equal(read(path)[name], TENSORS[name]) for name in TENSORS)
            continue
        for mapped in (False, True):
            with pytest.raises(ValueError, match=r"x\.safetensors"):
                read(path, mapped=mapped)


@pytest.fixture
def digested(monkeypatch):
    """How many files were digested until now."""
    found = []
    run = Digest.run
    monkeypatch.setattr(Digest, "run", lambda self: found.append(self) or run(self))
    monkeypatch.setattr(tensor_header, "_AHEAD", {})
    return found


@pytest.mark.parametrize("stated", [True, False])
def test_a_file_that_is_digested_ahead(tmp_path, digested, stated):
    path = tmp_path / "x.safetensors"
    tensor_file.write(path, TENSORS)
    sha256 = None if stated else hashlib.sha256(path.read_bytes()).hexdigest()
    tensor_header.digest_ahead(path, sha256)
    for digests in (1, 2):
        # what was found holds once
        assert read(path, mapped=True, sha256=sha256) and len(digested) == digests


def test_a_file_that_changed_since_it_was_digested_ahead(tmp_path, digested):
    path, other = tmp_path / "x.safetensors", tmp_path / "y.safetensors"
    for each in (path, other):
        tensor_file.write(each, TENSORS)
    tensor_header.digest_ahead(path)
    data = bytearray(other.read_bytes())
    data[-1] ^= 1
    for change in (lambda: path.write_bytes(data), lambda: path.write_bytes(data + b"0")):
        change()
        with pytest.raises(ValueError, match=r"x\.safetensors"):
            read(path, mapped=True)
    tensor_header.digest_ahead(other)
    path.write_bytes(data)
    path.replace(other)
    with pytest.raises(ValueError, match="damaged"):
        read(other, mapped=True)


def test_damage_that_is_found_ahead(tmp_path, digested):
    path = tmp_path / "x.safetensors"
    tensor_file.write(path, TENSORS)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    tensor_header.digest_ahead(path)
    with pytest.raises(ValueError, match="damaged"):
        read(path, mapped=True)
    assert len(digested) == 1


def test_a_digest_that_another_is_asked_of(tmp_path, digested):
    path = tmp_path / "x.safetensors"
    tensor_file.write(path, TENSORS)
    tensor_header.digest_ahead(path)
    with pytest.raises(ValueError, match="damaged"):
        read(path, mapped=True, sha256="0" * 64)


def test_pages_that_are_released_come_back(tmp_path):
    path, tensors = tmp_path / "x.safetensors", {"a": torch.randn(9999), "b": torch.randn(7777)}
    tensor_file.write(path, tensors)
    with tensor_file.opened(path) as file:
        found = dict(file.mapped(tensors))
        for tensor in (*found.values(), torch.ones(9)):
            file.release(tensor)
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    resident = tmp_path / "y.safetensors"
    tensor_file.write(resident, {"a": torch.ones(4 * 2**20)})
    pages = []
    with tensor_file.opened(resident) as file:
        (_, tensor), *_ = file.mapped(["a"])
        for act in (torch.Tensor.sum, file.release):
            act(tensor)
            status = Path("/proc/self/status").read_text()
            pages.append(int(status.partition("RssFile:")[2].split()[0]))
    assert pages[0] - pages[1] > 15 * 1024


def test_an_open_file_is_one_file_whatever_happens_to_its_name(tmp_path):
    path, other = tmp_path / "x.safetensors", tmp_path / "y.safetensors"
    tensor_file.write(path, TENSORS)
    tensor_file.write(other, {name: tensor + 1 for name, tensor in TENSORS.items()})
    with tensor_file.opened(path) as file:
        other.replace(path)
        assert torch.equal(dict(file.read(TENSORS))["a"], TENSORS["a"])


@pytest.mark.parametrize("mapped", [False, True])
def test_a_file_that_is_cut_short_while_it_is_read(tmp_path, mapped):
    """Once it is mapped into memory it would end the process."""
    path = tmp_path / "x.safetensors"
    path.write_bytes(save({"a": torch.zeros(10**6)}))
    with tensor_file.opened(path) as file:
        path.open("r+b").close()
        with path.open("r+b") as again:
            again.truncate(1000)
        with pytest.raises(ValueError, match="cannot be mapped: mmap" if mapped else "cut short"):
            dict((file.mapped if mapped else file.read)(["a"]))


def entry(dtype="F32", shape=(1,), offsets=(0, 4), **more):
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets} | more


@pytest.mark.parametrize(
    "header",
    [
        "[]",
        "5",
        "",
        "\xff",
        "[" * 10**5,
        '{"a": 1}',
        '{"a": []}',
        '{"a": {}}',
        json.dumps({"a": entry()})[:-1] + ', "a": ' + json.dumps(entry()) + "}",
        '{"a": {"dtype": "F32", "dtype": "I32", "shape": [1], "data_offsets": [0, 4]}}',
        {"a": entry(more=1)},
        {"a": entry(dtype="F4")},
        {"a": entry(dtype=["F32"])},
        {"a": entry(shape=[-1])},
        {"a": entry(shape=[True])},
        {"a": entry(shape=[1.0])},
        {"a": entry(shape=[2])},
        {"a": entry(shape="1")},
        {"a": entry(shape=[[1]])},
        {"a": entry(shape=[1] * 10**5)},
        {"a": entry(shape=[0, 10**4000])},
        {"a": entry(offsets=[4, 8])},
        {"a": entry(offsets=[4, 0])},
        {"a": entry(offsets=[0])},
        {"a": entry(offsets=[0, 4, 8])},
        {"a": entry(offsets=[-4, 0])},
        {"a": entry(shape=[2], offsets=[0, 8])},
        {"a": entry(), "b": entry()},
        {"a": entry(), "__metadata__": 5},
        {"a": entry(), "__metadata__": {DIGEST: 5}},
        {"a": entry(), "__metadata__": {DIGEST: ""}},
        {},
    ],
    ids=lambda header: str(header)[:50],
)
def test_a_header_that_cannot_be(tmp_path, header):
    text = header.encode("latin-1") if isinstance(header, str) else json.dumps(header).encode()
    path = tmp_path / "x.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"\0" * 4)
    with pytest.raises(ValueError, match=r"x\.safetensors") as raised:
        read(path)
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 400
