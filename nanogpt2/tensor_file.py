"""Safetensors files, read and written one tensor at a time.

    8 bytes      length of the header, little-endian
    header       JSON: {name: {"dtype", "shape", "data_offsets": [start, end]}, "__metadata__": {}}
    data         the tensors' bytes, without a gap

A file written here states its own SHA-256 in its metadata, computed with the digest's 64 characters
taken as zeros; a file that states one is read only if it holds.

A file is read, unless it is to be mapped into memory: then nothing is copied, and pages that are
needed no more are the system's. But what is mapped changes where another program writes over the
file, and ends the process where it is cut short, so that is for programs that have nothing to lose.
Either way what is open here is one file, whole, from header to last byte. This file does not know
what the tensors are for.
"""

import hashlib
import json
import math
import mmap
from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
LONGEST_HEADER = 100_000_000  # bytes, the library's limit
MOST_AXES = 8
DIGEST = "nanogpt2.sha256"  # its key in the metadata
NO_DIGEST = "0" * 64


@dataclass(frozen=True)
class StoredTensor:
    """What the header says of a tensor."""

    file: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int  # in the data, in bytes
    end: int


class TensorFile:
    """An open safetensors file whose header is sound: `entries`, in the data's order."""

    def __init__(self, path: Path, file: IO[bytes]) -> None:
        """Read the header. Raises ValueError for one that is none."""
        self.path = path
        self._file = file
        self._mapping: mmap.mmap | None = None
        size = file.seek(0, 2)
        file.seek(0)
        length = file.read(8)
        announced = int.from_bytes(length, "little")
        if len(length) < 8 or announced > min(size - 8, LONGEST_HEADER):
            raise self._broken(f"{size} bytes cannot hold its header")
        header = file.read(announced)
        self._head = length + header
        try:
            stated = json.loads(header.decode("utf-8"), object_pairs_hook=_without_twins)
            metadata = stated.pop("__metadata__", {})
            self.sha256 = metadata.get(DIGEST)
            found = [_entry(path, name, value) for name, value in stated.items()]
        except (ValueError, TypeError, AttributeError, LookupError, RecursionError) as error:
            raise self._broken(f"its header: {error}") from None
        self.entries = sorted(found, key=lambda entry: (entry.start, entry.end))
        end = 0
        for entry in self.entries:
            if entry.start != end:
                raise self._broken(f"{entry.name!r} starts at {entry.start}, not at {end}")
            end = entry.end
        if end != size - len(self._head):
            raise self._broken(f"its tensors take {end} bytes, not {size - len(self._head)}")

    def tensors(
        self,
        wanted: Collection[str],
        sha256: str | None = None,
        passing: Collection[str] = (),
        mapped: bool = False,
    ) -> Iterator[tuple[str, Tensor]]:
        """Read the wanted tensors, on the CPU and as they are stored, with their names.

        Those that are `passing` share one buffer, and hold until the next is asked for. With
        `mapped` all are views of the file, as little aligned as it is. Raises ValueError, after the
        last one, where the bytes do not have the SHA-256 `sha256`, by default the one that the file
        states of itself.
        """
        head = self._head
        if sha256 is None and self.sha256 is not None:
            sha256 = self.sha256
            head = head.replace(str(sha256).encode(), NO_DIGEST.encode(), 1)
        digest = hashlib.sha256(head)
        self._file.seek(len(head))
        kept = {*wanted} - {*passing}
        sizes = [entry.end - entry.start for entry in self.entries if entry.name not in kept]
        buffer = torch.empty(max(sizes, default=0), dtype=torch.uint8)
        # digested while the next one is read and this one is used, which takes as long
        last: Future[None] | None = None
        with ThreadPoolExecutor(1) as worker:
            for entry in self.entries:
                size, keep = entry.end - entry.start, entry.name in kept
                if last is not None and not keep:
                    last.result()
                if mapped:
                    data = self._mapped(entry)
                else:
                    data = torch.empty(size, dtype=torch.uint8) if keep else buffer[:size]
                    if self._file.readinto(data.numpy().data) < size:  # type: ignore[attr-defined]
                        raise self._broken(f"it was cut short at {entry.name!r} while it was read")
                if sha256 is not None:
                    last = worker.submit(digest.update, data.numpy().data)
                if entry.name in wanted:
                    yield entry.name, data.view(DTYPES[entry.dtype]).view(entry.shape)
        if sha256 is not None and digest.hexdigest() != sha256:
            raise ValueError(f"{str(self.path)!r} is damaged: its SHA-256 is not the one stated")

    def release(self, tensor: Tensor) -> None:
        """Let the system have a mapped tensor's pages; they come back when they are needed."""
        if self._mapping is None or not hasattr(mmap, "MADV_DONTNEED"):
            return
        first = torch.frombuffer(self._mapping, dtype=torch.uint8, count=1).data_ptr()
        start = tensor.data_ptr() - first
        end = min(start + tensor.numel() * tensor.element_size(), len(self._mapping))
        # whole pages; the others are its neighbours' as well
        start, end = (
            -(-start // mmap.PAGESIZE) * mmap.PAGESIZE,
            end // mmap.PAGESIZE * mmap.PAGESIZE,
        )
        if 0 <= start < end:
            # it is advice, which memory that is locked refuses
            with suppress(OSError):
                self._mapping.madvise(mmap.MADV_DONTNEED, start, end - start)

    def _mapped(self, entry: StoredTensor) -> Tensor:
        """A tensor's bytes, in a mapping of the whole file that lasts as long as they are held."""
        if self._mapping is None:
            size = len(self._head) + self.entries[-1].end
            try:
                self._mapping = mmap.mmap(self._file.fileno(), size, access=mmap.ACCESS_COPY)
            except (OSError, ValueError) as error:
                raise ValueError(f"{str(self.path)!r} cannot be mapped: {error}") from None
        start, size = len(self._head) + entry.start, entry.end - entry.start
        if size == 0:
            return torch.empty(0, dtype=torch.uint8)
        return torch.frombuffer(self._mapping, dtype=torch.uint8, offset=start, count=size)

    def _broken(self, why: str) -> ValueError:
        return ValueError(f"{str(self.path)!r} is no whole safetensors file: {why}")


@contextmanager
def opened(path: Path) -> Iterator[TensorFile]:
    """Open a safetensors file. Raises ValueError for what is none, OSError for what is absent."""
    # a pipe would be waited for, without end
    if path.exists() and not path.is_file():
        raise ValueError(f"{str(path)!r} is no regular file")
    with path.open("rb") as file:
        yield TensorFile(path, file)


def _without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name is there twice")
    return found


def _entry(path: Path, name: str, stated: Mapping[str, Any]) -> StoredTensor:
    """Read what the header says of one tensor. Raises an error for what cannot be."""
    dtype, shape, (start, end) = stated["dtype"], stated["shape"], stated["data_offsets"]
    if len(stated) != 3 or dtype not in DTYPES:
        raise ValueError(f"tensor {name!r} has no known type")
    sizes = [*shape, start, end]
    if len(shape) > MOST_AXES or any(type(n) is not int or not 0 <= n < 2**63 for n in sizes):
        raise ValueError(f"tensor {name!r} has no shape or place")
    if end - start != math.prod(shape) * DTYPES[dtype].itemsize:
        raise ValueError(f"tensor {name!r} does not take the bytes of its shape")
    return StoredTensor(path, name, dtype, tuple(shape), start, end)


def write(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a file that states its SHA-256; no tensor is held in memory but the one being written.

    Raises ValueError for a dtype that the format lacks.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt", DIGEST: NO_DIGEST}}
    start = 0
    for name, tensor in tensors.items():
        if tensor.dtype not in NAMES:
            raise ValueError(f"tensor {name} cannot be written as {tensor.dtype}")
        end = start + tensor.numel() * tensor.element_size()
        place = {"shape": list(tensor.shape), "data_offsets": [start, end]}
        header[name] = {"dtype": NAMES[tensor.dtype]} | place
        start = end
    text = json.dumps(header, separators=(",", ":")).encode("ascii")
    # spaces up to a multiple of 8, so that the data is aligned
    text += b" " * (-len(text) % 8)
    head = len(text).to_bytes(8, "little") + text
    digest = hashlib.sha256(head)
    with path.open("wb") as file:
        file.write(head)
        for tensor in tensors.values():
            data = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data
            digest.update(data)
            file.write(data)
        file.seek(head.index(NO_DIGEST.encode()))
        file.write(digest.hexdigest().encode())
