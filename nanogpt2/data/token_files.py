"""Files of token ids that other programs wrote, mapped into memory as they are.

    .bin of nanoGPT                      uint16 ids, no header
    .bin of llm.c and modded-nanogpt     256 int32: a magic number, a version, the number of ids;
                                         then the ids, 16 bits each with magic 20240520 (version 1),
                                         32 bits with 20240801 (version 7, Llama 3's vocabulary)
    .npy                                 an array of one dimension of whole numbers

Numbers are little-endian. Several files are one stream of ids in the order of their names: a text
may begin in one shard and end in the next. This file does not know texts or tokenizers.
Sources: nanoGPT data/openwebtext/prepare.py; llm.c dev/data/data_common.py.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from tokenize import TokenError

import numpy as np
from numpy.typing import DTypeLike, NDArray

from nanogpt2.config import SHARD_MAGICS
from nanogpt2.data.shards import Ids
from nanogpt2.filesystem import open_regular

HEADER_SIZE = 256  # int32 numbers


class Joined:
    """Several arrays of ids, read as one; nothing is copied but the slice that is asked for."""

    def __init__(self, parts: Sequence[Ids]) -> None:
        self.parts = [part for part in parts if len(part)]
        self.ends = [*accumulate(map(len, self.parts))]

    def __len__(self) -> int:
        return self.ends[-1] if self.ends else 0

    def __getitem__(self, places: slice) -> Ids | Joined:
        """Return a slice: a part's own ids where it lies in one part."""
        start, stop, step = places.indices(len(self))
        if step != 1:
            raise ValueError("a slice of joined ids has no step")
        found = []
        for i in range(bisect_right(self.ends, start), len(self.parts)):
            first = self.ends[i] - len(self.parts[i])
            if first >= stop:
                break
            found.append(self.parts[i][max(start - first, 0) : stop - first])
        return found[0] if len(found) == 1 else Joined(found)

    def __array__(self, dtype: DTypeLike | None = None, copy: bool | None = None) -> NDArray:
        """Return the ids as one array."""
        if copy is False:
            raise ValueError("joined ids are not one array")
        return np.concatenate([*self.parts, np.empty(0, np.uint16)], dtype=dtype)


def open_token_file(name: str) -> Ids:
    """Check a file's header and size and map its ids into memory.

    Raises ValueError for a malformed file, OSError for a file that cannot be read.
    """
    if Path(name).suffix.lower() == ".npy":
        return _open_array(name)
    with open_regular(Path(name)) as file:
        header = np.frombuffer(file.read(4 * HEADER_SIZE), np.uint8)
        size = file.seek(0, 2)
        numbers = header[: len(header) // 4 * 4].view("<i4")
        if not len(numbers) or int(numbers[0]) not in SHARD_MAGICS:
            return np.memmap(file, "<u2", mode="r", shape=(_whole_ids(name, size),))
        version, width = SHARD_MAGICS[int(numbers[0])]
        if len(numbers) < HEADER_SIZE:
            raise ValueError(f"{name!r} is cut off: {size} bytes, its header alone has 1024")
        count = int(numbers[2])
        if numbers[1] != version:
            raise ValueError(
                f"{name!r} is a shard of version {numbers[1]}; magic {numbers[0]} has {version}"
            )
        if count < 1 or size != header.nbytes + count * width:
            raise ValueError(
                f"{name!r} has {size:,} bytes, not {header.nbytes + count * width:,} for the "
                f"{count:,} ids that its header states"
            )
        offset = header.nbytes
        return np.memmap(file, f"<u{width}", mode="r", offset=offset, shape=(count,))


def _whole_ids(name: str, size: int) -> int:
    if not size:
        raise ValueError(f"{name!r} is empty")
    if size % 2:
        raise ValueError(f"{name!r} has {size:,} bytes, an odd number: ids have 16 bits")
    return size // 2


def _open_array(name: str) -> Ids:
    try:
        with open_regular(Path(name)):
            ids = np.load(name, mmap_mode="r", allow_pickle=False)
    # numpy evaluates the header as an expression of Python
    except (ValueError, EOFError, SyntaxError, TokenError, TypeError, ArithmeticError) as error:
        said = " ".join(str(error).split())[:80]
        raise ValueError(f"{name!r} is no array that numpy saved: {said}") from None
    if not isinstance(ids, np.ndarray) or ids.ndim != 1 or ids.dtype.kind not in "iu":
        what = f"{ids.dtype} of shape {ids.shape}" if isinstance(ids, np.ndarray) else "an archive"
        raise ValueError(f"{name!r} must hold whole numbers in one dimension, not {what}")
    if not len(ids):
        raise ValueError(f"{name!r} is empty")
    # joined to int64, uint64 would become float64; a number too large turns negative
    return ids.view(ids.dtype.str.replace("u8", "i8"))
