"""Files of tensors, read and mapped one tensor at a time, and safetensors files, written.

Their formats are in header.py (safetensors), pickled.py (torch.save) and llmc.py (llm.c).

`read` copies. `mapped` copies nothing, and its pages can be returned to the system. But another
program that overwrites a mapped file changes the tensors, and truncating the file kills the
process, so map for inference only. The open file is the same inode from header to last byte.

The reader is ours: safetensors' maps every file that it opens. A truncated file would kill training
too, mapped pages would double the memory of loading, and no digest would cover the bytes used.
This file does not know the purpose of the tensors.
"""

import hashlib
import json
import mmap
from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from nanogpt2.checkpoints.archive import OLD_PICKLE, ZIP
from nanogpt2.checkpoints.header import DIGEST, NO_DIGEST, Header, Layout, StoredTensor, digest_of
from nanogpt2.checkpoints.llmc import LlmcLayout
from nanogpt2.checkpoints.pickled import PickleLayout
from nanogpt2.filesystem import open_regular
from nanogpt2.memory import is_out_of_memory

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
PIECE = 2**20  # bytes digested at once between tensors
NAMES = {dtype: name for name, dtype in DTYPES.items()}


class TensorFile:
    """An open file of tensors, which are returned on the CPU and as they are stored."""

    def __init__(self, path: Path, file: IO[bytes]) -> None:
        """Read the file's layout. Raises ValueError for an invalid one."""
        self.path = path
        self.layout = _layout(path, file)
        self.entries = self.layout.entries
        self.sha256, self.replaces = self.layout.sha256, self.layout.replaces
        self._file = file
        self._mapping: mmap.mmap | None = None

    def read(
        self, wanted: Collection[str], sha256: str | None = None, passing: Collection[str] = ()
    ) -> Iterator[tuple[str, Tensor]]:
        """Yield the wanted tensors with their names.

        passing: tensors that share one buffer and stay valid until the next one is requested.
        Bytes of other tensors are read only where there is a digest to check. Raises ValueError,
        after the last one, where the bytes do not have the SHA-256 `sha256`, by default the file's
        own.
        """
        sha256, head = self.layout.required_digest(sha256)
        digest = hashlib.sha256(head)
        entries = [entry for entry in self.entries if entry.name in wanted]
        sizes = [entry.end - entry.start for entry in entries if entry.name in passing]
        buffer = torch.empty(max(sizes, default=0), dtype=torch.uint8)
        # a second thread digests one tensor while the caller uses it and the next one is read
        last: Future[None] | None = None
        place = len(head)  # of the first byte not yet digested
        with ThreadPoolExecutor(1) as worker:
            for entry in entries:
                size, keep = entry.end - entry.start, entry.name not in passing
                if last is not None and not keep:
                    last.result()
                if sha256 is not None and size > 0:
                    place = self._digest_to(entry.start, place, worker, digest)
                data = torch.empty(size, dtype=torch.uint8) if keep else buffer[:size]
                self._file.seek(entry.start)
                if self._file.readinto(data.numpy().data) < size:  # type: ignore[attr-defined]
                    raise self.layout.broken(
                        f"it was cut short at {entry.name!r} while it was read"
                    )
                if sha256 is not None and entry.end > place:
                    # tensors may share bytes
                    fresh = data[place - entry.start :].numpy().data
                    last, place = worker.submit(digest.update, fresh), entry.end
                yield entry.name, _typed(data, entry)
            if sha256 is not None:
                self._digest_to(self.layout.size, place, worker, digest)
        if sha256 is not None and digest.hexdigest() != sha256:
            raise self._damaged()

    def _digest_to(self, end: int, place: int, worker: ThreadPoolExecutor, digest: Any) -> int:
        """Digest the bytes from `place` to `end`; return the first one not yet digested."""
        self._file.seek(place)
        while place < end:
            data = self._file.read(min(end - place, PIECE))
            if not data:
                raise self.layout.broken("it was cut short while it was read")
            worker.submit(digest.update, data).result()
            place += len(data)
        return place

    def mapped(
        self, wanted: Collection[str], sha256: str | None = None
    ) -> Iterator[tuple[str, Tensor]]:
        """Yield the wanted tensors as views of the file, aligned no better than the file is.

        The views keep the mapping alive. Raises ValueError as `read` does.
        """
        try:
            # once: the views of all calls share the mapping, for `release` to find them
            self._mapping = self._mapping or mmap.mmap(
                self._file.fileno(), self.layout.size, access=mmap.ACCESS_COPY
            )
        except (OSError, ValueError) as error:
            kind = MemoryError if is_out_of_memory(error) else ValueError
            raise kind(f"{str(self.path)!r} cannot be mapped: {error}") from None
        sha256, head = self.layout.required_digest(sha256)
        digest = None if sha256 is None else digest_of(self._file, head, self._mapping)
        for entry in self.entries:
            if entry.name in wanted:
                size = entry.end - entry.start
                data = torch.empty(0, dtype=torch.uint8)
                if size > 0:
                    data = torch.frombuffer(
                        self._mapping, dtype=data.dtype, offset=entry.start, count=size
                    )
                yield entry.name, _typed(data, entry)
        if digest is not None and digest.result() != sha256:
            raise self._damaged()

    def release(self, tensor: Tensor) -> None:
        """Return a mapped tensor's pages to the system; the next access reads them again."""
        if self._mapping is None or not hasattr(mmap, "MADV_DONTNEED"):
            return
        first = torch.frombuffer(self._mapping, dtype=torch.uint8, count=1).data_ptr()
        start = tensor.data_ptr() - first
        end = min(start + tensor.numel() * tensor.element_size(), len(self._mapping))
        # whole pages only: the first and last may hold other tensors' bytes
        start = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE
        end = end // mmap.PAGESIZE * mmap.PAGESIZE
        if 0 <= start < end:
            # madvise fails on locked memory
            with suppress(OSError):
                self._mapping.madvise(mmap.MADV_DONTNEED, start, end - start)

    def _damaged(self) -> ValueError:
        return ValueError(f"{str(self.path)!r} is damaged: its SHA-256 is not the one stated")


def _typed(data: Tensor, entry: StoredTensor) -> Tensor:
    dtype = DTYPES[entry.dtype]
    if entry.start == entry.end:
        return torch.zeros(entry.shape, dtype=dtype)
    numbers = data.view(dtype)
    if entry.strides is not None:
        return numbers.as_strided(entry.shape, entry.strides)
    return numbers.view(entry.shape)


def _layout(path: Path, file: IO[bytes]) -> Layout:
    """Read a file's layout: of safetensors by its name, of the other formats by its first bytes."""
    if path.suffix == ".safetensors":
        return Header(path, file)
    file.seek(0)
    head = file.read(16)
    if head.startswith((ZIP, OLD_PICKLE)):
        return PickleLayout(path, file)
    return LlmcLayout(path, file)


@contextmanager
def opened(path: Path) -> Iterator[TensorFile]:
    """Open a file of tensors. Raises ValueError for an invalid one, OSError for an absent one."""
    with open_regular(path) as file:
        yield TensorFile(path, file)


def write(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write a file that states its SHA-256. Copy one tensor at a time.

    metadata: stated beside it. Raises ValueError for a dtype that the format lacks.
    """
    stated = {"format": "pt", DIGEST: NO_DIGEST} | dict(metadata or {})
    header: dict[str, Any] = {"__metadata__": stated}
    start = 0
    for name, tensor in tensors.items():
        if tensor.dtype not in NAMES:
            raise ValueError(f"tensor {name} cannot be written as {tensor.dtype}")
        end = start + tensor.numel() * tensor.element_size()
        place = {"shape": list(tensor.shape), "data_offsets": [start, end]}
        header[name] = {"dtype": NAMES[tensor.dtype]} | place
        start = end
    text = json.dumps(header, separators=(",", ":")).encode("ascii")
    # pad with spaces to a multiple of 8, to align the data
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
