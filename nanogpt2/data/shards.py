"""Token ids <-> a file that is mapped into memory, and whose damage is found.

    offset  bytes  what
         0      8  magic: "ngpt2tok"
         8      4  version: 1
        12      4  type of an id: "<u2", "<u4" or "<i4", as numpy writes it
        16      8  number of ids
        24     32  SHA-256 of the ids' bytes
        56         the ids

Numbers are little-endian. A file is written aside, synced and renamed: it is whole or absent. With
`write_shard` a pipeline of one's own makes the FILE.tokens of `python train.py FILE.tokens`. This
file does not know texts or tokenizers.
"""

import hashlib
import os
import struct
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from nanogpt2.atomic import whole_file

HEADER = struct.Struct("<8sI4sQ32s")
MAGIC, VERSION = b"ngpt2tok", 1
# as they stand in the header
DTYPES = {name.encode().ljust(4, b"\0"): np.dtype(name) for name in ("<u2", "<u4", "<i4")}

Ids = NDArray[np.integer]


def write_shard(
    path: str | Path, ids: Ids | Iterable[ArrayLike], dtype: DTypeLike = np.uint16
) -> None:
    """Write ids, given as one array or as many, in order; `dtype` is uint16, uint32 or int32.

    Raises ValueError for a type or an id that the file cannot hold, and where there is no id.
    """
    path, dtype = Path(path), np.dtype(dtype).newbyteorder("<")
    if dtype not in DTYPES.values():
        raise ValueError(f"dtype must be uint16, uint32 or int32, not {dtype}")
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as partial:
        _write(partial, [ids] if isinstance(ids, np.ndarray) else ids, dtype)
    # the rename lasts once the folder is on disk
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


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
            raise ValueError("there is no id to write")
        file.seek(0)
        name = dtype.str.encode()
        file.write(HEADER.pack(MAGIC, VERSION, name, count, digest.digest()))
        file.flush()
        os.fsync(file.fileno())


def open_shard(path: str | Path) -> Ids:
    """Return the ids of a file, mapped into memory, after all of it was checked.

    Raises ValueError that says what is wrong with the file, OSError where it cannot be read.
    """
    with Path(path).open("rb") as file:
        header = file.read(HEADER.size)
        if len(header) < HEADER.size or not header.startswith(MAGIC):
            raise ValueError(f"{str(path)!r} is no token file: it does not begin as one")
        _, version, name, count, sha256 = HEADER.unpack(header)
        if version != VERSION:
            raise ValueError(f"{str(path)!r} is a token file of version {version}, not {VERSION}")
        if name not in DTYPES:
            raise ValueError(f"{str(path)!r} has ids of the unknown type {name!r}")
        dtype = DTYPES[name]
        size, expected = os.fstat(file.fileno()).st_size, HEADER.size + count * dtype.itemsize
        if size != expected or not count:
            raise ValueError(f"{str(path)!r} has {size} bytes, {expected} for {count} ids")
        if hashlib.file_digest(file, "sha256").digest() != sha256:
            raise ValueError(f"{str(path)!r} is damaged: its SHA-256 does not hold")
        return np.memmap(file, dtype, mode="r", offset=HEADER.size, shape=(count,))
