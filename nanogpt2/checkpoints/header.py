"""The header of a safetensors file, checked in full, and the SHA-256 of a file's bytes.

    8 bytes      length of the header, little-endian
    header       JSON: {name: {"dtype", "shape", "data_offsets": [start, end]}, "__metadata__": {}}
    data         the tensors' bytes, without a gap

A file written by tensors.py states its own SHA-256 in its metadata, computed with zeros in place of
the digest's 64 characters.

`digest_ahead` digests a file while torch is imported, which takes as long, so this file does not
import torch. The parser is ours: safetensors' own (0.8.0) accepts a duplicate name and an unknown
field, opens the file a second time by its name, and hides the offsets.
"""

import hashlib
import json
import math
import mmap
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Thread
from typing import IO, Any

from typing_extensions import override

from nanogpt2.filesystem import open_regular

# bytes of one number
SIZES = {
    "F64": 8,
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "I64": 8,
    "I32": 4,
    "I16": 2,
    "I8": 1,
    "U8": 1,
    "BOOL": 1,
}
LONGEST_HEADER = 2**24  # bytes: four times that of a model with the most layers
MOST_AXES = 8
DIGEST = "nanogpt2.sha256"  # its key in the metadata
NO_DIGEST = "0" * 64
REPLACES = "nanogpt2.replaces"  # the texts that the file replaces others with: replace.py


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file: its name, type, shape and place.

    A tensor with numbers but without bytes (start = end) is all zeros. strides: in numbers, as
    PyTorch counts them; None for a tensor stored row by row.
    """

    file: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int  # in the file, in bytes
    end: int
    strides: tuple[int, ...] | None = None

    def transposed(self) -> "StoredTensor":
        """Return a matrix's transposed view: the same bytes."""
        rows, columns = self.shape
        down, across = self.strides or (columns, 1)
        plain = (across, down) == (rows, 1)
        strides = None if plain else (across, down)
        return replace(self, shape=(columns, rows), strides=strides)


class Layout:
    """The tensors of an open file, and its own statements about them.

    entries: by their start. sha256: of the file's bytes, None where the file does not state it.
    replaces: see replace.py. stated: the shape, by config.json's names; empty where not stated.
    """

    KIND = ""  # for messages
    is_linear = False  # projections are stored [out, in], as torch's Linear
    entries: list[StoredTensor]
    sha256: str | None = None
    replaces: Mapping[str, tuple[Any, Any]] = {}
    stated: Mapping[str, Any] = {}

    def __init__(self, path: Path, file: IO[bytes]) -> None:
        """file: open to read; its position does not matter."""
        self.path = path
        self.size = file.seek(0, 2)
        file.seek(0)

    def required_digest(self, sha256: str | None) -> tuple[str | None, bytes]:
        """Return the required digest, and the bytes to digest in place of the file's first ones."""
        return sha256, b""

    def broken(self, why: str) -> ValueError:
        """Return the error for a damaged file."""
        return ValueError(f"{str(self.path)!r} is no whole {self.KIND}: {why}")


class Header(Layout):
    """The checked header of an open safetensors file."""

    KIND = "safetensors file"

    def __init__(self, path: Path, file: IO[bytes]) -> None:
        """Read the header. Raises ValueError for an invalid one."""
        super().__init__(path, file)
        size = self.size
        length = file.read(8)
        announced = int.from_bytes(length, "little")
        if len(length) < 8 or announced > size - 8:
            raise self.broken(f"{size} bytes cannot hold its header")
        if announced > LONGEST_HEADER:
            raise self.broken(f"its header has {announced} bytes, above {LONGEST_HEADER}")
        header = file.read(announced)
        self._head = length + header
        try:
            stated = json.loads(header.decode("utf-8"), object_pairs_hook=_without_twins)
            metadata = stated.pop("__metadata__", {})
            self.sha256 = metadata.get(DIGEST)
            replaces = json.loads(metadata.get(REPLACES, "{}"))
            self.replaces = {name: (old, new) for name, (old, new) in replaces.items()}
            found = [_entry(path, name, value) for name, value in stated.items()]
        except (ValueError, TypeError, AttributeError, LookupError, RecursionError) as error:
            raise self.broken(f"its header: {error}") from None
        found = sorted(found, key=lambda entry: (entry.start, entry.end))
        end = 0
        for entry in found:
            if entry.start != end:
                raise self.broken(f"{entry.name!r} starts at {entry.start}, not at {end}")
            end = entry.end
        first = len(self._head)
        if end != size - first:
            raise self.broken(f"its tensors take {end} bytes, not {size - first}")
        self.entries = [replace(e, start=e.start + first, end=e.end + first) for e in found]

    @override
    def required_digest(self, sha256: str | None) -> tuple[str | None, bytes]:
        """Return the required digest, `sha256` or the file's own, and the head to digest."""
        if sha256 is not None or self.sha256 is None:
            return sha256, self._head
        return self.sha256, self._head.replace(str(self.sha256).encode(), NO_DIGEST.encode(), 1)


def _without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name is there twice")
    return found


def _entry(path: Path, name: str, stated: Mapping[str, Any]) -> StoredTensor:
    """Read the header's entry of one tensor. Raises an error for an invalid one."""
    dtype, shape, (start, end) = stated["dtype"], stated["shape"], stated["data_offsets"]
    if len(stated) != 3 or dtype not in SIZES:
        raise ValueError(f"tensor {name!r} has no known type")
    sizes = [*shape, start, end]
    if len(shape) > MOST_AXES or any(type(n) is not int or not 0 <= n < 2**63 for n in sizes):
        raise ValueError(f"tensor {name!r} has no shape or place")
    if end - start != math.prod(shape) * SIZES[dtype]:
        raise ValueError(f"tensor {name!r} does not take the bytes of its shape")
    return StoredTensor(path, name, dtype, tuple(shape), start, end)


# ---- digests of files that are mapped into memory


class Digest(Thread):
    """The SHA-256 of a mapped file, computed in the background."""

    def __init__(self, head: bytes, mapping: mmap.mmap) -> None:
        """head: digested in place of the file's first bytes."""
        super().__init__(daemon=True)
        self._head, self._mapping, self._found = head, mapping, ""
        self.start()

    @override
    def run(self) -> None:
        digest = hashlib.sha256(self._head)
        # in one call, which releases the GIL: between two calls the thread would wait for it
        with memoryview(self._mapping) as whole, whole[len(self._head) :] as data:
            digest.update(data)
        self._found = digest.hexdigest()

    def result(self) -> str:
        """Wait for the digest and return it, in hexadecimal."""
        self.join()
        return self._found


# by the file's state and the head to digest
_AHEAD: dict[tuple[Any, ...], Digest] = {}


def digest_ahead(path: Path, sha256: str | None = None) -> None:
    """Start to digest a file that is mapped later and must have this SHA-256, by default its own.

    Raises ValueError for an invalid safetensors file, OSError for an unreadable one.
    """
    layout = Header if path.suffix == ".safetensors" else Layout
    with open_regular(path) as file:
        stated, head = layout(path, file).required_digest(sha256)
        if stated is not None:
            mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            _AHEAD[*_state(file), head] = Digest(head, mapping)


def digest_of(file: IO[bytes], head: bytes, mapping: mmap.mmap) -> Digest:
    """Return the digest of a mapped file: the one started ahead if the file is unchanged."""
    return _AHEAD.pop((*_state(file), head), None) or Digest(head, mapping)


def _state(file: IO[bytes]) -> tuple[int, ...]:
    state = os.fstat(file.fileno())
    return state.st_dev, state.st_ino, state.st_size, state.st_mtime_ns
