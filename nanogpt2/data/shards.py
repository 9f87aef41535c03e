"""Token ids <-> a memory-mapped file with a checksum, so that damage is detected.

    offset  bytes  content
         0      8  magic: "ngpt2tok"
         8      4  version: 1
        12      4  type of an id: "<u2", "<u4" or "<i4", as numpy writes it
        16      8  number of ids
        24     32  SHA-256 of the ids' bytes
        56         the ids

Numbers are little-endian. A file is written under another name, synced and renamed, so it is
complete or absent. To train on tokens of your own pipeline, write them with `write_shard` and run
`python train.py FILE.tokens`. This file does not know texts or tokenizers.
"""

import hashlib
import os
import struct
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from nanogpt2.atomic import whole_file
from nanogpt2.filesystem import open_regular, sync

HEADER = struct.Struct("<8sI4sQ32s")
MAGIC, VERSION = b"ngpt2tok", 1
# keys as written in the header
DTYPES = {name.encode().ljust(4, b"\0"): np.dtype(name) for name in ("<u2", "<u4", "<i4")}

SCAN = 1 << 22  # ids that are looked at together

Ids = NDArray[np.integer]


def write_shard(
    path: str | Path, ids: Ids | Iterable[ArrayLike], dtype: DTypeLike = np.uint16
) -> None:
    """Write ids, given as one array or several in order; `dtype` is uint16, uint32 or int32.

    Raises ValueError for another dtype, for an id that does not fit it, and for an empty input.
    """
    path, dtype = Path(path), np.dtype(dtype).newbyteorder("<")
    if dtype not in DTYPES.values():
        raise ValueError(f"dtype must be uint16, uint32 or int32, not {dtype}")
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as partial:
        _write(partial, [ids] if isinstance(ids, np.ndarray) else ids, dtype)
    # sync the folder too, or a crash may undo the rename
    sync(path.parent)


def _write(path: Path, pieces: Iterable[ArrayLike], dtype: np.dtype) -> None:
    limits, count, digest = np.iinfo(dtype), 0, hashlib.sha256()
    with path.open("wb") as file:
        file.seek(HEADER.size)
        for piece in map(np.atleast_1d, pieces):
            if not piece.size:
                continue
            if piece.dtype.kind not in "iu":
                raise ValueError(f"ids must be whole numbers, not {piece.dtype}")
            for value in (int(piece.min()), int(piece.max())):
                if not limits.min <= value <= limits.max:
                    raise ValueError(f"id {value} does not fit {dtype.name}")
            data = np.ascontiguousarray(piece, dtype).tobytes()
            file.write(data)
            digest.update(data)
            count += piece.size
        if not count:
            raise ValueError("no ids to write")
        file.seek(0)
        name = dtype.str.encode()
        file.write(HEADER.pack(MAGIC, VERSION, name, count, digest.digest()))
        file.flush()
        os.fsync(file.fileno())


def open_shard(path: str | Path) -> Ids:
    """Check a whole file against its checksum and return its ids, mapped into memory.

    Raises ValueError for a malformed or damaged file, OSError for a file that cannot be read.
    """
    with open_regular(Path(path)) as file:
        header = file.read(HEADER.size)
        if len(header) < HEADER.size or not header.startswith(MAGIC):
            raise ValueError(f"{str(path)!r} is not a token file: it has no ngpt2tok header")
        _, version, name, count, sha256 = HEADER.unpack(header)
        if version != VERSION:
            raise ValueError(f"{str(path)!r} is a token file of version {version}, not {VERSION}")
        if name not in DTYPES:
            raise ValueError(f"{str(path)!r} has ids of the unknown type {name!r}")
        dtype = DTYPES[name]
        size, expected = os.fstat(file.fileno()).st_size, HEADER.size + count * dtype.itemsize
        if size != expected or not count:
            raise ValueError(f"{str(path)!r} has {size} bytes, not {expected} for {count} ids")
        if hashlib.file_digest(file, "sha256").digest() != sha256:
            raise ValueError(f"{str(path)!r} is damaged: its SHA-256 does not match")
        return np.memmap(file, dtype, mode="r", offset=HEADER.size, shape=(count,))


def extremes(ids: Ids) -> tuple[int, int]:
    """Return the smallest and the largest id.

    A mapped file is read and not touched in memory, where its pages would count as this process's.
    """
    low, high = [], []
    for start in range(0, len(ids), SCAN):
        part = ids[start : start + SCAN]
        if isinstance(ids, np.memmap) and ids.filename is not None:
            at = ids.offset + start * ids.itemsize
            read = np.fromfile(ids.filename, dtype=ids.dtype, count=len(part), offset=at)
            part = read.astype(ids.dtype, copy=False)
        low.append(int(part.min()))
        high.append(int(part.max()))
    return min(low), max(high)
